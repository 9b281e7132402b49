"""What a profile table has to hold, in the order of measuring, and what is ruled out ahead.

A segment and a slice in one executable take at least as long as the longer of the two. Where that
leaves little to gain, and where their sizes are far apart, nothing but their sum is known.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from recflow_jax.measure.profiler import Profiler
from recflow_jax.rides import IN_TURN
from scheduling import CoRun, ProfileKey, ProfileRow, ProfileTable, SegmentShape, SliceBucket
from scheduling.costs import StepCosts, segment_key, slice_key, step_key

NEAR = 4  # times the samples of one another that slice and batch may have
LEAST_GAIN = 0.05  # of the sum
LEAST_US = 25.0  # that a slice takes the device longer than the smallest, for a kernel with it


@dataclass(frozen=True, kw_only=True)
class Job:
    """Rows that are measured and written together: one slice, the segments of a batch, or a step
    by all its rides, which have to be compiled.
    """

    first: ProfileKey
    rows: int
    measure: Callable[[], list[ProfileRow]]
    co_runs: tuple[CoRun, ...] = ()


class Sweep:
    """The jobs of one model's segments, the largest of each kind first: they tell how long it will
    take. quick: no batches but the largest beside slices, which is for trying out.
    """

    def __init__(self, profiler: Profiler, *, quick: bool = False) -> None:
        self._profiler = profiler
        self._segments = profiler.segments
        self._slices = self._segments.slice_buckets[::-1]
        self._batches = self._segments.batch_buckets[::-1]
        self._in_steps = self._batches[:1] if quick else self._batches
        self._rides = [str(ride) for ride in self._segments.rides]

    def alone(self) -> list[Job]:
        """All slices, and all segments of all cuts."""
        slices = [
            Job(first=slice_key(s), rows=1, measure=partial(self._profiler.slice_rows, s))
            for s in self._slices
        ]
        return slices + [
            Job(
                first=segment_key(SegmentShape(segments=cut, index=0, batch=batch)),
                rows=cut,
                measure=partial(self._profiler.segment_rows, cut, batch),
            )
            for batch in self._batches
            for cut in self._segments.cuts
        ]

    def contest(self) -> list[Job]:
        """Every ride, with the largest slice in the largest batch."""
        (shape,) = SegmentShape.all_of(1, self._batches[0])
        return [self._step(shape, self._slices[0], self._rides)] if self._rides else []

    def steps(self, table: ProfileTable) -> list[Job]:
        """What may pay, by the times of its parts and the ride that won the contest."""
        costs, winner = StepCosts(table), self._winner(table)
        found = []
        for shape in self._shapes():
            for size in self._slices if self._rides else ():
                if rides := self._worth_trying(costs, shape, size, winner):
                    found.append(self._step(shape, size, rides))
        return found

    def _shapes(self) -> Iterator[SegmentShape]:
        for cut in self._segments.cuts:
            for batch in self._in_steps:
                yield from SegmentShape.all_of(cut, batch)

    def _step(self, shape: SegmentShape, size: SliceBucket, rides: Sequence[str]) -> Job:
        return Job(
            first=step_key(shape, size),
            rows=1 + len(rides),
            measure=partial(self._profiler.step_rows, shape, size, rides),
            co_runs=tuple(CoRun(segment=shape, slice=size, config=ride) for ride in rides),
        )

    def _winner(self, table: ProfileTable) -> list[str]:
        """The fastest ride with a kernel, if there is one."""
        (shape,) = SegmentShape.all_of(1, self._batches[0])
        costs = StepCosts(table).co_runs(shape, self._slices[0])
        return sorted({*costs} - {IN_TURN}, key=lambda ride: costs[ride].us)[:1]

    def _worth_trying(
        self, costs: StepCosts, shape: SegmentShape, size: SliceBucket, winner: Sequence[str]
    ) -> list[str]:
        """The rides to measure; none for what is best serially for sure, or hardly ever run."""
        if not 1 / NEAR <= size.samples / shape.batch <= NEAR:
            return []
        parts_us = (costs.segment(shape).us, costs.slice(size).us)
        if min(parts_us) < LEAST_GAIN * sum(parts_us):
            return []
        smallest_us = costs.slice(self._slices[-1]).device_us
        is_work = costs.slice(size).device_us - smallest_us >= LEAST_US
        if shape.segments > 1 and not is_work:
            return []
        return [IN_TURN, *(winner if is_work else ())]
