"""The clock of the engine: what it measures and plans by."""

import time


def now_us() -> int:
    """The clock of all times and deadlines, in microseconds."""
    return time.monotonic_ns() // 1000
