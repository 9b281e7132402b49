"""What a step costs on the device, by a profile table; and the table's keys."""

from functools import cache
from typing import Protocol, runtime_checkable

from scheduling.request import SegmentShape, SliceBucket, Step, StepShape
from scheduling.table import ProfileKey, ProfileTable

SERIAL = "serial"
CO_RUN = "co-run"


class StepCosts:
    """Times of steps in microseconds, from a table: one after the other, or by the best co-run.

    Raises ProfileMiss for a slice or a segment that was not measured.
    """

    def __init__(self, table: ProfileTable) -> None:
        self._table = table
        self._configs = sorted({row.config for row in table.rows if row.scheme == CO_RUN})

    @property
    def pairs(self) -> set[tuple[SegmentShape, SliceBucket]]:
        """The steps that were measured, by whatever scheme."""
        return {_pair(row) for row in self._table.rows if row.kind == "step"}

    def slice_us(self, size: SliceBucket) -> float:
        """A slice alone."""
        return self._table.time_us(slice_key(size))

    def segment_us(self, shape: SegmentShape) -> float:
        """A segment alone."""
        return self._table.time_us(segment_key(shape))

    def serial_us(self, shape: SegmentShape, size: SliceBucket) -> float:
        """Segment and slice, launched one after the other: as measured, or their sum."""
        key = step_key(shape, size)
        if self._table.has(key):
            return self._table.time_us(key)
        return self.segment_us(shape) + self.slice_us(size)

    def co_runs_us(self, shape: SegmentShape, size: SliceBucket) -> dict[str, float]:
        """The co-runs that were measured, by their configs."""
        keys = {c: step_key(shape, size, scheme=CO_RUN, config=c) for c in self._configs}
        return {c: self._table.time_us(key) for c, key in keys.items() if self._table.has(key)}

    def step_us(self, step: StepShape) -> float:
        """Whatever a step has, by its own scheme; a co-run, too, has to be measured."""
        if step.segment and step.slice:
            return self._pair_us(step.segment, step.slice, step.co_run)
        if step.segment:
            return self.segment_us(step.segment)
        return self.slice_us(step.slice) if step.slice else 0.0

    def best(self, shape: SegmentShape, size: SliceBucket) -> tuple[float, str | None]:
        """The shortest time of a step, and the config if it is a co-run's."""
        serial = (self.serial_us(shape, size), None)
        co_runs = [(us, config) for config, us in self.co_runs_us(shape, size).items()]
        return min([serial, *co_runs], key=lambda timed: timed[0])

    def _pair_us(self, shape: SegmentShape, size: SliceBucket, co_run: str | None) -> float:
        if co_run is None:
            return self.serial_us(shape, size)
        return self._table.time_us(step_key(shape, size, scheme=CO_RUN, config=co_run))


@runtime_checkable
class StepTimes(Protocol):
    """How long the device takes for a step, once it starts."""

    def step_us(self, step: Step) -> float:
        """Microseconds."""
        ...


class TableTimes:
    """Every step takes the median time of its scheme in a profile table; each is looked up once.

    Raises ProfileMiss as `StepCosts` does.
    """

    def __init__(self, table: ProfileTable) -> None:
        self._known_us = cache(StepCosts(table).step_us)

    def step_us(self, step: Step) -> float:
        return self._known_us(step.shape)


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
