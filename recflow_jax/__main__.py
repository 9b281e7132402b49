"""`python -m recflow_jax` is the command `recflow`."""

from recflow_jax.cli import main

if __name__ == "__main__":  # not in the processes that it starts
    main()
