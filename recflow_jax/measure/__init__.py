"""What `recflow profile` and `recflow bench` measure, and what they compare with."""
