"""From measured times to plans: how a batch is cut, what rides beside each segment, and how.

The idea, a scheduler that picks the least-interfering scheme from an offline table: RecFlow (BUPT
and Meituan). Everything is worked out ahead; at run time a plan is a look-up of a few microseconds.
"""

import math
import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import itemgetter
from typing import Literal, Protocol, Self, get_args, runtime_checkable

from scheduling.alternatives import alone, fitting, left_after
from scheduling.buckets import ladder
from scheduling.costs import Cost, StepCosts, segment_key
from scheduling.request import WHOLE, CoRun, SegmentShape, SliceBucket, StepShape, whole_batches
from scheduling.table import ProfileTable

Objective = Literal["throughput", "latency"]
STAYS = 2  # a request waits for the batch before its own, then for its own, at most
WORTH_RIDING = 1.1
"""Slices that ride are to save a tenth of what whole batches take, at least. What rides is answered
a step later and takes two launches, which cost a busy host more than a table tells: with 1.5 % to
save, requests of an H200 at 80 % of saturation had a p99 of 19 ms where whole batches had 11."""


@runtime_checkable
class Plans(Protocol):
    """What the pipeline asks. `waiting` counts samples of which nothing is launched yet.

    `batch_buckets`: the sizes that batches may have; `cuts`: the segments they may be cut into;
    `whole`: batches that may run in one executable; `rides`: whether slices go beside segments
    nevertheless, where more waits than a batch takes; `co_runs`: what is in one executable then,
    and `whole`.
    """

    @property
    def batch_buckets(self) -> tuple[int, ...]: ...

    @property
    def cuts(self) -> frozenset[int]: ...

    @property
    def whole(self) -> frozenset[CoRun]: ...

    @property
    def rides(self) -> bool: ...

    @property
    def co_runs(self) -> tuple[CoRun, ...]: ...

    def segments(self, batch: int, waiting: int) -> int:
        """Into how many segments to cut a batch of this bucket."""
        ...

    def slice_beside(self, shape: SegmentShape, waiting: int) -> SliceBucket:
        """The most to launch beside a segment."""
        ...

    def co_run(self, shape: SegmentShape, size: SliceBucket) -> str | None:
        """The config that runs this slice in the segment's launches; None: one after the other."""
        ...

    def runs_whole(self, batch: CoRun, *, crowded: bool) -> bool:
        """Whether to run a batch of one slice and one segment in one executable. `crowded`: more
        waits than a batch takes.
        """
        ...

    def batch(self, waiting: int) -> int:
        """How many of so many samples to begin a batch with, behind others on the device."""
        ...


@dataclass(frozen=True, kw_only=True)
class SerialPlans:
    """Without a table: always the same cut, as large a slice as there is, one after the other, but
    the batches in `whole` in one executable.
    """

    count: int
    batch_buckets: tuple[int, ...]
    largest_slice: SliceBucket
    whole: frozenset[CoRun] = frozenset()

    @classmethod
    def of(
        cls, count: int, batch_buckets: Sequence[int], slice_buckets: Sequence[SliceBucket]
    ) -> Self:
        """In `count` segments; if that is one, with all whole batches that these sizes have."""
        return cls(
            count=count,
            batch_buckets=tuple(batch_buckets),
            largest_slice=slice_buckets[-1],
            whole=whole_batches(batch_buckets, slice_buckets) if count == 1 else frozenset(),
        )

    @property
    def cuts(self) -> frozenset[int]:
        return frozenset({self.count})

    @property
    def rides(self) -> bool:
        return self.count > 1 or not self.whole

    @property
    def co_runs(self) -> tuple[CoRun, ...]:
        return tuple(self.whole)

    def segments(self, batch: int, waiting: int) -> int:
        return self.count

    def slice_beside(self, shape: SegmentShape, waiting: int) -> SliceBucket:
        return self.largest_slice

    def co_run(self, shape: SegmentShape, size: SliceBucket) -> str | None:
        return None

    def runs_whole(self, batch: CoRun, *, crowded: bool) -> bool:
        return batch in self.whole

    def batch(self, waiting: int) -> int:
        return self.batch_buckets[-1]


class TablePlans:
    """The best plans by a profile table, all worked out when it is made.

    throughput: a batch and what waits are through as soon as possible. latency: samples wait as
    little as possible on average, where as many come in as a batch has while it runs. Steps take
    what the device takes for all, or the host for all launches, whichever is longer.
    cuts: those that there may be; None allows all that were measured.
    p99_ms: no batch is so large that two in a row take longer than that, by the table.
    launch_factor: see `StepCosts`. whole: batches that there are executables for; they are run by
    these, which saves a launch, unless more waits and slices beside segments are faster by enough
    to be worth it (WORTH_RIDING): else nothing is cut, and nothing rides.
    Raises ProfileMiss for a table without the slices or without one whole cut, and ValueError for
    a bound that even the smallest batch does not meet.
    """

    def __init__(
        self,
        table: ProfileTable,
        batch_buckets: Sequence[int],
        slice_buckets: Sequence[SliceBucket],
        *,
        cuts: Sequence[int] | None = None,
        objective: Objective = "throughput",
        p99_ms: float | None = None,
        launch_factor: float = 1.0,
        whole: frozenset[CoRun] = frozenset(),
    ) -> None:
        if objective not in get_args(Objective):
            raise ValueError(
                f"objective {objective!r} is not one of {', '.join(get_args(Objective))}"
            )
        self.costs = StepCosts(table, launch_factor=launch_factor)
        self.objective = objective
        self._slices = tuple(slice_buckets)
        self._cuts = _measured_cuts(table, batch_buckets[-1], cuts)
        self._pending = _pending_sizes(slice_buckets, batch_buckets[-1])
        self._best = cache(self.costs.best)
        self._rest = cache(self._cheapest)
        self.batch_buckets = self._within(batch_buckets, p99_ms)
        self.whole = frozenset(c for c in whole if c.segment.batch in self.batch_buckets)
        self._fills = self._worth_filling()
        self._segments = {
            (batch, waiting): self._best_cut(batch, waiting)
            for batch in self.batch_buckets
            for waiting in self._pending
        }
        self._beside = {
            (shape, waiting): self._rest(shape, waiting)[0].size or self._slices[0]
            for shape in self._shapes()
            for waiting in self._pending
        }
        self._co_runs = {
            (shape, size): self._best(shape, size)[1]
            for shape in self._shapes()
            for size in self._slices
        }
        self.riding_gain = self._riding_gain()

    @property
    def rides(self) -> bool:
        return self.riding_gain >= WORTH_RIDING

    def segments(self, batch: int, waiting: int) -> int:
        return self._cut(batch, waiting) if self.rides else 1

    def slice_beside(self, shape: SegmentShape, waiting: int) -> SliceBucket:
        return self._beside[shape, self._rung(waiting)]

    def co_run(self, shape: SegmentShape, size: SliceBucket) -> str | None:
        return self._co_runs[shape, size]

    def runs_whole(self, batch: CoRun, *, crowded: bool) -> bool:
        if batch not in self.whole:
            return False
        return not (crowded and self.rides) or self.co_run(batch.segment, batch.slice) is None

    def batch(self, waiting: int) -> int:
        """The size that takes the least time per sample: a full one rather than one of padding."""
        return self._fills[bisect_left(self._fills, waiting, key=itemgetter(1))][0]

    @property
    def cuts(self) -> frozenset[int]:
        return frozenset(self._segments.values()) if self.rides else frozenset({1})

    @property
    def co_runs(self) -> tuple[CoRun, ...]:
        riding = self._co_runs.items() if self.rides else ()
        return tuple(
            CoRun(segment=shape, slice=size, config=config)
            for (shape, size), config in riding
            if config is not None and shape.segments in self.cuts
        ) + tuple(self.whole)

    def predicted_us(self, batch: int, waiting: int) -> float:
        """Until a batch of a bucket has run and all that waits is gathered, by slices that ride."""
        return self.costs.steps(self.steps(batch, waiting)).us

    def steps(self, batch: int, waiting: int) -> tuple[StepShape, ...]:
        """What is launched until then, where nothing else arrives."""
        steps: tuple[StepShape, ...] = ()
        cut = self._cut(batch, waiting)
        for shape in SegmentShape.all_of(cut, batch):
            steps += (self._step(shape, waiting),)
            waiting = left_after(steps[-1], waiting)
        return steps + alone(self._slices, waiting)

    def _step(self, shape: SegmentShape, waiting: int) -> StepShape:
        if not waiting:
            return StepShape(segment=shape, slice=None)
        most = self.slice_beside(shape, waiting)
        size = fitting(self._slices, min(waiting, most.samples))
        return StepShape(segment=shape, slice=size, co_run=self.co_run(shape, size))

    def _shapes(self) -> Iterable[SegmentShape]:
        for batch in self.batch_buckets:
            for segments in self._cuts:
                for index in range(segments):
                    yield SegmentShape(segments=segments, index=index, batch=batch)

    def _cut(self, batch: int, waiting: int) -> int:
        return self._segments[batch, self._rung(waiting)]

    def _riding_gain(self) -> float:
        """How many times as long as a full batch with a full slice beside its segments one takes
        that is whole; infinite where there is none.
        """
        largest = self.batch_buckets[-1]
        whole = [batch for batch in self.whole if batch.segment.batch == largest]
        if not whole or 1 not in self._cuts:
            return math.inf
        riding_us = self.predicted_us(largest, largest)
        return min(map(self._whole_us, whole)) / riding_us if riding_us else 1.0

    def _rung(self, waiting: int) -> int:
        return self._pending[min(bisect_left(self._pending, waiting), len(self._pending) - 1)]

    def _best_cut(self, batch: int, waiting: int) -> int:
        def cost(segments: int) -> tuple[float, float]:
            first = SegmentShape(segments=segments, index=0, batch=batch)
            return self._rest(first, waiting)[0].cost.least_first()

        return min(self._cuts, key=cost)

    def _cheapest(self, shape: SegmentShape | None, waiting: int) -> "tuple[_Choice, ...]":
        """What may be launched beside a segment, with the cost from there on: the best first.

        Any of them may be best behind the steps before, which the host or the device may bound. A
        slice is launched whenever something waits: nobody waits longer than a step for that.
        """
        if shape is None:
            return (_Choice(self._alone(waiting).times(self._weight(0, waiting))),)
        weight, coming = self._weight(shape.batch, waiting), self._coming(shape)
        if not waiting:
            own = self.costs.segment(shape).times(weight)
            rests = self._rest(shape.next, coming)
            return _undominated([_Choice(own + rest.cost) for rest in rests])
        most = fitting(self._slices, waiting)
        return _undominated(
            [
                _Choice(self._best(shape, size)[0].times(weight) + rest.cost, size)
                for size in self._slices
                if size.samples <= most.samples
                for rest in self._rest(shape.next, max(waiting - size.samples, 0) + coming)
            ]
        )

    def _worth_filling(self) -> list[tuple[int, int]]:
        """Sizes of whole batches, and up to how many samples that wait each takes less time for its
        own than the next one does for all. The largest has no bound.
        """
        whole = self.whole if 1 in self._cuts else ()
        times_us = {batch.segment.batch: self._whole_us(batch) for batch in whole}
        sizes, least = sorted(times_us), 0
        fills: list[tuple[int, int]] = []
        for size, larger in pairwise(sizes):
            least = max(int(size * times_us[larger] / times_us[size]), least)
            fills.append((size, least))
        return [*fills, (self.batch_buckets[-1], sys.maxsize)]

    def _whole_us(self, batch: CoRun) -> float:
        shape = StepShape(segment=batch.segment, slice=batch.slice, co_run=WHOLE)
        return self.costs.step(shape).us

    def _weight(self, batch: int, waiting: int) -> float:
        """Whom a microsecond costs."""
        return 1.0 if self.objective == "throughput" else float(batch + waiting)

    def _coming(self, shape: SegmentShape) -> int:
        """Samples that arrive during a segment."""
        return 0 if self.objective == "throughput" else shape.batch // shape.segments

    def _alone(self, waiting: int) -> Cost:
        """Slices with nothing beside them."""
        return self.costs.steps(alone(self._slices, waiting))

    def _within(self, batch_buckets: Sequence[int], p99_ms: float | None) -> tuple[int, ...]:
        """The batch sizes that meet the bound, with as much waiting as the batch has."""
        if p99_ms is None:
            return tuple(batch_buckets)
        whole_us = {b: STAYS * self._fastest_us(b) for b in batch_buckets}
        meeting = tuple(b for b in batch_buckets if whole_us[b] <= 1000 * p99_ms)
        if not meeting:
            raise ValueError(
                f"p99 of {p99_ms} ms: two batches of {batch_buckets[0]} samples take "
                f"{whole_us[batch_buckets[0]] / 1000:.3f} ms"
            )
        return meeting

    def _fastest_us(self, batch: int) -> float:
        """The shortest time of a batch with as much waiting, in slices as large as can be."""

        def cost(shape: SegmentShape | None, waiting: int) -> Cost:
            if shape is None:
                return self._alone(waiting)
            if not waiting:
                return self.costs.segment(shape) + cost(shape.next, 0)
            size = fitting(self._slices, waiting)
            left = max(waiting - size.samples, 0)
            return self._best(shape, size)[0] + cost(shape.next, left)

        firsts = [SegmentShape(segments=n, index=0, batch=batch) for n in self._cuts]
        return min(cost(first, batch).us for first in firsts)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A slice to launch beside a segment, or none, and the cost of all from there on."""

    cost: Cost
    size: SliceBucket | None = None


def _undominated(choices: Sequence[_Choice]) -> tuple[_Choice, ...]:
    """Those that no other beats on the device and on the host, the best first."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost.device_us, c.cost.launch_us)):
        if not kept or choice.cost.launch_us < kept[-1].cost.launch_us:
            kept.append(choice)
    return tuple(sorted(kept, key=lambda c: c.cost.least_first()))


def _measured_cuts(
    table: ProfileTable, batch: int, allowed: Sequence[int] | None
) -> tuple[int, ...]:
    """The cuts that were measured; ProfileMiss if none of those that may be was."""
    measured = {row.segments for row in table.rows if row.segments is not None}
    cuts = measured if allowed is None else measured & {*allowed}
    if not cuts:
        finest = max(allowed or (1,))
        table.time_us(segment_key(SegmentShape(segments=finest, index=0, batch=batch)))
    return tuple(sorted(cuts))


def _pending_sizes(slices: Sequence[SliceBucket], largest_batch: int) -> tuple[int, ...]:
    """How many samples may wait, in steps: none, the slices, and on to a batch."""
    sizes = {0, *(size.samples for size in slices)}
    beyond = ladder(max(largest_batch, slices[-1].samples), slices[-1].samples)
    return tuple(sorted(sizes | {*beyond}))
