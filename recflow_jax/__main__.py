"""`python -m recflow_jax` is the command `recflow`."""

from recflow_jax.cli import main

main()
