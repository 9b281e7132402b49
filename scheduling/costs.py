"""What a step costs, by a profile table; and the table's keys."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

from scheduling.request import WHOLE, SegmentShape, SliceBucket, Step, StepShape
from scheduling.table import ProfileKey, ProfileTable

SERIAL = "serial"
CO_RUN = "co-run"


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of steps: of the device that runs them, and of the host that launches them."""

    device_us: float = 0.0
    launch_us: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.device_us + other.device_us, self.launch_us + other.launch_us)

    def times(self, factor: float) -> "Cost":
        """So many times as long."""
        return Cost(self.device_us * factor, self.launch_us * factor)

    @property
    def us(self) -> float:
        """How long they take one behind the other: the host launches while the device runs."""
        return max(self.device_us, self.launch_us)

    def least_first(self) -> tuple[float, float]:
        """To sort by: whichever takes less time; of those that take as long, less work."""
        return self.us, self.device_us + self.launch_us


class StepCosts:
    """What steps cost, by a table: one after the other, or by the best co-run. Slices and segments
    of sizes between two that were measured cost what lies between (`ProfileTable.between`).

    launch_factor: how many times as long launches take on this host as on the table's. Raises
    ProfileMiss for a slice or a segment that was not measured, ValueError for no such factor.
    """

    def __init__(self, table: ProfileTable, *, launch_factor: float = 1.0) -> None:
        if not 0 < launch_factor < math.inf:
            raise ValueError(f"costs: launch_factor is {launch_factor}, not above 0")
        self._table = table
        self._row = cache(table.between)
        self._launch_factor = launch_factor
        self._configs = sorted({row.config for row in table.rows if row.scheme == CO_RUN})

    @property
    def pairs(self) -> set[tuple[SegmentShape, SliceBucket]]:
        """The steps that were measured, by whatever scheme."""
        return {_pair(row) for row in self._table.rows if row.kind == "step"}

    def slice(self, size: SliceBucket) -> Cost:
        """A slice alone."""
        return self._of(slice_key(size))

    def segment(self, shape: SegmentShape) -> Cost:
        """A segment alone."""
        return self._of(segment_key(shape))

    def serial(self, shape: SegmentShape, size: SliceBucket) -> Cost:
        """Segment and slice, launched one after the other: as measured, or their sum."""
        key = step_key(shape, size)
        return self._of(key) if self._table.has(key) else self.segment(shape) + self.slice(size)

    def co_runs(self, shape: SegmentShape, size: SliceBucket) -> dict[str, Cost]:
        """The co-runs that were measured, by their configs."""
        keys = {c: step_key(shape, size, scheme=CO_RUN, config=c) for c in self._configs}
        return {config: self._of(key) for config, key in keys.items() if self._table.has(key)}

    def step(self, step: StepShape) -> Cost:
        """Whatever a step has, by its own scheme. A co-run, too, has to be measured; but a whole
        batch takes what its parts take, and one launch.
        """
        if step.segment and step.slice:
            return self._pair(step.segment, step.slice, step.co_run)
        if step.segment:
            return self.segment(step.segment)
        return self.slice(step.slice) if step.slice else Cost()

    def steps(self, steps: Iterable[StepShape]) -> Cost:
        """All of them, one behind the other."""
        return sum(map(self.step, steps), Cost())

    def best(self, shape: SegmentShape, size: SliceBucket) -> tuple[Cost, str | None]:
        """A step at its fastest, and the config if that is a co-run's."""
        serial = (self.serial(shape, size), None)
        co_runs = [(cost, config) for config, cost in self.co_runs(shape, size).items()]
        return min([serial, *co_runs], key=lambda found: found[0].least_first())

    def _pair(self, shape: SegmentShape, size: SliceBucket, co_run: str | None) -> Cost:
        if co_run is None:
            return self.serial(shape, size)
        if co_run == WHOLE:
            segment, piece = self.segment(shape), self.slice(size)
            launch_us = max(segment.launch_us, piece.launch_us)
            return Cost(segment.device_us + piece.device_us, launch_us)
        return self._of(step_key(shape, size, scheme=CO_RUN, config=co_run))

    def _of(self, key: ProfileKey) -> Cost:
        row = self._row(key)
        return Cost(row.median_us, self._launch_factor * row.launch_us)


@runtime_checkable
class StepTimes(Protocol):
    """How long the device takes for a step, once it starts."""

    def step_us(self, step: Step) -> float:
        """Microseconds."""
        ...


class TableTimes:
    """Every step takes the device's median time of its scheme in a profile table.

    Raises ProfileMiss as `StepCosts` does.
    """

    def __init__(self, table: ProfileTable) -> None:
        self._known = cache(StepCosts(table).step)

    def step_us(self, step: Step) -> float:
        return self._known(step.shape).device_us


def slice_key(size: SliceBucket) -> ProfileKey:
    """The key of a slice."""
    return ProfileKey(kind="slice", slice_samples=size.samples, slice_ids=size.ids)


def segment_key(shape: SegmentShape) -> ProfileKey:
    """The key of a segment."""
    return ProfileKey(
        kind="segment", segments=shape.segments, segment=shape.index, batch=shape.batch
    )


def step_key(
    shape: SegmentShape, size: SliceBucket, *, scheme: str = SERIAL, config: str = ""
) -> ProfileKey:
    """The key of a segment and a slice, one launched after the other or in one executable."""
    return ProfileKey(
        kind="step",
        segments=shape.segments,
        segment=shape.index,
        batch=shape.batch,
        slice_samples=size.samples,
        slice_ids=size.ids,
        scheme=scheme,
        config=config,
    )


def _pair(key: ProfileKey) -> tuple[SegmentShape, SliceBucket]:
    """The segment and the slice of a step."""
    assert key.segments and key.segment is not None and key.batch
    assert key.slice_samples and key.slice_ids
    shape = SegmentShape(segments=key.segments, index=key.segment, batch=key.batch)
    return shape, SliceBucket(samples=key.slice_samples, ids=key.slice_ids)
