"""`recflow bench plans`: does a profile table's best plan take the time that the table promises."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from recflow_jax.backend import choose_backend
from recflow_jax.calibration import ready
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.planning import plans_of
from recflow_jax.engine.profiles import load_profile
from recflow_jax.engine.segments import Segments
from recflow_jax.measure import report
from recflow_jax.measure.mixes import Contest, MixBench, MixResult, random_mixes
from recflow_jax.measure.profiler import Profiler
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.params import init_params
from scheduling import TablePlans

TIMING = TimingOptions(rounds=5, round_s=0.01)
WORST_SHOWN = 5
TEXTS = ("plan", "best")
CLASSES = ((0, 128), (128, 1024), (1024, None))  # of batches, by samples: above, at most


def bench_plans(
    config: DLRMConfig,
    *,
    profile: Path,
    mixes: int = 200,
    contests: int = 30,
    ids: str = "uniform",
    seed: int = 0,
    options: EngineOptions | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures, prints the worst, writes JSON to `out`; returns the JSON.

    mixes: random batches with samples waiting, each by its plan. contests: of how many of them
    other plans are measured too. Raises ProfileTableError for a table of something else.
    """
    options = replace(options or EngineOptions(), half_steps_from=None)  # as the table is
    params = init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    segments = Segments(config, params, choose_backend(options.backend), options)
    table = load_profile(profile, segments)
    segments.compile_all(cuts=segments.cuts)
    profiler = Profiler(segments, ids=ids, seed=seed, timing=TIMING)
    launch_factor = profiler.launch_factor(table)
    console.print(f"a launch takes {launch_factor:.2f} times as long here as in the table")
    plans = plans_of(segments, options, table, launch_factor=launch_factor)
    assert isinstance(plans, TablePlans)
    bench = MixBench(profiler, plans)
    drawn = random_mixes(plans, mixes, seed=seed)
    with progress("plans", len(drawn)) as advance:
        foretold = bench.foretold(drawn, advance)
    with progress("rivals", min(contests, mixes)) as advance:
        contested = bench.contests(drawn[:contests], advance)
    _print(foretold, contested)
    result = report.header(config, segments.backend, ids=ids, seed=seed, versions=versions())
    result |= {"profile": str(profile), "timing": report.as_json(TIMING)}
    result["launch_factor"] = launch_factor
    result |= _summary(foretold, contested)
    result |= {"mixes": report.as_json(foretold), "contests": report.as_json(contested)}
    if out is not None:
        report.save_json(out, result)
        console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return result


def _summary(foretold: Sequence[MixResult], contested: Sequence[Contest]) -> dict[str, float]:
    """Parts of one: of the prediction's error without its sign, and of regret."""
    errors = np.abs([mix.error for mix in foretold])
    device_errors = np.abs([mix.device_error for mix in foretold])
    regrets = [contest.regret for contest in contested]
    summary = {
        "error_median": np.median(errors),
        "error_p90": np.percentile(errors, 90),
        "device_error_median": np.median(device_errors),
        "device_error_p90": np.percentile(device_errors, 90),
    }
    if regrets:
        summary |= {"regret_median": np.median(regrets), "regret_max": np.max(regrets)}
    return {name: float(value) for name, value in summary.items()}


def _print(foretold: Sequence[MixResult], contested: Sequence[Contest]) -> None:
    found = _summary(foretold, contested)
    console.print(
        f"{len(foretold)} mixes: times are {found['error_median']:.1%} off what the table promises "
        f"(median; a tenth by more than {found['error_p90']:.1%}); the device's part of them is "
        f"{found['device_error_median']:.1%} off (a tenth by more than "
        f"{found['device_error_p90']:.1%})",
        markup=False,
    )
    for above, most in CLASSES:
        of_class = [m for m in foretold if above < m.batch <= (most or m.batch)]
        if of_class:
            console.print(f"  {_error_line(of_class, above, most)}", markup=False)
    report.show(_mixes_table(foretold))
    if contested:
        console.print(
            f"{len(contested)} of them beside all other plans that may be better: the plan takes "
            f"{found['regret_median']:.1%} more than the best (median; {found['regret_max']:.1%} "
            "at most)",
            markup=False,
        )
        report.show(_contests_table(contested))


def _error_line(mixes: Sequence[MixResult], above: int, most: int | None) -> str:
    sizes = f"at most {most:,}" if most else f"more than {above:,}"
    found = _summary(mixes, ())
    return (
        f"{len(mixes)} batches of {sizes} samples: {found['error_median']:.1%}, on the device "
        f"{found['device_error_median']:.1%}"
    )


def _new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in TEXTS else "right")
    return table


def _mixes_table(foretold: Sequence[MixResult]) -> Table:
    table = _new_table("furthest off", "batch", "waiting", "promised us", "us", "plan")
    for mix in sorted(foretold, key=lambda mix: -abs(mix.error))[:WORST_SHOWN]:
        times = (f"{mix.predicted_us:,.1f}", f"{mix.timing.median_us:,.1f}")
        table.add_row(f"{mix.batch:,}", f"{mix.waiting:,}", *times, mix.plan)
    return table


def _contests_table(contested: Sequence[Contest]) -> Table:
    table = _new_table(
        "most regretted", "batch", "waiting", "plan us", "best us", "rivals", "plan", "best"
    )
    for one in sorted(contested, key=lambda one: -one.regret)[:WORST_SHOWN]:
        times = (f"{one.plan_us:,.1f}", f"{one.best_us:,.1f}", f"{one.rivals}")
        table.add_row(f"{one.batch:,}", f"{one.waiting:,}", *times, one.plan, one.best)
    return table
