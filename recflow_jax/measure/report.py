"""Results for people, as tables, and for programs, as JSON."""

import dataclasses
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console
from recflow_jax.engine.copy_threads import available_cores, threads
from recflow_jax.measure.apart import ApartResult
from recflow_jax.measure.ceilings import Ceilings
from recflow_jax.measure.contenders import RECFLOW
from recflow_jax.measure.contest import PLAIN
from recflow_jax.measure.corun import CorunResult
from recflow_jax.measure.host import HostResult
from recflow_jax.measure.interactions import InteractionResult
from recflow_jax.measure.kernels import DenseResult, GatherResult
from recflow_jax.measure.offline import DISPATCH, OfflineResult
from recflow_jax.measure.online import OnlineResult
from recflow_jax.measure.overlap import OverlapResult
from recflow_jax.measure.served import HttpCost, ServedResult
from recflow_jax.measure.soaked import SoakResult
from recflow_jax.measure.stream import StreamResult
from recflow_jax.measure.timing import Timing
from recflow_jax.measure.uploads import UploadResult

SCHEMA = 1
WIDTH = 120

Result = (
    OfflineResult
    | StreamResult
    | OnlineResult
    | ServedResult
    | GatherResult
    | DenseResult
    | InteractionResult
)


def header(
    config: DLRMConfig, backend: Backend, *, ids: str, seed: int, versions: Mapping[str, Any]
) -> dict[str, Any]:
    """What results hold for: device, host, back end, versions, date, command line, model, input."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "cores": available_cores(),
        "copy_threads": threads() if importlib.util.find_spec("numba") else 1,
        "backend": {"name": backend.name, "reason": backend.reason},
        "versions": dict(versions),
        "model": {
            "name": config.name,
            "fingerprint": config.fingerprint,
            "tables": len(config.tables),
            "largest_table_rows": max((table.rows for table in config.tables), default=0),
            "rows": sum(table.rows for table in config.tables),
            "table_dtypes": sorted({table.dtype for table in config.tables}),
            "compute_dtype": config.compute_dtype,
        },
        "ids": ids,
        "seed": seed,
    }


def command_line() -> str:
    """What was called, as one would call it again."""
    return shlex.join(["recflow", *sys.argv[1:]])


def as_json(value: Any) -> Any:
    """Dataclasses as objects, with their properties, which are derived values, among the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        names += [n for n, kind in vars(type(value)).items() if isinstance(kind, property)]
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(item) for item in value]
    return value


def save_json(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def ceilings_line(ceilings: Ceilings) -> str:
    """The rates measured in this run."""
    return (
        f"measured here: copy {ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s, "
        f"{ceilings.matmul_dtype} matmul {ceilings.matmul_flop_per_s / 1e12:,.3g} TFLOP/s"
    )


def show(table: Table) -> None:
    """Prints a table, in a file or a pipe with room for all columns, under its whole title: rich
    would wrap that to the columns' width.
    """
    wide = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    untitled = copy(table)
    untitled.title = None
    wide.print(table.title or "", style="table.title", markup=False, soft_wrap=True)
    wide.print(untitled)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in columns:
        text = column in ("contender", "how", "layer", "given as")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _timing_cells(result: OfflineResult | StreamResult, name: str) -> list[str]:
    """What both tables start with: batch, contender, how, median, p10-p90, ratio."""
    measured = result.contenders[name]
    timing = measured.timing
    return [
        f"{result.batch}" if name == RECFLOW else "",
        name,
        measured.note,
        *_spread(timing),
        "" if name == RECFLOW else f"{result.ratios[name]:.2f}",
    ]


def offline_table(results: Sequence[OfflineResult]) -> Table:
    """Medians, ratios and floors."""
    table = _table(
        "offline: inputs on the device, microseconds per batch",
        *("batch", "contender", "how", "median", "p10-p90", "x recflow", "floor", "of floor"),
    )
    for result in results:
        for name, measured in result.contenders.items():
            table.add_row(
                *_timing_cells(result, name),
                f"{result.floor.us:,.0f}" if name == RECFLOW else "",
                f"{result.floor.us / measured.timing.median_us:.0%}",
            )
        dispatch = result.dispatch
        spread = f"{dispatch.p10_us:,.0f}-{dispatch.p90_us:,.0f}"
        row = ("", DISPATCH, "the host's floor", f"{dispatch.median_us:,.0f}", spread)
        table.add_row(*row, f"{1 / result.over_dispatch:.2f}", "", "", end_section=True)
    return table


def stream_table(results: Sequence[StreamResult]) -> Table:
    """Medians and ratios."""
    table = _table(
        "numpy: fresh numpy inputs, microseconds per batch, copies and packing counted",
        *("batch", "contender", "how", "median", "p10-p90", "x recflow", "samples/s"),
    )
    for result in results:
        for name, measured in result.contenders.items():
            table.add_row(
                *_timing_cells(result, name),
                f"{1e6 * result.batch / measured.timing.median_us:,.0f}",
                end_section=name == list(result.contenders)[-1],
            )
    return table


def online_table(result: OnlineResult) -> Table:
    """Latency by load."""
    saturation = ", ".join(f"{name} {qps:,.0f}" for name, qps in result.saturation.items())
    table = _table(
        f"online: {result.arrivals} arrivals, {result.mean_request_samples:.0f} samples per "
        f"request{_made_apart(result)}; saturation in requests/s: {saturation}",
        *("load", "requests/s", "contender", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms"),
        *("answered/s", "failed"),
        *(["p99 ms of all"] if _is_repeated(result) else []),
    )
    for point in result.points:
        for name, load in point.contenders.items():
            share = "" if point.share is None else f"{point.share:.0%}"
            table.add_row(
                share if name == RECFLOW else "",
                f"{point.qps:,.0f}" if name == RECFLOW else "",
                name,
                *(f"{ms:,.2f}" for ms in (load.p50_ms, load.p95_ms, load.p99_ms, load.p999_ms)),
                f"{load.answered_per_s:,.0f}" + ("" if load.kept_up else " (falls behind)"),
                str(load.failed),
                *([_range(point.p99s_ms[name])] if _is_repeated(result) else []),
                end_section=name == list(point.contenders)[-1],
            )
    return table


def _made_apart(result: OnlineResult) -> str:
    count = result.front_ends
    if not count:
        return ""
    but = " (not jax's)" if PLAIN in result.saturation else ""
    return f", made by {count} front ends in processes of their own{but}"


def _is_repeated(result: OnlineResult) -> bool:
    return any(len(p99s) > 1 for point in result.points for p99s in point.p99s_ms.values())


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,.2f}-{max(values):,.2f}"


def collecting_line(result: OnlineResult) -> str:
    """How serial batching was best, load by load."""
    ways = [f"{p.collecting} at {p.qps:,.0f} requests/s" for p in result.points]
    return f"serial batching collects: {'; '.join(ways)}"


def waited_table(result: OnlineResult) -> Table:
    """How long the engine's requests waited for their first launch."""
    table = _table(
        "zero queue: from a request's arrival to the first launch that carries it, and the steps "
        "that ended in the meantime",
        *("requests/s", "p50 us", "p95 us", "p99 us", "p50 steps", "p95 steps", "p99 steps"),
        "within a step",
    )
    for point in result.points:
        if waited := point.waited:
            us, steps = waited.us, waited.steps
            table.add_row(
                f"{point.qps:,.0f}",
                *(f"{value:,.0f}" for value in (us.p50, us.p95, us.p99)),
                *(f"{value:.0f}" for value in (steps.p50, steps.p95, steps.p99)),
                f"{waited.within_a_step:.1%}",
            )
    return table


def foretold_table(result: OnlineResult) -> Table:
    """Latencies by the profile table and the host's rates, beside those measured."""
    table = _table(
        "foretold by the profile table, for the same arrivals",
        *("requests/s", "contender", "p50 ms", "measured", "ratio", "p99 ms", "measured", "ratio"),
        *("device busy", "launcher busy"),
    )
    for point in result.points:
        for name, told in point.foretold.items():
            load = point.contenders[name]
            table.add_row(
                *(f"{point.qps:,.0f}" if name == RECFLOW else "", name),
                *(f"{told.p50_ms:,.2f}", f"{load.p50_ms:,.2f}", f"{told.p50_ratio:.2f}"),
                *(f"{told.p99_ms:,.2f}", f"{load.p99_ms:,.2f}", f"{told.p99_ratio:.2f}"),
                *(f"{told.device_busy_share:.0%}", f"{told.launcher_busy_share:.0%}"),
            )
    return table


def served_table(result: ServedResult) -> Table:
    """Latency by load, of the engine in this process and of a server over both protocols."""
    saturation = ", ".join(f"{name} {qps:,.0f}" for name, qps in result.saturation.items())
    table = _table(
        f"served: {result.arrivals} arrivals, {result.mean_request_samples:.0f} samples each; "
        f"saturation in requests/s: {saturation}",
        *("load", "requests/s", "asked", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "p99.9 ms"),
        *("answered/s", "rejected/late/failed"),
    )
    for point in result.points:
        for name, load in point.contenders.items():
            share = "" if point.share is None else f"{point.share:.0%}"
            first = name == next(iter(point.contenders))
            latencies = (load.p50_ms, load.p90_ms, load.p95_ms, load.p99_ms, load.p999_ms)
            table.add_row(
                share if first else "",
                f"{point.qps:,.0f}" if first else "",
                name,
                *(f"{ms:,.2f}" for ms in latencies),
                f"{load.answered_per_s:,.0f}" + ("" if load.kept_up else " (falls behind)"),
                f"{load.rejected}/{load.late}/{load.failed - load.rejected - load.late}",
                end_section=name == list(point.contenders)[-1],
            )
    return table


def uploads_table(results: Sequence[UploadResult]) -> Table:
    """Calls with a slice as their argument, by where it lies."""
    table = _table(
        "uploads: calls with a slice as numpy, in plain and in pinned memory, microseconds",
        *("samples", "MB", "call, plain", "call, pinned", "each, plain", "each, pinned"),
    )
    for result in results:
        table.add_row(
            *(f"{result.samples:,}", f"{result.nbytes / 1e6:,.2f}"),
            *(_us(result.call_us[memory]) for memory in ("plain", "pinned")),
            *(_us(result.each_us[memory]) for memory in ("plain", "pinned")),
        )
    return table


def sustained_lines(result: ServedResult | OnlineResult) -> list[str]:
    """The largest load of each server within the bound, where there was one."""
    return [
        f"{name}: {found.qps:,.0f} requests/s with a p99 of at most {result.p99_ms:g} ms"
        if found.load
        else f"{name}: no load that was tried has a p99 of at most {result.p99_ms:g} ms"
        for name, found in result.sustained.items()
    ]


def loadgen_table(runs: Mapping[str, Any]) -> Table:
    """LoadGen's verdicts, rates and latencies; of server runs the share of the offline rate."""
    table = _table(
        "MLPerf LoadGen: queries of several user-item pairs",
        *("run", "target q/s", "queries/s", "pairs/s", "of offline", "p50 ms", "p90 ms", "p99 ms"),
        *("p99.9 ms", "bound", "verdict"),
    )
    offline = runs.get("offline")
    for name, run in runs.items():
        served = run.scenario == "server"
        failed = "".join(f", {n} {why}" for why, n in run.failures.items())
        table.add_row(
            name,
            f"{run.target_qps:,.0f}" if served else "",
            *(f"{run.queries_per_s:,.0f}", f"{run.pairs_per_s:,.0f}"),
            f"{run.pairs_per_s / offline.pairs_per_s:.1%}" if served and offline else "",
            *(f"{run.latencies_ms[p]:,.2f}" if served else "" for p in ("50", "90", "99", "99.9")),
            f"{run.p99_ms:g}" if served else "",
            ("valid" if run.valid else "INVALID") + failed,
        )
    return table


def apart_table(results: Sequence[ApartResult]) -> Table:
    """Front ends at once, what they are answered together, and how soon at each load."""
    table = _table(
        "front ends in processes of their own: saturation, and Poisson arrivals at shares of it",
        *("front ends", "requests/s", "load", "offered/s", "p50 ms", "p99 ms", "answered/s"),
        "failed",
    )
    for result in results:
        first = (str(result.front_ends), f"{result.saturation:,.0f}")
        for point in result.points:
            table.add_row(
                *first,
                *(f"{point.share:.0%}", f"{point.qps:,.0f}"),
                *(f"{point.p50_ms:,.2f}", f"{point.p99_ms:,.2f}"),
                *(f"{point.answered_per_s:,.0f}", str(point.failed)),
            )
            first = ("", "")
    return table


def soak_line(result: SoakResult) -> str:
    """What became of the requests and of the memory."""
    ends = ", ".join(f"{n:,} {end}" for end, n in result.ends.items())
    growth = result.growth_bytes["rss_bytes"] / 2**20
    memory = "flat" if result.flat else "growing"
    once = "each once" if result.server.once_each else "not each once"
    return (
        f"{result.server.arrived:,} requests in {result.seconds:,.0f} s ended {once}: {ends}; "
        f"memory {memory}: {growth:+,.1f} MiB from the second quarter to the last"
    )


def http_cost_line(cost: HttpCost) -> str:
    """CPU time per request."""
    return (
        f"HTTP: {cost.served_us:,.0f} us of CPU per request of {cost.request_samples} samples, "
        f"{cost.over_bare:.2f} x the {cost.bare_us:,.0f} us of a bare ASGI app that asks the same "
        f"engine; an echo takes {cost.echo_us:,.0f} us"
    )


def _us(us: float | None) -> str:
    return "" if us is None else f"{us:,.1f}"


def gather_table(results: Sequence[GatherResult]) -> Table:
    """Row bytes per second beside the copy rate."""
    table = _table(
        "pooled gather alone: bytes of the rows asked for, against the copy rate of this run",
        *("batch", "contender", "median us", "GB/s of rows", "of copy rate", "distinct rows"),
        *("on device us", "floor us"),
    )
    for result in results:
        for name, timing in result.timings.items():
            table.add_row(
                str(result.batch),
                name,
                f"{timing.median_us:,.0f}",
                f"{result.row_bytes_per_s[name] / 1e9:,.1f}",
                f"{result.share_of_copy[name]:.0%}",
                f"{result.distinct_row_bytes / max(result.row_bytes, 1):.0%}",
                _us(result.device_us[name]),
                f"{result.floor_us:,.1f}",
            )
    return table


def dense_table(results: Sequence[DenseResult]) -> Table:
    """FLOP per second of each layer beside a large jnp.dot."""
    table = _table(
        "dense layers alone, against jnp.dot on large square matrices in this run",
        *("batch", "layer", "inputs", "outputs", "contender"),
        *("median us", "on device us", "TFLOP/s", "of matmul rate"),
    )
    for result in results:
        for name, timing in result.timings.items():
            rate = result.flop_per_s[name]
            table.add_row(
                *(str(result.batch), result.layer, str(result.inputs), str(result.outputs), name),
                f"{timing.median_us:,.0f}",
                _us(result.device_us[name]),
                f"{rate / 1e12:,.3g}",
                f"{rate / result.matmul_flop_per_s:.0%}",
            )
    return table


def interaction_table(results: Sequence[InteractionResult]) -> Table:
    """Time of the interaction beside its floor."""
    table = _table(
        "interaction alone, against its floor of bytes and FLOP at the rates of this run",
        *("batch", "interaction", "contender", "median us", "p10-p90", "floor us", "of floor"),
        "on device us",
    )
    for result in results:
        for name, timing in result.timings.items():
            table.add_row(
                *(str(result.batch), result.interaction, name),
                f"{timing.median_us:,.0f}",
                f"{timing.p10_us:,.0f}-{timing.p90_us:,.0f}",
                f"{result.floor_us:,.0f}",
                f"{result.share_of_floor[name]:.0%}",
                _us(result.device_us[name]),
            )
    return table


def overlap_table(results: Sequence[OverlapResult]) -> Table:
    """Batches in a row: the fastest co-run, then what it is compared with."""
    table = _table(
        "overlap: embeddings during the DNN of the batch before, microseconds per batch",
        *("batch", "contender", "how", "median", "p10-p90", "x co-run", "embedding", "dnn"),
    )
    for result in results:
        alone = (_us(result.embedding.median_us), _us(result.dnn.median_us))
        best = result.co_runs[result.best]
        table.add_row(f"{result.batch}", result.best, best.note, *_spread(best.timing), "", *alone)
        for name, measured in result.contenders.items():
            speedup = f"{result.speedups[name]:.2f}"
            table.add_row("", name, measured.note, *_spread(measured.timing), speedup)
        table.add_section()
    return table


def _spread(timing: Timing) -> tuple[str, str]:
    return f"{timing.median_us:,.0f}", f"{timing.p10_us:,.0f}-{timing.p90_us:,.0f}"


def corun_table(results: Sequence[CorunResult]) -> Table:
    """Layers with embedding work in the same launch, against both one by one."""
    table = _table(
        "a layer and a gather in one launch, kernel time, against one after the other",
        *("batch", "layer", "slice", "layer us", "gather us", "floor us", "co-run us", "config"),
        *("of sum", "of max"),
    )
    for result in results:
        table.add_row(
            *(str(result.batch), result.layer, str(result.slice_samples)),
            *(_us(result.layer_us), _us(result.gather_us), _us(result.floor_us)),
            *(_us(result.best_us), result.best),
            f"{result.best_over_sum:.2f}",
            f"{result.best_us / result.max_us:.2f}",
        )
    return table


def host_table(results: Sequence[HostResult]) -> Table:
    """Time per request and per sample, and where it goes."""
    table = _table(
        "host: requests at saturation, on a device that is done at once; processor time by stage",
        *("samples", "given as", "us each", "p10-p90", "us/sample", "submit", "pack", "launch"),
        *("resolve", "sum", "batch"),
    )
    for result in results:
        timing, stages = result.timing, result.stages
        table.add_row(
            *(str(result.request_samples), result.given_as, _us(timing.median_us)),
            f"{timing.p10_us:,.0f}-{timing.p90_us:,.0f}",
            f"{result.us_per_sample:,.3f}",
            *(_us(stages.submit_us), _us(stages.pack_us), _us(stages.launch_us)),
            *(_us(stages.resolve_us), _us(stages.sum_us), f"{result.mean_batch:,.0f}"),
        )
    return table
