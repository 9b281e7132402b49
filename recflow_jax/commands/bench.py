"""`recflow bench`: the engine beside plain JAX and torch, and kernels beside their floors, on equal
inputs, in one run; and what the engine costs on the host.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

from recflow_jax.backend import Backend, choose_backend
from recflow_jax.calibration import ready
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.measure import host, plots, report
from recflow_jax.measure.apart import MOST_QUEUED, check_fits
from recflow_jax.measure.ceilings import measure_ceilings
from recflow_jax.measure.contenders import Lineup, Sets
from recflow_jax.measure.contest import bench_online, contenders_of, measurements
from recflow_jax.measure.corun import bench_corun
from recflow_jax.measure.interactions import bench_interaction, bench_pooled_dot
from recflow_jax.measure.kernels import bench_dense, bench_gather
from recflow_jax.measure.offline import bench_offline, input_sets
from recflow_jax.measure.online import LOWEST, OnlineOptions
from recflow_jax.measure.overlap import bench_overlap
from recflow_jax.measure.requests import request_pool
from recflow_jax.measure.stream import bench_stream
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.measure.uploads import bench_uploads
from recflow_jax.model import Params
from recflow_jax.params import init_params
from scheduling import ProfileTable

Mode = Literal["offline", "overlap", "numpy", "online"]
ONLINE_WINDOW = 1 << 18  # requests: all of one load
Kernel = Literal["gather", "dense", "interaction", "pooled-dot", "corun"]


def bench_model(
    config: DLRMConfig,
    *,
    against: Sequence[str] = ("jax",),
    batches: Sequence[int] = (256, 1024, 4096),
    modes: Sequence[str] = ("offline",),
    rides: Sequence[str] = (),
    ids: str = "uniform",
    seed: int = 0,
    backend: str = "auto",
    profile: str | Path | None = None,
    online: OnlineOptions | None = None,
    timing: TimingOptions | None = None,
    params: Params | None = None,
    out: str | Path | None = None,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes JSON to `out` and a figure to `figure`; returns the JSON.
    Meanwhile what there is so far lies beside, in `unfinished_file(out)`.

    rides: of `overlap`; none named measures all.
    modes: `offline` (batches back to back, inputs on the device), `overlap` (the same, a batch's
    embeddings during the DNN of the one before), `numpy` (streams of fresh numpy batches), `online`
    (requests on the clock, with serial batching on the same engine beside it); the last two compare
    with plain JAX alone, which `online` can do without. Batches and answers are those of random
    input by the config's bags.
    Raises ValueError for an unknown mode or rival, WrongAnswers before anything wrong is timed.
    """
    _check(modes, batches, against)
    online = _checked(online or OnlineOptions(), max(batches), against)
    run = _Run(config, params, batches, ids, seed, timing or TimingOptions(), backend)
    lineup = Lineup(run.config, run.params, run.backend, against)
    result = run.header()
    result["skipped"] = dict(lineup.skipped)
    _print_head(result, run)
    for rival, reason in lineup.skipped.items():
        console.print(f"left out: {rival}: {reason}", markup=False)
    sets = run.input_sets() if {"offline", "overlap", "numpy"} & {*modes} else {}
    keep = partial(_keep, result, out)
    if "offline" in modes:
        keep(**_offline(lineup, run, sets))
    if "overlap" in modes:
        keep(**_overlap(lineup, run, sets, rides))
    if "numpy" in modes or "online" in modes:
        options = engine_options(batches, run.backend)
        if online.front_ends:
            options = replace(options, max_queued_samples=MOST_QUEUED)
        segments = Segments(run.config, run.params, run.backend, options)
        console.print("compiling the engine's executables", markup=False)
        with Engine.from_segments(segments, profile=profile) as engine:
            if "numpy" in modes:
                keep(numpy=_numpy(engine, lineup, run, sets))
            if "online" in modes:
                of = (segments, engine, lineup, run, online, profile)
                keep(online=_online(*of, keep=lambda so_far: keep(online=so_far)))
    return finish(result, out, figure)


def bench_kernels(
    config: DLRMConfig,
    *,
    kernels: Sequence[str] = (),
    batches: Sequence[int] = (256, 1024, 4096),
    ids: str = "uniform",
    seed: int = 0,
    backend: str = "auto",
    timing: TimingOptions | None = None,
    params: Params | None = None,
    out: str | Path | None = None,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Measures kinds of kernels alone, of `gather`, `dense`, `interaction` and `pooled-dot`, bags
    and interaction together (none named: those that the model has), or `corun`, layers with a
    gather in their launch; prints, writes and returns as `bench_model` does. Raises ValueError,
    WrongKernel.
    """
    for kernel in kernels:
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    _check((), batches, ())
    run = _Run(config, params, batches, ids, seed, timing or TimingOptions(), backend)
    result = run.header()
    _print_head(result, run)
    for kernel in kernels or _kernels_of(config):
        with progress(kernel, len(batches)) as advance:
            measured, table = _MEASURE_KERNEL[kernel](run, advance)
        report.show(table)
        result[kernel] = report.as_json(measured)
    return finish(result, out, figure)


def bench_host(
    config: DLRMConfig,
    *,
    request_sizes: Sequence[int] = (1, 64, 512),
    ids: str = "uniform",
    seed: int = 0,
    busy: bool = False,
    timing: TimingOptions | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measures the host's time for requests of each size, on a device that is done at once, and, on
    a GPU, for the copies of slices to it; prints, writes and returns as `bench_model` does. busy:
    the requests, beside a thread that computes without end. Raises ValueError, and Missing where
    threads have no clocks of their own.
    """
    if not request_sizes or min(request_sizes) < 1:
        raise ValueError(f"requests are of {list(request_sizes)} samples, not of at least 1")
    options, backend = timing or host.TIMING, choose_backend("xla")
    header = report.header(config, backend, ids=ids, seed=seed, versions=versions())
    beside = host.computing() if busy else nullcontext()
    with progress("host", len(request_sizes)) as advance, beside:
        measured = host.bench_host(
            config, request_sizes, ids=ids, seed=seed, options=options, advance=advance
        )
    report.show(report.host_table(measured))
    uploads = bench_uploads(config, options)
    if uploads:
        report.show(report.uploads_table(uploads))
    result = header | {"timing": report.as_json(options), "cpus": os.cpu_count(), "busy": busy}
    result |= {"host": report.as_json(measured), "uploads": report.as_json(uploads)}
    return finish(result, out, None)


def _kernels_of(config: DLRMConfig) -> list[str]:
    has = {
        "gather": config.features,
        "interaction": config.interaction != "concat",
        "pooled-dot": config.interaction == "dot" and config.features,
        "corun": False,  # for GPUs alone, and not one kernel alone
    }
    return [kernel for kernel in get_args(Kernel) if has.get(kernel, True)]


class _Run:
    """What all measurements of one command share."""

    def __init__(
        self,
        config: DLRMConfig,
        params: Params | None,
        batches: Sequence[int],
        ids: str,
        seed: int,
        timing: TimingOptions,
        backend: str,
    ) -> None:
        self.backend = choose_backend(backend)
        self.params = params if params is not None else init_params(config, seed=seed)
        self.config = ready(config, self.params, ids=ids, seed=seed)
        self.batches = batches
        self.ids = ids
        self.seed = seed
        self.timing = timing

    def header(self) -> dict[str, Any]:
        """What the results hold for, and how they are timed."""
        of = (self.config, self.backend)
        header = report.header(*of, ids=self.ids, seed=self.seed, versions=versions())
        return header | {"timing": report.as_json(self.timing)}

    def input_sets(self) -> Sets:
        """Input sets of every batch size."""
        sets = {}
        with progress("drawing inputs", len(self.batches)) as advance:
            for samples in sorted({*self.batches}):
                sets[samples] = input_sets(self.config, samples, ids=self.ids, seed=self.seed)
                advance()
        return sets


def _of_bags(
    run: _Run, advance: Callable[[], None], *, bench: Callable[..., Any], table: Any
) -> tuple[Any, Table]:
    """A measurement that draws bags, and its table."""
    measured = bench(
        *(run.config, run.params, run.backend, run.batches),
        ids=run.ids,
        seed=run.seed,
        options=run.timing,
        advance=advance,
    )
    return measured, table(measured)


def _dense(run: _Run, advance: Callable[[], None]) -> tuple[Any, Table]:
    of = (run.config, run.params, run.backend, run.batches)
    measured = bench_dense(*of, options=run.timing, advance=advance)
    return measured, report.dense_table(measured)


def _interaction(run: _Run, advance: Callable[[], None]) -> tuple[Any, Table]:
    of = (run.config, run.params, run.backend, run.batches)
    measured = bench_interaction(*of, seed=run.seed, options=run.timing, advance=advance)
    return measured, report.interaction_table(measured)


_MEASURE_KERNEL = {
    "gather": partial(_of_bags, bench=bench_gather, table=report.gather_table),
    "dense": _dense,
    "interaction": _interaction,
    "pooled-dot": partial(_of_bags, bench=bench_pooled_dot, table=report.interaction_table),
    "corun": partial(_of_bags, bench=bench_corun, table=report.corun_table),
}


def _check(modes: Sequence[str], batches: Sequence[int], against: Sequence[str]) -> None:
    for mode in modes:
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are {list(batches)}, not sizes of at least 1")
    if "numpy" in modes and "jax" not in against:
        raise ValueError("mode 'numpy' compares with rival 'jax', which is left out")


def _print_head(result: dict[str, Any], run: _Run) -> None:
    described, config = result["model"], run.config
    console.print(
        f"{config.name}: {described['tables']} tables, {described['rows']:,} rows "
        f"(largest {described['largest_table_rows']:,}) of {', '.join(described['table_dtypes'])}, "
        f"{config.compute_dtype} layers, {result['ids']} ids, seed {result['seed']}",
        markup=False,
    )
    console.print(
        f"{result['device']}, back end {run.backend.name} ({run.backend.reason})", markup=False
    )


def _offline(lineup: Lineup, run: _Run, sets: Sets) -> dict[str, Any]:
    ceilings = measure_ceilings(run.config.compute_dtype, run.timing)
    with progress("offline", len(sets)) as advance:
        results = bench_offline(
            lineup, run.params, sets, ceilings=ceilings, options=run.timing, advance=advance
        )
    report.show(report.offline_table(results))
    console.print(report.ceilings_line(ceilings), markup=False)
    return {"ceilings": report.as_json(ceilings), "offline": report.as_json(results)}


def _overlap(lineup: Lineup, run: _Run, sets: Sets, rides: Sequence[str]) -> dict[str, Any]:
    ceilings = measure_ceilings(run.config.compute_dtype, run.timing)
    with progress("overlap", len(sets)) as advance:
        results = bench_overlap(
            *(lineup, run.params, sets),
            ceilings=ceilings,
            options=run.timing,
            rides=rides,
            advance=advance,
        )
    report.show(report.overlap_table(results))
    console.print(report.ceilings_line(ceilings), markup=False)
    return {"ceilings": report.as_json(ceilings), "overlap": report.as_json(results)}


def _numpy(engine: Engine, lineup: Lineup, run: _Run, sets: Sets) -> Any:
    with progress("numpy", len(sets)) as advance:
        streams = bench_stream(
            engine, lineup, run.params, sets, options=run.timing, advance=advance
        )
    report.show(report.stream_table(streams))
    return report.as_json(streams)


def engine_options(batches: Sequence[int], backend: Backend) -> EngineOptions:
    """An engine whose buckets are the batch sizes measured and their doubles in between."""
    largest, smallest = max(batches), min(batches)
    return EngineOptions(
        max_batch=largest,
        smallest_batch=smallest,
        batch_factor=2,
        max_slice=min(largest, EngineOptions.max_slice),
        smallest_slice=min(smallest, EngineOptions.max_slice),
        slice_factor=2,
        backend=backend.name,
        latency_window=ONLINE_WINDOW,
    )


def _checked(online: OnlineOptions, max_batch: int, against: Sequence[str]) -> OnlineOptions:
    known = (LOWEST, *contenders_of(against))
    if online.load_of not in known:
        raise ValueError(f"online: load_of is {online.load_of!r}, not one of {', '.join(known)}")
    if online.front_ends:
        check_fits(online.request_samples, max_batch)
    return online


def _online(
    segments: Segments,
    engine: Engine,
    lineup: Lineup,
    run: _Run,
    online: OnlineOptions,
    profile: str | Path | None,
    *,
    keep: Callable[[Any], None],
) -> Any:
    pool = request_pool(
        run.config, ids=run.ids, seed=run.seed, request_samples=online.request_samples
    )
    table = None if profile is None or online.front_ends else ProfileTable.load(profile)
    steps = measurements(online, lineup.rivals, foretells=table is not None)
    with progress("online", steps) as advance:
        result = bench_online(
            *(segments, engine, lineup, run.params, pool),
            profile=table,
            ids=run.ids,
            seed=run.seed,
            options=online,
            advance=advance,
            keep=lambda so_far: keep(report.as_json(so_far)),
        )
    report.show(report.online_table(result))
    console.print(report.collecting_line(result), markup=False)
    if not result.front_ends:
        report.show(report.waited_table(result))
    if result.host is not None:
        report.show(report.foretold_table(result))
    for line in report.sustained_lines(result):
        console.print(line, markup=False)
    return report.as_json(result)


def _keep(result: dict[str, Any], out: str | Path | None, **measured: Any) -> None:
    """Adds to the result, and saves it as it is now."""
    result |= measured
    if out is not None:
        report.save_json(unfinished_file(out), result)


def unfinished_file(out: str | Path) -> Path:
    """Where results lie until they are complete, or for good if that never comes."""
    path = Path(out)
    return path.with_name(f"{path.stem}.unfinished{path.suffix}")


def finish(
    result: dict[str, Any], out: str | Path | None, figure: str | Path | None
) -> dict[str, Any]:
    """Writes what was measured, JSON and figure, where that is wanted; returns it."""
    if out is not None:
        report.save_json(Path(out), result)
        unfinished_file(out).unlink(missing_ok=True)
        console.print(f"wrote {out}", markup=False, soft_wrap=True)
    if figure is not None:
        plots.bench(result, Path(figure))
        console.print(f"wrote {figure}", markup=False, soft_wrap=True)
    return result
