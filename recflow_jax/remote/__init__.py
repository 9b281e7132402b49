"""Front ends in other processes: each with an interpreter of its own, all on one engine."""
