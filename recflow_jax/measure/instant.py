"""A device that is done at once and computes nothing: what is left is the host's work."""

import time
from collections.abc import Sequence
from threading import get_ident
from typing import Any

import numpy as np

from recflow_jax.backend import choose_backend
from recflow_jax.config import DLRMConfig
from recflow_jax.console import Missing
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.prepared import Prepared
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.stages import BatchState
from recflow_jax.engine.staging import Buffer, Staging
from recflow_jax.layout import Layout
from scheduling.request import CoRun, SegmentShape, SliceBucket


class InstantSegments(Segments):
    """Segments of a model whose scores are all zero, and clocks of the threads that run them.

    They have no parameters: tables of any size cost nothing.
    """

    def __init__(self, config: DLRMConfig, options: EngineOptions) -> None:
        self.config = config
        self.options = options
        self.backend = choose_backend("xla")
        self.layout = Layout.of(config)
        self.batch_buckets = options.batch_buckets
        self.slice_buckets = options.slice_buckets(config)
        self.staging = self._clocked = _ClockedStaging(config, self.layout)
        self._scores = _Ready(np.zeros((options.max_batch, config.outputs), np.float32))
        self._landed = _Ready(np.ones(options.max_batch, bool))
        self._state = BatchState(vectors=None, dense=None, landed=self._landed)

    def new_state(self) -> BatchState:
        return self._state

    def embed(self, state: BatchState, packed: Any) -> BatchState:
        return state

    def start(self, shape: SegmentShape, state: BatchState) -> Any:
        return self._scores, state

    def run(self, shape: SegmentShape, x: Any) -> Any:
        return self._scores

    def run_whole(self, cell: CoRun, packed: Any) -> Any:
        return self._scores

    def upload(self, packed: Any) -> Any:
        return packed

    def bring_back(self, scores: Any) -> None:
        """They are there."""

    def compile_all(self, progress: bool | None = None, **what: Any) -> None:
        """There is nothing to compile."""

    def clocks_us(self) -> dict[str, float]:
        """Processor time so far, by stage, of the caller and of threads that have run a request."""
        launcher_us = _processor_us(self._clocked.thread)
        return {
            "submit_us": _processor_us(get_ident()),
            "pack_us": self._clocked.packing_us,
            "launch_us": launcher_us - self._clocked.packing_us,
            "resolve_us": _processor_us(self._scores.thread),
        }


class _Ready:
    """Results that are there already; knows the thread that waits for them."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.thread = 0

    def copy_to_host_async(self) -> None:
        """They are there."""

    def block_until_ready(self) -> None:
        self.thread = get_ident()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values


class _ClockedStaging(Staging):
    """Knows how long packing took, and on which thread."""

    packing_us = 0.0
    thread = 0

    def pack(
        self, bucket: SliceBucket, row: int, parts: Sequence[Prepared], **options: Any
    ) -> Buffer:
        self.thread, started_ns = get_ident(), time.thread_time_ns()
        buffer = super().pack(bucket, row, parts, **options)
        self.packing_us += (time.thread_time_ns() - started_ns) / 1000
        return buffer


def _processor_us(thread: int) -> float:
    if not hasattr(time, "pthread_getcpuclockid"):
        raise Missing("the host's stages need the clocks of single threads, which Linux has")
    return time.clock_gettime(time.pthread_getcpuclockid(thread)) * 1e6
