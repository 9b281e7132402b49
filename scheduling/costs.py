"""What a step costs: on the device by measured times, on the host by a few rates."""

import math
from dataclasses import dataclass, fields
from typing import Protocol

from scheduling.request import Segment, Slice, SliceBucket, Step
from scheduling.table import MissPolicy, ProfileKey, ProfileTable


class StepTimes(Protocol):
    """How long the device takes for a step, once it starts."""

    def step_us(self, step: Step) -> float:
        """Microseconds."""
        ...


class TableTimes:
    """Median times of a profile table; each is looked up once.

    `miss` is what becomes of a slice or a segment that was not measured, as in
    `ProfileTable.time_us`. A step of both that was not measured as such takes what the two take one
    after the other.
    """

    def __init__(self, table: ProfileTable, miss: MissPolicy = "error") -> None:
        self._table = table
        self._miss: MissPolicy = miss
        self._known: dict[tuple[SliceBucket | None, tuple[int, int] | None], float] = {}

    def step_us(self, step: Step) -> float:
        """Raises ProfileMiss as the miss policy says."""
        segment = step.segment and (step.segment.index, step.segment.bucket)
        key = (step.slice and step.slice.bucket, segment)
        if key not in self._known:
            self._known[key] = self._look_up(step.slice, step.segment)
        return self._known[key]

    def _look_up(self, piece: Slice | None, segment: Segment | None) -> float:
        keys = []
        if piece:
            keys.append(slice_key(piece.bucket))
        if segment:
            keys.append(segment_key(segment.index, segment.bucket))
        if piece and segment:
            both = step_key(segment.index, segment.bucket, piece.bucket)
            if self._table.has(both):
                keys = [both]
        return sum(self._table.time_us(key, miss=self._miss) for key in keys)


def slice_key(bucket: SliceBucket) -> ProfileKey:
    """The key of a slice."""
    return ProfileKey(kind="slice", slice_samples=bucket.samples, slice_ids=bucket.ids)


def segment_key(index: int, batch: int) -> ProfileKey:
    """The key of a segment of a batch size."""
    return ProfileKey(kind="segment", segment=index, batch=batch)


def step_key(index: int, batch: int, bucket: SliceBucket) -> ProfileKey:
    """The key of a segment with a slice beside it."""
    return ProfileKey(
        kind="step",
        segment=index,
        batch=batch,
        slice_samples=bucket.samples,
        slice_ids=bucket.ids,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """What the engine's host side takes, in microseconds. Raises ValueError for what is none.

    launch_us: the launcher's thread, for each slice and each segment of a step.
    sample_us, id_us: the launcher's thread, for each sample and each id that it packs.
    byte_us: the copy of a slice's buffer, `bytes_per_sample` and `bytes_per_id` for all that its
        bucket has room for. It keeps the step from starting, not the launcher from going on.
    answer_us: from a step's end on the device until the launcher and those who asked know of it.

    The defaults are orders of magnitude of a server with a PCIe GPU (12 GB/s from pageable memory).
    """

    launch_us: float = 20.0
    sample_us: float = 0.05
    id_us: float = 0.0005
    byte_us: float = 1 / 12_000
    answer_us: float = 30.0
    bytes_per_sample: int = 0
    bytes_per_id: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"host costs: {field.name} is {value}, not 0 or more")

    def launching_us(self, step: Step) -> float:
        """How long the launcher's thread is busy with a step."""
        launches = (step.slice is not None) + (step.segment is not None)
        if step.slice is None:
            return launches * self.launch_us
        packing_us = step.slice.samples * self.sample_us + step.slice.ids * self.id_us
        return launches * self.launch_us + packing_us

    def upload_us(self, step: Step) -> float:
        """How long a step's slice is on its way to the device."""
        if step.slice is None:
            return 0.0
        room = step.slice.bucket
        return self.byte_us * (room.samples * self.bytes_per_sample + room.ids * self.bytes_per_id)
