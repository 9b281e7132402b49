"""Programs for a checkout: `python -m tools.<name>`. Nothing imports them."""
