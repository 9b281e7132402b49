"""What flows through the scheduler: requests come in; slices, segments and steps go out.

A *request* asks for the scores of some samples. The scheduler cuts it into *parts*, packs parts of
many requests into *slices* (embedding work) and collects slices in a *batch*, which then runs
through its *segments* (bottom MLP, interaction, top MLP). One *step* launches a slice of one
batch beside a segment of the batch before it.

What is made anew for each request is not frozen, which would take three times as long to make.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

INT64 = np.dtype(np.int64)  # comparing with the type takes several times as long


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Some samples to be scored together, known here only by their sizes.

    `id_offsets`, int64 [samples + 1], counts the sparse ids of all features before each sample
    and starts at 0; `ids` are those of all samples: who gives them vouches for the offsets, which
    are not looked at. Lower `priority` runs first. Times are microseconds on the caller's clock.
    Raises ValueError for a request of no samples and for offsets of another form.
    """

    id: int
    samples: int
    id_offsets: np.ndarray
    priority: int = 0
    deadline_us: int | None = None
    arrived_us: int = 0
    ids: int = -1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"request {self.id}: samples is {self.samples}, not at least 1")
        if self.ids < 0:
            self.ids = self._checked_ids()

    def _checked_ids(self) -> int:
        offsets = self.id_offsets
        if offsets.dtype != INT64 or offsets.shape != (self.samples + 1,):
            raise ValueError(
                f"request {self.id}: id_offsets is {offsets.dtype}{list(offsets.shape)}, "
                f"not int64{[self.samples + 1]}"
            )
        if offsets.item(0) != 0:
            raise ValueError(f"request {self.id}: id_offsets starts at {offsets[0]}, not at 0")
        falls = offsets[1:] < offsets[:-1]
        if np.count_nonzero(falls):
            raise ValueError(f"request {self.id}: id_offsets falls at sample {falls.argmax()}")
        return offsets.item(-1)


@dataclass(slots=True, kw_only=True)
class Part:
    """Samples [start, stop) of a request."""

    request_id: int
    start: int
    stop: int

    @property
    def samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceBucket:
    """The static shape of a slice: room for so many samples with so many sparse ids in all."""

    samples: int
    ids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentShape:
    """The static shape of segment `index` of a batch of `batch` rows, cut into `segments`."""

    segments: int
    index: int
    batch: int

    @classmethod
    def all_of(cls, segments: int, batch: int) -> "list[SegmentShape]":
        """All segments of a batch, in their order."""
        return [cls(segments=segments, index=index, batch=batch) for index in range(segments)]

    @property
    def last(self) -> bool:
        return self.index == self.segments - 1

    @property
    def next(self) -> "SegmentShape | None":
        """The segment behind it; None behind the last."""
        return None if self.last else replace(self, index=self.index + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoRun:
    """The static shape of a step whose slice runs inside its segment's launches.

    `config` says how.
    """

    segment: SegmentShape
    slice: SliceBucket
    config: str


WHOLE = "whole"
"""The config of a co-run of a batch's only slice and its only segment."""


def whole_batches(
    batch_buckets: Sequence[int], slice_buckets: Sequence[SliceBucket]
) -> frozenset[CoRun]:
    """Of each size of batches that slices have too."""
    return frozenset(
        CoRun(
            segment=SegmentShape(segments=1, index=0, batch=size.samples), slice=size, config=WHOLE
        )
        for size in slice_buckets
        if size.samples in batch_buckets
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The static shape of a step: what its time on the device depends on."""

    segment: SegmentShape | None
    slice: SliceBucket | None
    co_run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Embedding work of one step.

    The pooled rows of `parts`, in this order, land at rows [row, row + samples) of the batch's
    buffer. The padding writes up to row + bucket.samples, where the next slice writes after it.
    """

    batch_id: int
    row: int
    parts: tuple[Part, ...]
    samples: int
    ids: int
    bucket: SliceBucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment of a batch of `samples` rows, padded to `shape.batch` rows.

    The last segment names whose answers it makes: `parts` is then every (row, part) of the batch,
    by ascending row; a segment before the last has none.
    """

    batch_id: int
    shape: SegmentShape
    samples: int
    parts: tuple[tuple[int, Part], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is launched together: a slice of batch n + 1, a segment of batch n, or both.

    co_run: the config that runs them in one executable; None where they run one after the other. By
    WHOLE both are of the same batch, and all that there is of it.
    Steps are numbered from 0 in the order of their launch, batches likewise.
    """

    id: int
    slice: Slice | None
    segment: Segment | None
    co_run: str | None = None

    @property
    def shape(self) -> StepShape:
        """Its static shape."""
        return StepShape(
            segment=self.segment and self.segment.shape,
            slice=self.slice and self.slice.bucket,
            co_run=self.co_run,
        )
