"""The requests that wait: who is next, who is late, how many samples."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from scheduling.request import Part, Request, SliceBucket

SWEEP_AT_LEAST = 64
WHOLE_SHARE = 16
"""A request of up to such a part of a slice's room is not cut: what it would fill is worth less
than the second slice that its answer would wait for. Nor is one that takes more than half of it:
its ids may lie where the slice is made, and would all be copied."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request of which the samples from `start` on, and the ids from `first_id` on, wait."""

    request: Request
    arrival: int
    start: int = 0
    first_id: int = 0
    gone: bool = False

    def is_late(self, now_us: int) -> bool:
        deadline_us = self.request.deadline_us
        return deadline_us is not None and deadline_us <= now_us

    def reach(self, samples: int, ids: int) -> int:
        """The sample before which to stop so as to take at most so many samples and ids."""
        stop = min(self.start + samples, self.request.samples)
        if self.request.ids - self.first_id <= ids:
            return stop
        within_ids = self.request.id_offsets.searchsorted(self.first_id + ids, side="right") - 1
        return min(stop, int(within_ids))

    def goes_whole(self, room: SliceBucket) -> bool:
        """Whether it takes so little of a slice with so much room, or so much of it, that it is not
        cut.
        """
        samples, ids = self.request.samples, self.request.ids
        if self.start or samples > room.samples or ids > room.ids:
            return False
        is_small = WHOLE_SHARE * samples <= room.samples and WHOLE_SHARE * ids <= room.ids
        return is_small or 2 * samples > room.samples or 2 * ids > room.ids

    def cut(self, stop: int) -> tuple[Part, int]:
        """The part up to `stop` and its ids, which no longer wait."""
        request = self.request
        part = Part(request_id=request.id, start=self.start, stop=stop)
        before = request.ids if stop == request.samples else int(request.id_offsets[stop])
        ids = before - self.first_id
        self.start, self.first_id = stop, before
        return part, ids


class WaitingQueue:
    """The requests that wait, whole or in part: who is next, who is late, how many samples."""

    def __init__(self) -> None:
        self.samples = 0
        self._arrivals = 0
        self._waiting: dict[int, _Waiting] = {}
        self._begun: dict[int, _Waiting] = {}
        self._by_priority = _Heap(alive=lambda waiting: not waiting.gone)
        self._by_deadline = _Heap(alive=lambda waiting: not waiting.gone and waiting.start == 0)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    @property
    def next_deadline_us(self) -> int | None:
        first = self._by_deadline.head
        return first.request.deadline_us if first else None

    @property
    def has_begun(self) -> bool:
        """Whether a request waits of which some samples have left."""
        return bool(self._begun)

    @property
    def first_samples(self) -> int:
        """Of who is next, what still waits; 0 if nobody is."""
        first = self._by_priority.head
        return first.request.samples - first.start if first else 0

    def push(self, request: Request) -> None:
        waiting = self._waiting[request.id] = _Waiting(request, self._arrivals)
        self._arrivals += 1
        self.samples += request.samples
        self._by_priority.push(request.priority, waiting)
        if request.deadline_us is not None:
            self._by_deadline.push(request.deadline_us, waiting)

    def drop(self, request_id: int) -> None:
        """Forget what still waits of a request; one that does not wait is ignored."""
        waiting = self._waiting.pop(request_id, None)
        self._begun.pop(request_id, None)
        if waiting:
            waiting.gone = True
            self.samples -= waiting.request.samples - waiting.start

    def drop_late(self, now_us: int) -> list[int]:
        """Drop the requests whose deadline has come before any of their samples left."""
        late = []
        while (first := self._by_deadline.head) and first.is_late(now_us):
            late.append(first.request.id)
            self.drop(first.request.id)
        return late

    def fits(self, room: SliceBucket, *, begun: bool = False) -> bool:
        """Whether at least the first waiting sample fits, or the first of requests begun."""
        first = self._first(begun)
        return first is not None and first.reach(room.samples, room.ids) > first.start

    def fits_uncut(self, room: SliceBucket, *, of: SliceBucket, begun: bool = False) -> bool:
        """Whether what waits first fits, or takes so much of a slice with the room `of` that it is
        cut; what has begun is cut already. begun: of those alone.
        """
        first = self._first(begun)
        if first is None or not first.goes_whole(of):
            return True
        return first.reach(room.samples, room.ids) == first.request.samples

    def take(
        self, room: SliceBucket, *, of: SliceBucket | None = None, begun: bool = False
    ) -> tuple[tuple[Part, ...], int]:
        """As many samples as fit, strictly in order; their parts and how many ids they have. A
        request that takes little, or most, of a slice with the room `of` (None: this one) is not
        cut.

        begun: only of requests of which some samples have left.
        """
        parts, samples_left, ids_left = [], room.samples, room.ids
        while first := self._first(begun):
            stop = first.reach(samples_left, ids_left)
            is_cut = stop < first.request.samples
            if stop == first.start or (is_cut and parts and first.goes_whole(of or room)):
                break
            part, ids = first.cut(stop)
            parts.append(part)
            samples_left, ids_left = samples_left - part.samples, ids_left - ids
            self.samples -= part.samples
            if is_cut:
                self._begun[part.request_id] = first
            else:
                self.drop(part.request_id)
        return tuple(parts), room.ids - ids_left

    def _first(self, begun: bool) -> _Waiting | None:
        """Of those begun there is one in each priority at most."""
        if not begun:
            return self._by_priority.head
        return min(self._begun.values(), key=lambda one: one.request.priority, default=None)


class _Heap:
    """Waiting requests by ascending key, then by arrival.

    Those that die inside are skipped when they reach the head. The others are swept out when the
    heap has doubled since the last sweep, so it stays as small as what lives, at O(log n) a push.
    """

    def __init__(self, alive: Callable[[_Waiting], bool]) -> None:
        self._alive = alive
        self._entries: list[tuple[int, int, _Waiting]] = []
        self._sweep_at = SWEEP_AT_LEAST

    @property
    def head(self) -> _Waiting | None:
        while self._entries and not self._alive(self._entries[0][-1]):
            heappop(self._entries)
        return self._entries[0][-1] if self._entries else None

    def push(self, key: int, waiting: _Waiting) -> None:
        if len(self._entries) >= self._sweep_at:
            self._sweep()
        heappush(self._entries, (key, waiting.arrival, waiting))

    def _sweep(self) -> None:
        self._entries = [entry for entry in self._entries if self._alive(entry[-1])]
        heapify(self._entries)
        self._sweep_at = max(SWEEP_AT_LEAST, 2 * len(self._entries))
