"""Segments whose arithmetic can be done by hand, on a device that can be held, broken and watched.

A sample's score is its dense feature + 10 * (the sum of its ids), doubled by the last segment:
2 * (dense + 10 * ids), however a batch is cut. Row r of its table is r until it
is updated.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np

from recflow_jax.backend import choose_backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.stages import BatchState
from recflow_jax.engine.staging import PackedShape, Staging
from recflow_jax.engine.updates import NewRows
from recflow_jax.layout import Layout
from scheduling.request import CoRun, SegmentShape

CONFIG = DLRMConfig(
    name="fake",
    tables=(TableConfig(name="t", rows=1000, dim=4),),
    features=(FeatureConfig(name="f", table="t", bag=BagConfig(mean=2)),),
    dense_width=1,
)
OPTIONS = EngineOptions(
    max_batch=8,
    smallest_batch=2,
    max_slice=4,
    smallest_slice=1,
    max_queued_samples=64,
    max_ids_per_sample=600,
    segments=2,
    max_update_rows=64,
    freeze_heap=False,
)


class DeviceBroke(RuntimeError):
    pass


@cache
def _reader(shape: PackedShape) -> Callable[..., Any]:
    """What a packed slice holds: its first row, its samples, and which of them are well."""
    return jax.jit(lambda packed: (*shape.unpack(packed), shape.are_well(packed)))


class FakeArray:
    """An array that is ready when the device lets it, or raises if what it is made of is lost.

    has_left: whether it was told to come to the host.
    """

    has_left = False

    def __init__(self, device: "FakeSegments", values: np.ndarray, lost: bool = False) -> None:
        self.device, self.values, self.lost = device, values, lost

    def block_until_ready(self) -> None:
        assert self.device.runs.wait(60)
        time.sleep(self.device.takes_s)
        if self.lost:
            raise DeviceBroke("the card fell out")

    def copy_to_host_async(self) -> None:
        self.has_left = True

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.has_left, "whoever asks for it now would wait for all of its way"
        return self.values


class FakeSegments(Segments):
    """`takes_s` is how long a result takes. `hold()` keeps every step from ending until `go_on()`;
    `break_next(what)` makes one dispatch ("embed", "start", "run", "whole", "write") or "upload"
    raise; `lose_next(what)` makes one fail on the device, later.
    """

    def __init__(self, options: EngineOptions = OPTIONS) -> None:
        self.config = CONFIG
        self.options = options
        self.backend = choose_backend("xla")
        self.layout = Layout.of(CONFIG)
        self.batch_buckets = options.batch_buckets
        self.slice_buckets = options.slice_buckets(CONFIG)
        self.staging = Staging(CONFIG, self.layout)
        self.runs = threading.Event()
        self.runs.set()
        self.takes_s = 0.0
        self.table = np.arange(CONFIG.tables[0].rows, dtype=np.float32)
        self.states_made = self.uploads = 0
        self.batches_seen: list[list[float]] = []
        self._break: set[str] = set()
        self._lose: set[str] = set()

    @property
    def count(self) -> int:
        return self.options.finest_cut

    def hold(self) -> None:
        self.runs.clear()

    def go_on(self) -> None:
        self.runs.set()

    def break_next(self, what: str) -> None:
        self._break.add(what)

    def lose_next(self, what: str) -> None:
        self._lose.add(what)

    def new_state(self) -> BatchState:
        self.states_made += 1
        rows = np.zeros(self.batch_buckets[-1], np.float32)
        return BatchState(vectors=FakeArray(self, rows), dense=None, landed=None)

    def embed(self, state: BatchState, packed: np.ndarray) -> BatchState:
        lost = state.vectors.lost or self._is_next("embed")
        (bucket,) = (b for b in self.slice_buckets if self.staging.shape(b).length == len(packed))
        first_row, batch, are_well = _reader(self.staging.shape(bucket))(packed)
        inside = np.clip(batch.rows, 0, len(self.table) - 1)
        sums = np.concatenate([[0], np.cumsum(self.table[inside])])[np.asarray(batch.offsets)]
        row, new = int(first_row), state.vectors.values.copy()
        assert row + bucket.samples <= len(new)
        new[row : row + bucket.samples] = np.asarray(batch.dense)[:, 0] + 10 * np.diff(sums)
        vectors = self._donated(state, lost, new)
        landed = FakeArray(self, np.asarray(are_well), lost)
        return BatchState(vectors=vectors, dense=None, landed=landed)

    def start(self, shape: SegmentShape, state: BatchState) -> Any:
        lost = state.vectors.lost or self._is_next("start")
        values = state.vectors.values
        x = self._segment(shape, FakeArray(self, values[: shape.batch, None].copy(), lost))
        return x, replace(state, vectors=self._donated(state, lost, values))

    def run(self, shape: SegmentShape, x: Any) -> Any:
        lost = x.lost or self._is_next("run")
        assert x.values.shape == (shape.batch, 1)
        return self._segment(shape, FakeArray(self, x.values, lost))

    def start_with(self, cell: CoRun, state: BatchState, filling: BatchState, packed: Any) -> Any:
        self._check(cell, packed)
        return *self.start(cell.segment, state), self.embed(filling, packed)

    def run_with(self, cell: CoRun, x: Any, filling: BatchState, packed: Any) -> Any:
        self._check(cell, packed)
        return self.run(cell.segment, x), self.embed(filling, packed)

    def run_whole(self, cell: CoRun, packed: Any) -> Any:
        self._check(cell, packed)
        state = self.embed(self.new_state(), packed)
        lost = state.vectors.lost or self._is_next("whole")
        values = state.vectors.values[: cell.segment.batch, None].copy()
        shape = self.staging.shape(cell.slice)
        if shape.bases and packed[shape.places["fixed_samples"]] >= 0:
            values[~state.landed.values] = np.nan
        return self._segment(cell.segment, FakeArray(self, values, lost))

    def upload(self, packed: np.ndarray) -> np.ndarray:
        self._is_next("upload")
        self.uploads += 1
        return packed

    def bring_back(self, scores: Any) -> None:
        scores.copy_to_host_async()

    def write_rows(self, new: NewRows) -> FakeArray:
        lost = self._is_next("write")
        self.table[np.asarray(new.rows)[: new.count]] = np.asarray(new.values)[: new.count, 0]
        return FakeArray(self, self.table, lost)

    def compile_all(self, progress: bool | None = None, **what: Any) -> None:
        self.compiled = what
        for bucket in self.slice_buckets:  # not on a request's time
            shape = self.staging.shape(bucket)
            _reader(shape)(np.zeros(shape.length, np.int32))

    def _check(self, cell: CoRun, packed: np.ndarray) -> None:
        """It was compiled, and the slice has its size."""
        assert cell in self.compiled["co_runs"]
        assert self.staging.shape(cell.slice).length == len(packed)

    def _segment(self, shape: SegmentShape, x: FakeArray) -> FakeArray:
        if not shape.last:
            return x
        self.batches_seen.append(x.values[:, 0].tolist())
        return FakeArray(self, 2 * x.values, x.lost)

    def _donated(self, state: BatchState, lost: bool, values: np.ndarray) -> FakeArray:
        """The vectors in another array; the state cannot be used any more."""
        state.vectors.values = state.vectors.lost = None
        return FakeArray(self, values, lost)

    def _is_next(self, what: str) -> bool:
        if what in self._break:
            self._break.discard(what)
            raise DeviceBroke(f"{what} broke")
        is_lost = what in self._lose
        self._lose.discard(what)
        return is_lost


def samples(*dense: float, ids: int = 1) -> JaggedBatch:
    """One sample per value, each with a bag of `ids` times the id 1."""
    n = len(dense)
    return JaggedBatch(
        dense=np.array(dense, np.float32).reshape(n, 1),
        values=np.ones(n * ids, np.int32),
        offsets=np.arange(n + 1, dtype=np.int64) * ids,
    )


def scores(*dense: float, ids: int = 1) -> list[list[float]]:
    """What the fake makes of `samples` with the same arguments."""
    return [[2 * (value + 10 * ids)] for value in dense]
