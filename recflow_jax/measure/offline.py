"""Offline: batches back to back, inputs on the device, rotating among several input sets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import gather_bytes_per_sample, generate
from recflow_jax.layout import Layout
from recflow_jax.measure.agreement import checked
from recflow_jax.measure.ceilings import Ceilings, Floor, Work, work_of
from recflow_jax.measure.contenders import RECFLOW, Contender, Lineup, Sets
from recflow_jax.measure.timing import Timing, TimingOptions, measure_side_by_side
from recflow_jax.model import Params

LEAST_SETS, MOST_SETS = 4, 32
ROTATED_BYTES = 256 * 2**20  # several times the largest L2 cache
LARGE_SET_BYTES = 2**30
DISPATCH = "empty dispatch"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contender's time per batch, its error and what compiling it took."""

    timing: Timing
    error: float
    compile_s: float
    note: str


@dataclass(frozen=True, kw_only=True)
class OfflineResult:
    """All contenders at one batch size. `dispatch`: a jitted call with recflow's arguments that
    computes nothing, the host's floor.
    """

    batch: int
    input_sets: int
    ids: int
    work: Work
    floor: Floor
    dispatch: Timing
    contenders: dict[str, Measured]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long each rival takes as recflow."""
        return ratios({name: m.timing.median_us for name, m in self.contenders.items()})

    @property
    def over_dispatch(self) -> float:
        """How many times as long recflow takes as an empty dispatch."""
        return self.contenders[RECFLOW].timing.median_us / self.dispatch.median_us


def ratios(median_us: Mapping[str, float]) -> dict[str, float]:
    """How many times as long each takes as recflow."""
    ours = median_us[RECFLOW]
    return {name: us / ours for name, us in median_us.items() if name != RECFLOW}


def bench_offline(
    lineup: Lineup,
    params: Params,
    sets: Sets,
    *,
    ceilings: Ceilings,
    options: TimingOptions,
    advance: Callable[[], None] = lambda: None,
) -> list[OfflineResult]:
    """Times the lineup at each batch size of `sets`, after its answers have been checked.

    `advance` is called after each batch size. Raises WrongAnswers.
    """
    results = []
    for samples, contenders in lineup.enter(sets).items():
        errors = checked(lineup.config, params, sets[samples][0], contenders)
        timed = {name: contender.timed for name, contender in contenders.items()}
        if dispatch := contenders[RECFLOW].dispatch:
            timed[DISPATCH] = dispatch
        timings = measure_side_by_side(timed, options)
        results.append(_result(lineup.config, sets[samples], contenders, errors, timings, ceilings))
        advance()
    return results


def input_sets(config: DLRMConfig, samples: int, *, ids: str, seed: int) -> list[JaggedBatch]:
    """Batches to rotate among: enough rows that no cache keeps them from one turn to the next."""
    set_bytes = samples * gather_bytes_per_sample(config).total
    count = min(MOST_SETS, max(LEAST_SETS, math.ceil(ROTATED_BYTES / max(set_bytes, 1))))
    if set_bytes > LARGE_SET_BYTES:
        count = LEAST_SETS // 2
    return [generate(config, samples, seed=seed + i, ids=ids) for i in range(count)]


def _result(
    config: DLRMConfig,
    sets: Sequence[JaggedBatch],
    contenders: Mapping[str, Contender],
    errors: Mapping[str, float],
    timings: Mapping[str, Timing],
    ceilings: Ceilings,
) -> OfflineResult:
    work = work_of(config, Layout.of(config), sets[0])
    measured = {
        name: Measured(
            timing=timings[name],
            error=errors[name],
            compile_s=contender.compile_s,
            note=contender.note,
        )
        for name, contender in contenders.items()
    }
    return OfflineResult(
        batch=sets[0].samples,
        input_sets=len(sets),
        ids=len(sets[0].values),
        work=work,
        floor=Floor.of(work, ceilings),
        dispatch=timings[DISPATCH],
        contenders=measured,
    )
