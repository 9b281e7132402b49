"""Batches in a row, where one's DNN and the next one's embeddings need not wait for each other.

*Co-run*: both in one executable, the embeddings in the DNN's launches. *Serial*: the engine's two
executables, one after the other. Beside them whole forward passes: recflow's, and its rivals'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.measure.agreement import checked
from recflow_jax.measure.ceilings import Ceilings, Floor, work_of
from recflow_jax.measure.contenders import Contender, Lineup, Sets
from recflow_jax.measure.offline import Measured
from recflow_jax.measure.timing import Timed, Timing, TimingOptions, measure_side_by_side
from recflow_jax.model import Params
from scheduling.request import CoRun, SegmentShape

SERIAL = "serial"
EMBEDDING, DNN = "embedding", "dnn"


@dataclass(frozen=True, kw_only=True)
class OverlapResult:
    """One batch size. `embedding` and `dnn` are the parts of `serial`, each alone; `co_runs` has
    every way in which the two ran together, all others are in `contenders`.
    """

    batch: int
    input_sets: int
    ids: int
    floor: Floor
    embedding: Timing
    dnn: Timing
    co_runs: dict[str, Measured]
    contenders: dict[str, Measured]

    @property
    def best(self) -> str:
        """The fastest co-run."""
        return min(self.co_runs, key=lambda name: self.co_runs[name].timing.median_us)

    @property
    def best_us(self) -> float:
        """What the fastest co-run takes for a batch."""
        return self.co_runs[self.best].timing.median_us

    @property
    def sum_us(self) -> float:
        """The parts one after the other, as measured alone."""
        return self.embedding.median_us + self.dnn.median_us

    @property
    def max_us(self) -> float:
        """The longer part alone."""
        return max(self.embedding.median_us, self.dnn.median_us)

    @property
    def speedups(self) -> dict[str, float]:
        """How many times as long each contender takes as the fastest co-run."""
        return {n: m.timing.median_us / self.best_us for n, m in self.contenders.items()}


def bench_overlap(
    lineup: Lineup,
    params: Params,
    sets: Sets,
    *,
    ceilings: Ceilings,
    options: TimingOptions,
    rides: Sequence[str] = (),
    advance: Callable[[], None] = lambda: None,
) -> list[OverlapResult]:
    """Times `rides` (none named: all) and the lineup side by side, after their answers have been
    checked.

    `advance` is called after each batch size. Raises WrongAnswers; ValueError for rides that are
    not there, and where there are none.
    """
    results = []
    for samples, rivals in lineup.enter(sets).items():
        pipeline = BatchPipeline(lineup, params, sets[samples], rides)
        contenders = {**pipeline.contenders(), **rivals}
        errors = checked(lineup.config, params, sets[samples][0], contenders)
        parts = {EMBEDDING: Timed(launch=pipeline.embed), DNN: Timed(launch=pipeline.run_dnn)}
        timed = parts | {name: contender.timed for name, contender in contenders.items()}
        timings = measure_side_by_side(timed, options)
        measured = {
            name: Measured(
                timing=timings[name],
                error=errors[name],
                compile_s=contender.compile_s,
                note=contender.note,
            )
            for name, contender in contenders.items()
        }
        results.append(_result(lineup, pipeline, sets[samples], measured, timings, ceilings))
        advance()
    return results


class BatchPipeline:
    """The engine's executables for batches of one size, co-runs by `rides` (none named: by all that
    there are). Raises ValueError for rides that are not there, and where there are none.
    """

    def __init__(
        self,
        lineup: Lineup,
        params: Params,
        sets: Sequence[JaggedBatch],
        rides: Sequence[str] = (),
    ) -> None:
        samples = sets[0].samples
        options = EngineOptions(
            max_batch=samples,
            smallest_batch=samples,
            max_slice=samples,
            smallest_slice=samples,
            ids_per_sample=max(1, *(len(batch.values) for batch in sets)) / samples,
            segments=1,
        )
        self._segments = Segments(lineup.config, params, lineup.backend, options)
        self.rides = _chosen([str(ride) for ride in self._segments.rides], rides)
        self.layout = self._segments.layout
        (self._bucket,) = self._segments.slice_buckets
        (self._shape,) = SegmentShape.all_of(1, samples)
        self._segments.compile_all(co_runs=map(self._cell, self.rides))
        self._packed = [jax.device_put(self._pack(batch)) for batch in sets]
        self._running, self._filling = (
            self._segments.embed(self._segments.new_state(), packed) for packed in self._packed[:2]
        )

    def contenders(self) -> dict[str, Contender]:
        """`serial`, and a co-run by each ride."""
        co_runs = {ride: partial(self._co_run, self._cell(ride)) for ride in self.rides}
        serial = Contender(
            name=SERIAL,
            timed=Timed(launch=self._serial),
            scores=np.asarray,
            compile_s=0.0,
            note="engine",
        )
        return {SERIAL: serial} | {
            ride: Contender(
                name=ride,
                timed=Timed(launch=launch),
                # A launch gives the scores of the batch that the launch before it brought in.
                scores=lambda _, launch=launch: np.asarray(launch(0)),
                compile_s=0.0,
                note="co-run",
            )
            for ride, launch in co_runs.items()
        }

    def embed(self, i: int) -> Any:
        """The embeddings of input set `i` alone."""
        self._filling = self._segments.embed(self._filling, self._input(i))
        return self._filling.landed

    def run_dnn(self, i: int) -> Any:
        """The DNN alone, over what was embedded last for it."""
        x, self._running = self._segments.start(self._shape, self._running)
        return x

    def _serial(self, i: int) -> Any:
        self.embed(i)
        x, self._filling = self._segments.start(self._shape, self._filling)
        return x

    def _co_run(self, cell: CoRun, i: int) -> Any:
        states = (self._running, self._filling)
        x, free, filled = self._segments.start_with(cell, *states, self._input(i))
        self._running, self._filling = filled, free
        return x

    def _pack(self, batch: JaggedBatch) -> np.ndarray:
        samples = self._segments.preparer.prepare(batch)
        return self._segments.staging.pack(self._bucket, 0, [samples]).array

    def _cell(self, ride: str) -> CoRun:
        return CoRun(segment=self._shape, slice=self._bucket, config=ride)

    def _input(self, i: int) -> jax.Array:
        return self._packed[i % len(self._packed)]


def _chosen(offered: Sequence[str], named: Sequence[str]) -> list[str]:
    if not offered:
        raise ValueError("nothing can ride: the model has no embeddings")
    for ride in named:
        if ride not in offered:
            raise ValueError(f"ride {ride!r} is not one of {', '.join(offered)}")
    return [*(named or offered)]


def _result(
    lineup: Lineup,
    pipeline: BatchPipeline,
    sets: Sequence[JaggedBatch],
    measured: Mapping[str, Measured],
    timings: Mapping[str, Timing],
    ceilings: Ceilings,
) -> OverlapResult:
    return OverlapResult(
        batch=sets[0].samples,
        input_sets=len(sets),
        ids=len(sets[0].values),
        floor=Floor.of(work_of(lineup.config, pipeline.layout, sets[0]), ceilings),
        embedding=timings[EMBEDDING],
        dnn=timings[DNN],
        co_runs={name: measured[name] for name in pipeline.rides},
        contenders={n: m for n, m in measured.items() if n not in pipeline.rides},
    )
