"""Python's garbage collector beside open engines.

A full collection looks at all that JAX has loaded: 0.1 s in which no thread runs, every few
thousand requests. While an engine is open, what was there when it started is left out, and Python
collects less often: what requests are made of is no garbage.
"""

import gc
import threading
import weakref
from collections.abc import Callable

YOUNG_OBJECTS = 20_000  # that are there before they are looked at; Python's own are 700 to 2,000


class FrozenHeap:
    """What the garbage collector leaves out; frozen by any number of engines at a time."""

    def __init__(self) -> None:
        # A collection may end another engine on this very thread.
        self._lock = threading.RLock()
        self._freezes = 0
        self._threshold = 0

    def freeze(self, owner: object) -> Callable[[], object]:
        """Collects what is garbage, and leaves all else out until `owner` is gone, or until what
        this returns is called, once or more often.
        """
        with self._lock:
            if not self._freezes:
                self._threshold, *others = gc.get_threshold()
                # 0: somebody wants no collections.
                if 0 < self._threshold < YOUNG_OBJECTS:
                    gc.set_threshold(YOUNG_OBJECTS, *others)
            self._freezes += 1
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        return weakref.finalize(owner, self._thaw)

    def _thaw(self) -> None:
        with self._lock:
            self._freezes -= 1
            if not self._freezes:
                gc.unfreeze()
                now, *others = gc.get_threshold()
                if now == YOUNG_OBJECTS:  # else somebody has set it meanwhile
                    gc.set_threshold(self._threshold, *others)


HEAP = FrozenHeap()
