"""`recflow bench traces`: what co-running does on a GPU, as pictures: of kernels in a row, and of
the SMs inside one launch.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recflow_jax.backend import kernels_to
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console
from recflow_jax.measure import report, trace_plots
from recflow_jax.measure.agreement import checked
from recflow_jax.measure.contenders import Contender
from recflow_jax.measure.corun import check_co_runs
from recflow_jax.measure.hbm import HbmUse, NotCounted, count_hbm
from recflow_jax.measure.launch_trace import LaunchTrace, trace_launch
from recflow_jax.measure.launched import SHARING
from recflow_jax.measure.offline import input_sets
from recflow_jax.measure.overlap import SERIAL
from recflow_jax.measure.timeline import Timeline, record, traced_pipeline
from recflow_jax.measure.timing import measure_side_by_side
from recflow_jax.params import init_params

BATCHES = 3  # that a timeline shows


def bench_traces(
    config: DLRMConfig,
    *,
    batch: int = 8192,
    slice_samples: int = 4096,
    ride: str | None = None,
    ids: str = "uniform",
    seed: int = 0,
    out: Path,
) -> dict[str, Any]:
    """Traces, prints a summary, writes `timeline.png`, `launch.png` and `traces.json` into the
    folder `out`; returns the JSON.

    ride: of the co-runs; None takes the fastest. Raises BackendError without a Hopper GPU,
    ValueError for rides that are not there and for models whose layers take no bags along,
    WrongAnswers before anything wrong is traced.
    """
    check_co_runs(config)
    os.environ.update(SHARING)
    backend = kernels_to("trace")
    params = init_params(config, seed=seed)
    sets = input_sets(config, batch, ids=ids, seed=seed)
    pipeline = traced_pipeline(config, params, backend, sets, [ride] if ride else [])
    result = report.header(config, backend, ids=ids, seed=seed, versions=versions())
    result["workload"] = {"batch": batch, "slice_samples": slice_samples}
    launch = trace_launch(
        *(config, params, backend),
        samples=batch,
        slice_samples=slice_samples,
        ids=ids,
        seed=seed,
    )
    contenders = pipeline.contenders()
    checked(config, params, sets[0], contenders)
    medians_us = _medians_us(contenders)
    ride = min(pipeline.rides, key=lambda name: medians_us[name])
    timelines = [record(n, contenders[n].timed, batches=BATCHES) for n in (SERIAL, ride)]
    hbm, reason = _hbm(config, batch=batch, ride=ride, ids=ids, seed=seed)
    result |= {"ride": ride, "median_us": medians_us, "timelines": report.as_json(timelines)}
    result |= {"hbm": report.as_json(hbm), "hbm_missing": reason}
    result["launch"] = report.as_json(launch)
    _print(timelines, launch, hbm, reason)
    return _write(result, out)


def _medians_us(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Microseconds per batch, side by side, without a profiler."""
    timings = measure_side_by_side({n: one.timed for n, one in contenders.items()})
    return {name: timing.median_us for name, timing in timings.items()}


def _hbm(config: DLRMConfig, **workload: Any) -> tuple[HbmUse | None, str | None]:
    """What was counted, or why nothing was."""
    try:
        return count_hbm(config, **workload), None
    except NotCounted as error:
        return None, str(error)


def _print(
    timelines: list[Timeline], launch: LaunchTrace, hbm: HbmUse | None, reason: str | None
) -> None:
    lines = [f"{line.name}: {line.us_per_batch:,.0f} us per batch" for line in timelines]
    lines.append(
        f"one launch, {launch.layer} of {launch.samples:,} samples with the bags of "
        f"{launch.slice_samples:,}: {launch.kernel_us:,.1f} us, of which an SM multiplies in "
        f"{launch.shares.multiply:.0%}, gathers in {launch.shares.gather:.0%}, does both in "
        f"{launch.shares.both:.0%}; tail {launch.tail_us:,.1f} us, {launch.tail_share:.1%}"
    )
    if hbm is None:
        lines.append(f"HBM traffic is not counted: {reason}")
    else:
        lines += [
            f"HBM: {name} {traffic.tb_per_s:.2f} TB/s, {traffic.peak_pct:.0f} % of the peak"
            for name, traffic in (("DNN alone", hbm.dnn), ("co-run", hbm.co_run))
        ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _write(result: dict[str, Any], out: Path) -> dict[str, Any]:
    report.save_json(out / "traces.json", result)
    trace_plots.timeline(result, out / "timeline.png")
    trace_plots.launch(result, out / "launch.png")
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return result
