"""Times the compiled pieces of a model on this device: slices, segments, and steps of both.

Inputs lie on the device and calls are queued: what is timed is the device's work, or the launch
where that takes longer. Slices rotate among input sets; segments find what the one before left.
"""

from collections.abc import Callable
from typing import Any

import jax

from recflow_jax.batch import JaggedBatch
from recflow_jax.data.workloads import generate
from recflow_jax.engine.segments import Segments
from recflow_jax.measure.timing import Timed, Timing, TimingOptions, measure
from scheduling import ProfileKey, ProfileRow, SliceBucket, segment_key, slice_key, step_key

PACKED_SETS = 4


class Profiler:
    """Times the compiled pieces of one model."""

    def __init__(self, segments: Segments, *, ids: str, seed: int, timing: TimingOptions) -> None:
        self.segments = segments
        self.timing = timing
        self._ids = ids
        self._seed = seed
        self._state = segments.new_state()
        self._packed: dict[SliceBucket, list[jax.Array]] = {}
        self._activations: dict[int, list[Any]] = {}

    def slice_rows(self, bucket: SliceBucket) -> list[ProfileRow]:
        """The row of one slice size."""
        timing = self._measure(lambda i: self._embed(bucket, i))
        return [_row(slice_key(bucket), timing)]

    def segment_rows(self, batch: int) -> list[ProfileRow]:
        """The rows of all segments of one batch size."""
        timings = [
            self._measure(lambda _, index=index: self._run(index, batch))
            for index in range(self.segments.count)
        ]
        return [_row(segment_key(i, batch), timing) for i, timing in enumerate(timings)]

    def step_rows(self, batch: int, bucket: SliceBucket) -> list[ProfileRow]:
        """The rows of a slice beside each segment, launched one after the other."""
        return [
            _row(step_key(index, batch, bucket), self._measure(self._step(index, batch, bucket)))
            for index in range(self.segments.count)
        ]

    def _measure(self, launch: Callable[[int], Any]) -> Timing:
        return measure(Timed(launch=launch), self.timing)

    def _step(self, index: int, batch: int, bucket: SliceBucket) -> Callable[[int], Any]:
        other = self.segments.new_state()  # of the batch that fills while another one runs

        def launch(i: int) -> Any:
            nonlocal other
            packed = self._inputs(bucket)
            other = self.segments.embed(other, packed[i % len(packed)])
            return other.landed, self._run(index, batch)

        return launch

    def _embed(self, bucket: SliceBucket, i: int) -> Any:
        packed = self._inputs(bucket)
        self._state = self.segments.embed(self._state, packed[i % len(packed)])
        return self._state.landed

    def _run(self, index: int, batch: int) -> Any:
        if batch not in self._activations:
            self._activations[batch] = self._all_activations(batch)
        if index == 0:
            return self.segments.start(self._state, batch)
        return self.segments.run(index, batch, self._activations[batch][index - 1])

    def _all_activations(self, batch: int) -> list[Any]:
        """What each segment but the last gives, for the next one to take."""
        self._fill_state()
        found = [self.segments.start(self._state, batch)]
        for index in range(1, self.segments.count):
            found.append(self.segments.run(index, batch, found[-1]))
        return found

    def _fill_state(self) -> None:
        """Real embeddings in all rows: matrix products of zeros are faster than others."""
        bucket = self.segments.slice_buckets[-1]
        for row in range(0, self.segments.batch_buckets[-1] - bucket.samples + 1, bucket.samples):
            self._state = self.segments.embed(self._state, self._pack(bucket, row, self._seed))

    def _inputs(self, bucket: SliceBucket) -> list[jax.Array]:
        if bucket not in self._packed:
            seeds = range(self._seed, self._seed + PACKED_SETS)
            self._packed[bucket] = [jax.device_put(self._pack(bucket, 0, s)) for s in seeds]
        return self._packed[bucket]

    def _pack(self, bucket: SliceBucket, row: int, seed: int) -> Any:
        batch = generate(self.segments.config, bucket.samples, seed=seed, ids=self._ids)
        return self.segments.staging.pack(bucket, row, [_fitting(batch, bucket.ids)])


def _fitting(batch: JaggedBatch, ids: int) -> JaggedBatch:
    """As many of the first samples as have at most `ids` ids."""
    fitting = int((batch.id_offsets[1:] <= ids).sum())
    return batch.part(0, fitting)


def _row(key: ProfileKey, timing: Timing) -> ProfileRow:
    return ProfileRow(
        kind=key.kind,
        segment=key.segment,
        batch=key.batch,
        slice_samples=key.slice_samples,
        slice_ids=key.slice_ids,
        scheme=key.scheme,
        config=key.config,
        median_us=timing.median_us,
        p10_us=timing.p10_us,
        p90_us=timing.p90_us,
        samples=timing.samples,
    )
