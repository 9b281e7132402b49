"""A bound on the work inside: how many samples are accepted and not yet answered."""

import threading


class Admission:
    """An exact count of samples, shared by threads, that never exceeds `max_samples`.

    Every sample that entered must leave once: answered, expired, cancelled or failed.
    """

    def __init__(self, max_samples: int) -> None:
        if max_samples < 1:
            raise ValueError(f"admission: max_samples is {max_samples}, not at least 1")
        self.max_samples = max_samples
        self._samples = 0
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Samples accepted and not yet answered."""
        return self._samples

    def has_room(self, n: int) -> bool:
        """Whether `n` more would fit now."""
        return self._samples + n <= self.max_samples

    def try_enter(self, n: int) -> bool:
        """Let all `n` samples in, or none of them; never waits for others to leave."""
        _require_count(n)
        with self._lock:
            if self._samples + n > self.max_samples:
                return False
            self._samples += n
            return True

    def leave(self, n: int) -> None:
        """Count `n` samples out; ValueError if fewer are inside, which is a caller's mistake."""
        _require_count(n)
        with self._lock:
            if n > self._samples:
                raise ValueError(f"admission: {n} samples leave, only {self._samples} are inside")
            self._samples -= n


def _require_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"admission: {n} samples, not a count")
