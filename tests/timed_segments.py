"""A device that takes as long as a profile table says, and no processor."""

import threading
import time
from typing import Any

import jax
import numpy as np

from recflow_jax.config import DLRMConfig
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.profiles import versions
from recflow_jax.engine.stages import BatchState
from recflow_jax.measure.instant import InstantSegments
from scheduling import CoRun, ProfileTable, SegmentShape
from scheduling.costs import segment_key, slice_key
from test_profiles import row


class _Due:
    """Ready at its time on the clock of `time.perf_counter`."""

    def __init__(self, due_s: float, values: np.ndarray) -> None:
        self._due_s, self._values = due_s, values

    def copy_to_host_async(self) -> None:
        """With the result."""

    def block_until_ready(self) -> None:
        time.sleep(max(self._due_s - time.perf_counter(), 0))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values


class TimedSegments(InstantSegments):
    """A slice takes 400 us and 20 per sample, a batch 800 and 40, split evenly among segments."""

    def __init__(self, config: DLRMConfig, options: EngineOptions) -> None:
        super().__init__(config, options)
        self._free_s = 0.0
        self._lock = threading.Lock()
        self._zeros = np.zeros((options.max_batch, config.outputs), np.float32)
        self._well = np.ones(options.max_batch, bool)

    def table(self) -> ProfileTable:
        """What `recflow profile` would measure."""
        shapes = [
            s for cut in self.cuts for b in self.batch_buckets for s in SegmentShape.all_of(cut, b)
        ]
        times = {slice_key(b): _slice_us(b.samples) for b in self.slice_buckets}
        times |= {segment_key(s): _segment_us(s) for s in shapes}
        return ProfileTable(
            device=jax.devices()[0].device_kind,
            backend=self.backend.name,
            versions=versions(),
            model=self.config.name,
            fingerprint=self.config.fingerprint,
            created="x",
            rows=tuple(row(us, **_fields(key)) for key, us in times.items()),
        )

    def embed(self, state: BatchState, packed: Any) -> BatchState:
        (size,) = (b for b in self.slice_buckets if self.staging.shape(b).length == len(packed))
        landed = self._after(_slice_us(size.samples), self._well)
        return BatchState(vectors=None, dense=None, landed=landed)

    def start(self, shape: SegmentShape, state: BatchState) -> Any:
        return self._after(_segment_us(shape)), state

    def run(self, shape: SegmentShape, x: Any) -> Any:
        return self._after(_segment_us(shape))

    def run_whole(self, cell: CoRun, packed: Any) -> Any:
        us = _slice_us(cell.slice.samples) + _segment_us(cell.segment)
        return self._after(us)

    def _after(self, us: float, values: np.ndarray | None = None) -> _Due:
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + us / 1e6
            return _Due(self._free_s, self._zeros if values is None else values)


def _slice_us(samples: int) -> float:
    return 400.0 + 20 * samples


def _segment_us(shape: SegmentShape) -> float:
    return (800.0 + 40 * shape.batch) / shape.segments


def _fields(key: Any) -> dict[str, Any]:
    names = ("kind", "segments", "segment", "batch", "slice_samples", "slice_ids")
    return {name: getattr(key, name) for name in names}
