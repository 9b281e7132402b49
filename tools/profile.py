"""The profiling tool, `recflow profile`, in a checkout: `python -m tools.profile --help`."""

import sys

from recflow_jax.cli import run

if __name__ == "__main__":
    sys.exit(run(["profile", *sys.argv[1:]]))
