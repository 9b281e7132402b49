"""`recflow simulate`: latency at a load and GPUs for a load, from a profile table alone."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import plots, report
from recflow_jax.measure.capacity import Capacity, capacity
from recflow_jax.measure.simulated_gpu import Gpu, host_of
from recflow_jax.measure.simulation import (
    INCREMENTAL,
    SERIAL,
    SimulatedLoad,
    SimulatedPoint,
    StepUse,
    saturation_qps,
    simulate_point,
)
from recflow_jax.measure.traffic import Traffic
from scheduling import HostCosts, ProfileTable, ProfileTableError
from scheduling.planner import Objective

LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
EXPECTED_BISECTIONS = 10
STEPS_SHOWN = 10
TEXT_COLUMNS = ("batching", "collects", "rides")


def simulate(
    config: DLRMConfig,
    *,
    profile: str | Path,
    qps: float | None = None,
    p99_ms: float | None = None,
    loads: Sequence[float] = LOADS,
    objective: Objective = EngineOptions.objective,
    plan_p99_ms: float | None = None,
    serial_wait_ms: float | None = None,
    request_samples: int | None = None,
    burst: bool = False,
    seconds: float = 5.0,
    seed: int = 0,
    host: HostCosts | None = None,
    out: str | Path | None = None,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Simulates the engine and serial batching, prints tables, writes JSON and a figure; returns
    the JSON. Uses no device: all times are those of the table `profile`.

    Without `qps`, one GPU at `loads`, shares of the lower of the two saturations; with it, one GPU
    at that rate, and with `p99_ms` the number of GPUs that hold it. `figure` draws the loads in any
    case. For the other options see `Gpu` and `Traffic`. Raises ProfileTableError, and ValueError
    for a p99 that an idle GPU exceeds.
    """
    _check(qps, p99_ms, loads)
    table = _table_of(config, profile)
    gpu = Gpu.of(
        table,
        host=host_of(config, host or HostCosts()),
        objective=objective,
        plan_p99_ms=plan_p99_ms,
        serial_wait_ms=serial_wait_ms,
    )
    traffic = Traffic(
        config=config, request_samples=request_samples, burst=burst, seconds=seconds, seed=seed
    )
    result = _header(table, gpu, traffic) | {"plan_p99_ms": plan_p99_ms}
    _print_head(result, profile)
    if qps is not None and p99_ms is not None:
        result["capacity"] = report.as_json(_capacity(gpu, traffic, qps, p99_ms))
    if p99_ms is None or figure is not None:
        shares = () if qps is not None and figure is None else loads
        result |= _loads(gpu, traffic, qps, shares)
    return _finish(result, out, figure)


def _check(qps: float | None, p99_ms: float | None, loads: Sequence[float]) -> None:
    if p99_ms is not None and qps is None:
        raise ValueError("p99: for how many requests per second? give --qps too")
    for name, value in (("qps", qps), ("p99", p99_ms), *(("load", load) for load in loads)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, not above 0")


def _table_of(config: DLRMConfig, profile: str | Path) -> ProfileTable:
    table = ProfileTable.load(profile)
    if not _is_of(table, config):
        raise ProfileTableError(
            f"{profile}: was made for model {table.model!r} with fingerprint {table.fingerprint}, "
            f"{config.name!r} as asked for has {config.fingerprint}: give the same row cap and "
            "dtypes, or make a new table with recflow profile"
        )
    return table


def _is_of(table: ProfileTable, config: DLRMConfig) -> bool:
    """By name alone while float8 layers have no scales yet: these are part of the fingerprint."""
    if len(config.input_scales) < config.float8_matmuls:
        return table.model == config.name
    return table.fingerprint == config.fingerprint


def _header(table: ProfileTable, gpu: Gpu, traffic: Traffic) -> dict[str, Any]:
    return {
        "schema": report.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": report.command_line(),
        "device": table.device,
        "backend": table.backend,
        "model": {"name": table.model, "fingerprint": table.fingerprint},
        "profile": {"created": table.created, "versions": table.versions},
        "sizes": report.as_json(gpu.sizes),
        "objective": gpu.plans.objective,
        "host": report.as_json(gpu.host),
        "arrivals": "bursty" if traffic.burst else "Poisson",
        "mean_request_samples": traffic.mean_samples,
        "seconds": traffic.seconds,
        "seed": traffic.seed,
    }


def _print_head(result: dict[str, Any], profile: str | Path) -> None:
    console.print(
        f"{result['model']['name']} on {result['device']} ({result['backend']}), simulated from "
        f"{profile}: {result['arrivals']} arrivals, {result['mean_request_samples']:.0f} samples "
        f"per request, seed {result['seed']}; planned for {result['objective']}",
        markup=False,
        soft_wrap=True,
    )


def _capacity(gpu: Gpu, traffic: Traffic, qps: float, p99_ms: float) -> dict[str, Capacity]:
    """Of both policies. Raises ValueError if incremental batching cannot hold the p99 at all."""
    found: dict[str, Capacity] = {}
    for policy in (INCREMENTAL, SERIAL):
        with progress(f"bisecting, {policy}", EXPECTED_BISECTIONS) as advance:
            found[policy] = capacity(gpu, policy, traffic, qps=qps, p99_ms=p99_ms, advance=advance)
    each = found[INCREMENTAL].each
    if each is None:
        raise ValueError(
            f"p99 of {p99_ms:g} ms: no number of GPUs holds it, as an idle one already takes "
            f"{found[INCREMENTAL].idle_p99_ms:.4g} ms (p99 of requests that come alone)"
        )
    report.show(_capacity_table(qps, p99_ms, found))
    report.show(_steps_table(each))
    return found


def _loads(
    gpu: Gpu, traffic: Traffic, qps: float | None, shares: Sequence[float]
) -> dict[str, Any]:
    saturation = {name: saturation_qps(gpu, name, traffic) for name in (INCREMENTAL, SERIAL)}
    lower = min(saturation.values())
    rates = [(share, share * lower) for share in shares] or [(None, qps or lower)]
    points = []
    with progress("simulating", len(rates)) as advance:
        for share, rate in rates:
            points.append(simulate_point(gpu, traffic, rate, share))
            advance()
    report.show(_loads_table(points, saturation))
    report.show(_steps_table(points[-1].contenders[INCREMENTAL]))
    return {"saturation": saturation, "points": report.as_json(points)}


def _new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in columns:
        table.add_column(
            column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True
        )
    return table


MEASURES = ("p50 ms", "p99 ms", "p99.9 ms", "batch", "device", "launcher", "collects")


def _measures(load: SimulatedLoad) -> list[str]:
    """Cells of MEASURES."""
    return [
        *(f"{ms:,.2f}" for ms in (load.p50_ms, load.p99_ms, load.p99_9_ms)),
        f"{load.mean_batch:,.0f}",
        f"{load.device_busy_share:.0%}",
        f"{load.launcher_busy_share:.0%}",
        str(load.collecting or "") if load.kept_up else "falls behind",
    ]


def _loads_table(points: Sequence[SimulatedPoint], saturation: dict[str, float]) -> Table:
    most = ", ".join(f"{name} {qps:,.0f}" for name, qps in saturation.items())
    columns = ("load", "requests/s", "batching", *MEASURES)
    table = _new_table(f"one GPU; saturation in requests/s: {most}", *columns)
    for point in points:
        for name, load in point.contenders.items():
            is_first = name == INCREMENTAL
            share = "" if point.share is None or not is_first else f"{point.share:.0%}"
            rate = f"{point.qps:,.0f}" if is_first else ""
            table.add_row(share, rate, name, *_measures(load), end_section=not is_first)
    return table


def _capacity_table(qps: float, p99_ms: float, found: dict[str, Capacity]) -> Table:
    title = f"GPUs for {qps:,.0f} requests/s with a p99 of at most {p99_ms:g} ms"
    table = _new_table(title, "batching", "GPUs", "requests/s each", *MEASURES)
    for name, needed in found.items():
        if needed.each is None:
            table.add_row(name, "none will do", f"idle: {needed.idle_p99_ms:.3g} ms")
        else:
            table.add_row(
                name, f"{needed.gpus:,}", f"{needed.each.qps:,.0f}", *_measures(needed.each)
            )
    return table


def _steps_table(load: SimulatedLoad) -> Table:
    """The plan as it was used."""
    title = f"plan used at {load.qps:,.0f} requests/s"
    table = _new_table(title, "batch cut into", "slice of", "rides", "steps")
    for use in load.steps[:STEPS_SHOWN]:
        table.add_row(*_cells(use), f"{use.share:.1%}")
    if rest := load.steps[STEPS_SHOWN:]:
        table.add_row("others", "", "", f"{sum(use.share for use in rest):.1%}")
    return table


def _cells(use: StepUse) -> tuple[str, str, str]:
    """Cut, slice and ride."""
    if use.segments is None:
        return "-", f"{use.slice_samples:,}", "alone"
    if use.slice_samples is None:
        return f"{use.segments}", "-", ""
    return f"{use.segments}", f"{use.slice_samples:,}", use.ride or "one after the other"


def _finish(
    result: dict[str, Any], out: str | Path | None, figure: str | Path | None
) -> dict[str, Any]:
    if out is not None:
        report.save_json(Path(out), result)
        console.print(f"wrote {out}", markup=False, soft_wrap=True)
    if figure is not None:
        plots.simulation(result, Path(figure))
        console.print(f"wrote {figure}", markup=False, soft_wrap=True)
    return result
