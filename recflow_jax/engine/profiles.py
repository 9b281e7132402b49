"""A profile table in an engine: is it of this device and model, how long does a request take."""

from importlib.metadata import version
from pathlib import Path

import jax

from recflow_jax.engine.segments import Segments
from scheduling.buckets import smallest_holding
from scheduling.costs import segment_key, slice_key
from scheduling.request import SegmentShape
from scheduling.table import ProfileKey, ProfileMiss, ProfileTable


def versions() -> dict[str, str]:
    """The versions that a profile table is bound to."""
    return {name: version(name) for name in ("jax", "jaxlib")}


def load_profile(profile: str | Path | ProfileTable, segments: Segments) -> ProfileTable:
    """The table, if it was made for these segments on this device; ProfileTableError if not."""
    table = profile if isinstance(profile, ProfileTable) else ProfileTable.load(profile)
    table.check(
        device=jax.devices()[0].device_kind,
        backend=segments.backend.name,
        fingerprint=segments.config.fingerprint,
        versions=versions(),
    )
    return table


class IdleTimes:
    """How long a request takes, in microseconds, at least: on an engine with nothing else to do."""

    def __init__(self, table: ProfileTable, segments: Segments) -> None:
        self._table = table
        self._segments = segments
        self._slice_us = {b: self._time_us(slice_key(b)) for b in segments.slice_buckets}
        self._batch_us = {b: self._batch_time_us(b) for b in segments.batch_buckets}

    def least_us(self, samples: int, ids: int) -> float:
        """One slice and the segments of one batch, each of the smallest bucket that is needed.

        A request that needs several takes longer than that, never less.
        """
        holding = (b for b in self._slice_us if b.samples >= samples and b.ids >= ids)
        bucket = next(holding, self._segments.slice_buckets[-1])
        batch = smallest_holding([*self._batch_us], min(samples, [*self._batch_us][-1]))
        return self._slice_us[bucket] + self._batch_us[batch]

    def _batch_time_us(self, bucket: int) -> float:
        cuts = [SegmentShape.all_of(segments, bucket) for segments in self._segments.cuts]
        times_us = [[self._time_us(segment_key(shape)) for shape in cut] for cut in cuts]
        return min((sum(cut) for cut in times_us if all(cut)), default=0.0)

    def _time_us(self, key: ProfileKey) -> float:
        """0 for what was not measured: nothing is rejected on a guess."""
        try:
            return self._table.between(key).median_us
        except ProfileMiss:
            return 0.0
