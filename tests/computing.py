"""A thread that competes for the interpreter."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 0.2


@contextmanager
def computing() -> Iterator[Callable[[], int]]:
    """How far a thread has counted that never lets go of the interpreter unless it is asked to, and
    asks for it after PATIENCE_S alone.
    """
    before, stop, count = sys.getswitchinterval(), threading.Event(), [0]

    def compute() -> None:
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=compute)
    sys.setswitchinterval(PATIENCE_S)
    thread.start()
    try:
        yield lambda: count[0]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
