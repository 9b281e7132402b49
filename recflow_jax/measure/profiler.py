"""Times the compiled pieces of a model on this device: slices, segments, and steps of both.

Inputs lie on the device and calls are queued, so that what is timed is the device's work; or the
launch, where the host takes longer, and the kernels are then timed by themselves. Slices rotate
among input sets; segments find what the one before left.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.data.workloads import generate
from recflow_jax.engine.segments import Segments
from recflow_jax.measure.timing import (
    Timed,
    Timing,
    TimingOptions,
    kernels_us,
    launch_us,
    measure_side_by_side,
)
from scheduling import (
    CoRun,
    ProfileKey,
    ProfileRow,
    ProfileTable,
    SegmentShape,
    SliceBucket,
    StepShape,
)
from scheduling.costs import CO_RUN, segment_key, slice_key, step_key

PACKED_SETS = 4
AHEAD = 8  # launches in a row that no device has done before the last of them
HOST_BOUND = 1.15  # times its kernels: calls in a row that take longer wait for the host


class Profiler:
    """Times the compiled pieces of one model. What it is to time has to be compiled."""

    def __init__(self, segments: Segments, *, ids: str, seed: int, timing: TimingOptions) -> None:
        self.segments = segments
        self.timing = timing
        self._ids = ids
        self._seed = seed
        self._filling = segments.new_state()
        self._running = segments.new_state()
        self._has_vectors = False
        self._packed: dict[SliceBucket, list[jax.Array]] = {}
        self._activations: dict[SegmentShape, Any] = {}

    def slice_rows(self, bucket: SliceBucket) -> list[ProfileRow]:
        """The row of one slice size."""
        return self._rows({slice_key(bucket): StepShape(segment=None, slice=bucket)})

    def segment_rows(self, segments: int, batch: int) -> list[ProfileRow]:
        """The rows of all segments of one cut of one batch size."""
        return [
            row
            for shape in SegmentShape.all_of(segments, batch)
            for row in self._rows({segment_key(shape): StepShape(segment=shape, slice=None)})
        ]

    def step_rows(
        self, shape: SegmentShape, bucket: SliceBucket, rides: Iterable[str]
    ) -> list[ProfileRow]:
        """The rows of a segment beside a slice: launched one after the other, and by each ride."""
        steps = {step_key(shape, bucket): StepShape(segment=shape, slice=bucket)}
        for ride in rides:
            key = step_key(shape, bucket, scheme=CO_RUN, config=ride)
            steps[key] = StepShape(segment=shape, slice=bucket, co_run=ride)
        return self._rows(steps)

    def launch_factor(self, table: ProfileTable) -> float:
        """How many times as long launches take here as where the table was made: the median over
        its smallest slice and segments; 1 for a table that does not know. Raises ProfileMiss for
        one without these sizes.
        """
        here = self.slice_rows(self.segments.slice_buckets[0])
        for cut in self.segments.cuts:
            here += self.segment_rows(cut, self.segments.batch_buckets[0])
        there_us = [table.row(row.key).launch_us for row in here]
        if not all(there_us):
            return 1.0
        return median(row.launch_us / us for row, us in zip(here, there_us, strict=True))

    def launch(self, steps: Iterable[StepShape], i: int) -> Any:
        """Queues steps one after the other, each as its scheme says; what the last one gives."""
        result: Any = None
        for step in steps:
            result = self._launch(step, i)
        return result

    def _launch(self, step: StepShape, i: int) -> Any:
        if step.segment and step.slice and step.co_run:
            cell = CoRun(segment=step.segment, slice=step.slice, config=step.co_run)
            return self._co_run(cell, i)
        ran = self._run(step.segment) if step.segment else None
        return (ran, self._embed(step.slice, i)) if step.slice else ran

    def _rows(self, steps: Mapping[ProfileKey, StepShape]) -> list[ProfileRow]:
        """Of steps that take turns."""
        timed = {key: Timed(launch=partial(self._launch, step)) for key, step in steps.items()}
        timings = measure_side_by_side({str(key): one for key, one in timed.items()}, self.timing)
        return [_row(key, timings[str(key)], one) for key, one in timed.items()]

    def _embed(self, bucket: SliceBucket, i: int) -> Any:
        self._filling = self.segments.embed(self._filling, self._input(bucket, i))
        return self._filling.landed

    def _run(self, shape: SegmentShape) -> Any:
        if shape.index:
            return self.segments.run(shape, self._before(shape))
        self._fill()
        x, self._running = self.segments.start(shape, self._running)
        return x

    def _co_run(self, cell: CoRun, i: int) -> Any:
        packed = self._input(cell.slice, i)
        if cell.segment.index:
            before = self._before(cell.segment)
            x, self._filling = self.segments.run_with(cell, before, self._filling, packed)
            return x
        self._fill()
        states = (self._running, self._filling)
        x, self._running, self._filling = self.segments.start_with(cell, *states, packed)
        return x

    def _before(self, shape: SegmentShape) -> Any:
        """What the segment before gives."""
        if shape not in self._activations:
            before = SegmentShape.all_of(shape.segments, shape.batch)[shape.index - 1]
            self._activations[shape] = self._run(before)
        return self._activations[shape]

    def _fill(self) -> None:
        """Real embeddings in all rows: matrix products of zeros are faster than others."""
        if self._has_vectors:
            return
        self._has_vectors = True
        bucket = self.segments.slice_buckets[-1]
        for row in range(0, self.segments.batch_buckets[-1] - bucket.samples + 1, bucket.samples):
            packed = self._pack(bucket, row, self._seed)
            self._running = self.segments.embed(self._running, packed)

    def _input(self, bucket: SliceBucket, i: int) -> jax.Array:
        if bucket not in self._packed:
            seeds = range(self._seed, self._seed + PACKED_SETS)
            self._packed[bucket] = [jax.device_put(self._pack(bucket, 0, s)) for s in seeds]
        return self._packed[bucket][i % PACKED_SETS]

    def _pack(self, bucket: SliceBucket, row: int, seed: int) -> np.ndarray:
        batch = generate(self.segments.config, bucket.samples, seed=seed, ids=self._ids)
        samples = self.segments.preparer.prepare(_fitting(batch, bucket.ids))
        return self.segments.staging.pack(bucket, row, [samples]).array


def _fitting(batch: JaggedBatch, ids: int) -> JaggedBatch:
    """As many of the first samples as have at most `ids` ids."""
    fitting = int((batch.id_offsets[1:] <= ids).sum())
    return batch.part(0, fitting)


def on_device(timing: Timing, timed: Timed) -> Timing:
    """What the device takes: as timed or, where it waits for the host, its kernels alone."""
    device_us = kernels_us(timed)
    if device_us is None or timing.median_us <= HOST_BOUND * device_us:
        return timing
    return replace(timing, median_us=device_us, p10_us=device_us, p90_us=device_us)


def _row(key: ProfileKey, timing: Timing, timed: Timed) -> ProfileRow:
    """A launch takes as long as the calls in a row, where the device waits for them; else as long
    as the host is busy with one of several.
    """
    device = on_device(timing, timed)
    launching_us = timing.median_us
    if device is timing:
        launching_us = min(launch_us(timed, rounds=5, calls=AHEAD), launching_us)
    return ProfileRow(
        **asdict(key),
        median_us=device.median_us,
        p10_us=device.p10_us,
        p90_us=device.p90_us,
        samples=timing.samples,
        launch_us=launching_us,
    )
