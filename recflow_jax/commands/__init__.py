"""The subcommands of `recflow`, one module each."""
