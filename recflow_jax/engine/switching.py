"""How long one thread may keep Python's interpreter from the engine's.

Python lets a thread that computes go on for 5 ms before another one gets its turn. The engine's
threads need several turns for each launch, as each call into JAX or numpy gives the turn away: next
to a caller who sends all the time, each launch takes as many times 5 ms.
"""

import sys
import threading
import weakref
from collections.abc import Callable

from scheduling.host_costs import SWITCH_US

SHORT_MS = SWITCH_US / 1000


class SwitchInterval:
    """Python's switch interval, as short as open engines want it; afterwards what it was."""

    def __init__(self) -> None:
        # A garbage collection may end another engine on this very thread.
        self._lock = threading.RLock()
        self._before_s = 0.0
        self._wanted_s: list[float] = []

    def shorten(self, owner: object, seconds: float) -> Callable[[], object]:
        """At most `seconds` until `owner` is gone, or until what this returns is called."""
        with self._lock:
            if not self._wanted_s:
                self._before_s = sys.getswitchinterval()
            self._wanted_s.append(seconds)
            self._set()
        return weakref.finalize(owner, self._restore, seconds)

    def _restore(self, seconds: float) -> None:
        with self._lock:
            self._wanted_s.remove(seconds)
            self._set()

    def _set(self) -> None:
        sys.setswitchinterval(min([self._before_s, *self._wanted_s]))


SWITCH_INTERVAL = SwitchInterval()
