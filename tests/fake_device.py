"""A device and a host of round numbers, and a policy that is watched."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scheduling import (
    HostCosts,
    Part,
    PipelineConfig,
    Policy,
    Request,
    Segment,
    SegmentShape,
    Slice,
    SliceBucket,
    Step,
)
from scheduling.pipeline import Action, Event, Launch

FREE = HostCosts(launch_us=0, sample_us=0, id_us=0, byte_us=0, answer_us=0)


class FlatTimes:
    """A slice and a segment take so long, plus so long per row of their bucket; both, the sum."""

    def __init__(self, slice_us: float, segment_us: float, per_row_us: float = 0) -> None:
        self.slice_us, self.segment_us, self.per_row_us = slice_us, segment_us, per_row_us

    def step_us(self, step: Step) -> float:
        us = 0.0
        if step.slice:
            us += self.slice_us + self.per_row_us * step.slice.bucket.samples
        if step.segment:
            us += self.segment_us + self.per_row_us * step.segment.shape.batch
        return us


class Watched:
    """A policy whose steps are kept, and when it was asked for them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps: list[Step] = []
        self.asked_us: list[int] = []

    def step(self, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        self.asked_us.append(now_us)
        actions = self.policy.step(now_us, events)
        self.steps += [action.step for action in actions if isinstance(action, Launch)]
        return actions

    @property
    def next_deadline_us(self) -> int | None:
        return self.policy.next_deadline_us

    @property
    def can_launch(self) -> bool:
        return self.policy.can_launch

    @property
    def is_crowded(self) -> bool:
        return self.policy.is_crowded

    @property
    def idle(self) -> bool:
        return self.policy.idle


def request(
    id: int, arrived_us: int = 0, samples: int = 1, ids: int = 1, deadline_us: int | None = None
) -> Request:
    """Samples of `ids` ids each."""
    offsets = np.arange(samples + 1) * ids
    values: dict[str, Any] = {"arrived_us": arrived_us, "deadline_us": deadline_us}
    return Request(id=id, samples=samples, id_offsets=offsets, **values)


def step(
    segment: SegmentShape | None, slice: SliceBucket | None, co_run: str | None = None
) -> Step:
    """A segment, a slice of one sample with 15 ids, or both."""
    parts = (Part(request_id=0, start=0, stop=1),)
    return Step(
        id=0,
        slice=slice and Slice(batch_id=1, row=0, parts=parts, samples=1, ids=15, bucket=slice),
        segment=segment and Segment(batch_id=0, shape=segment, samples=1),
        co_run=co_run,
    )


def config(**sizes: Any) -> PipelineConfig:
    """Batches of 4 or 8 rows, slices of 2 samples with 20 ids or 4 with 40, two segments."""
    values: dict[str, Any] = {
        "batch_buckets": (4, 8),
        "slice_buckets": (SliceBucket(samples=2, ids=20), SliceBucket(samples=4, ids=40)),
        "segments": 2,
    }
    return PipelineConfig(**values | sizes)
