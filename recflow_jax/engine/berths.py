"""Room in slices' buffers, for ids that are copied there when their request comes.

What its caller may write to is copied in `submit` anyway. Copied into a berth, one request's ids
behind the other's, a slice of such requests lies in its buffer already (see `stays`). A request
that has a berth for itself has its dense features there, too. One at a time may use berths, callers
and the launcher: `Inbox` has a lock for it.
"""

import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

from recflow_jax.engine.pinned import pinned_zeros
from scheduling.host_costs import LARGE_IDS

AROUND = LARGE_IDS  # ids before and behind the room of a berth, for those of others


class Berth:
    """An int32 buffer, as long as that of the largest slice and AROUND on either side, of which
    requests have filled [AROUND, end).

    dense_at: where in that buffer the dense features start. is_closed: whether no other request
    has room. has_dense: whether the dense features of this one lie there, if AROUND is where the
    buffer starts. has_left: whether a slice has been launched from it: no other one is.
    """

    def __init__(self, array: np.ndarray, dense_at: int = 0) -> None:
        self.array = array
        self.end = AROUND
        self.dense_at = dense_at
        self.is_closed = self.has_dense = self.has_left = False

    def room(self, ids: int) -> "Room":
        """The next `ids`, for as many as there is room for."""
        return Room(self, self.end, ids)


@dataclass(frozen=True, slots=True)
class Room:
    """The next `ids` of a berth, from `place` on: nobody's until they are kept."""

    berth: Berth
    place: int
    ids: int

    @property
    def array(self) -> np.ndarray:
        """int32 [ids]."""
        return self.berth.array[self.place : self.place + self.ids]

    def dense(self, samples: int, width: int) -> np.ndarray:
        """float32 [samples, width]: in the berth, if nobody else has room there."""
        berth = self.berth
        berth.has_dense = berth.is_closed
        if not berth.has_dense:
            return np.empty((samples, width), np.float32)
        start = AROUND + berth.dense_at
        dense = berth.array[start : start + samples * width].view(np.float32)
        return dense.reshape(samples, width)

    def keep(self) -> None:
        """Until nobody has the berth. Who keeps what is kept changes nothing, and may do so while
        others use berths.
        """
        end = self.place + self.ids
        if self.berth.end < end:
            self.berth.end = end


class Berths:
    """The berths of one engine. ids, length, dense_at: of its largest slice, how many there are,
    how long the buffer is and where in it the dense features start.

    An array is used again when nobody has its berth any more.
    """

    def __init__(self, *, ids: int, length: int, dense_at: int) -> None:
        self._ids = ids
        self._dense_at = dense_at
        self._length = AROUND + length + AROUND
        self._free: deque[np.ndarray] = deque()
        self._open: Berth | None = None

    def reserve(self, count: int) -> None:
        """Makes arrays for `count` berths: later it may take a request milliseconds."""
        self._free.extend([pinned_zeros(self._length) for _ in range(count - len(self._free))])

    def room(self, ids: int, *, only_free: bool = False, alone: bool = False) -> Room | None:
        """Where the next `ids` find room; None where there is never so much, or, if `only_free`,
        where an array would have to be made. alone: in a berth where nobody else has or finds any.
        """
        if ids > self._ids:
            return None
        berth = self._open
        if berth is None or not self._has_room(berth, ids) or (alone and berth.end > AROUND):
            if only_free and not self._free:
                return None
            berth = self._open = self._new()
        berth.is_closed = alone
        return berth.room(ids)

    def _has_room(self, berth: Berth, ids: int) -> bool:
        is_open = not (berth.has_left or berth.is_closed)
        return is_open and berth.end + ids <= AROUND + self._ids

    def _new(self) -> Berth:
        array = self._free.pop() if self._free else pinned_zeros(self._length)
        berth = Berth(array, self._dense_at)
        weakref.finalize(berth, self._free.append, array).atexit = False
        return berth
