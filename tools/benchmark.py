"""The benchmark, `recflow bench`, in a checkout: `python -m tools.benchmark --help`."""

import sys

from recflow_jax.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", *sys.argv[1:]]))
