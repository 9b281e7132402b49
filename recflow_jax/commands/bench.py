"""`recflow bench`: the engine beside plain JAX and torch, on equal inputs, in one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from recflow_jax.backend import Backend, choose_backend
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import plots, report
from recflow_jax.measure.ceilings import measure_ceilings
from recflow_jax.measure.contenders import Lineup, Sets
from recflow_jax.measure.kernels import bench_dense, bench_gather, bench_interaction
from recflow_jax.measure.offline import bench_offline, input_sets
from recflow_jax.measure.online import OnlineOptions, bench_online, request_pool
from recflow_jax.measure.stream import bench_stream
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.model import Params
from recflow_jax.params import init_params

Mode = Literal["offline", "numpy", "online"]
Kernel = Literal["gather", "dense", "interaction"]


def bench(
    config: DLRMConfig,
    *,
    against: Sequence[str] = ("jax",),
    batches: Sequence[int] = (256, 1024, 4096),
    modes: Sequence[str] = ("offline",),
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

    modes: `offline` (batches back to back, inputs on the device), `numpy` (streams of fresh numpy
    batches), `online` (Poisson arrivals); the last two compare with plain JAX alone. Batches and
    answers are those of random input by the config's bags. Raises ValueError for an unknown mode
    or rival, WrongAnswers before anything wrong is timed.
    """
    _check(modes, batches, against)
    timing = timing or TimingOptions()
    chosen = choose_backend(backend)
    params = params if params is not None else init_params(config, seed=seed)
    lineup = Lineup(config, params, chosen, against)
    result = report.header(config, chosen, ids=ids, seed=seed, versions=versions())
    result["skipped"] = dict(lineup.skipped)
    _print_head(result, lineup)
    sets = _input_sets(config, batches, ids, seed) if {"offline", "numpy"} & {*modes} else {}
    if "offline" in modes:
        result |= _offline(lineup, params, sets, timing)
    if "numpy" in modes or "online" in modes:
        result |= _with_engine(
            lineup, params, sets, batches, modes, profile, ids, seed, timing, online
        )
    return _finish(result, out, figure)


def bench_kernel(
    config: DLRMConfig,
    kernel: str,
    *,
    batches: Sequence[int] = (256, 1024, 4096),
    ids: str = "uniform",
    seed: int = 0,
    backend: str = "auto",
    timing: TimingOptions | None = None,
    params: Params | None = None,
    out: str | Path | None = None,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Measures one kind of kernel alone, `gather`, `dense` or `interaction`; prints, writes and
    returns as `bench` does. Raises ValueError, WrongKernel.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    _check((), batches, ())
    chosen = choose_backend(backend)
    params = params if params is not None else init_params(config, seed=seed)
    result = report.header(config, chosen, ids=ids, seed=seed, versions=versions())
    with progress(kernel, len(batches)) as advance:
        if kernel == "gather":
            measured = bench_gather(
                *(config, params, chosen, batches),
                ids=ids,
                seed=seed,
                options=timing,
                advance=advance,
            )
            table = report.gather_table(measured)
        elif kernel == "interaction":
            measured = bench_interaction(
                *(config, params, chosen, batches), seed=seed, options=timing, advance=advance
            )
            table = report.interaction_table(measured)
        else:
            measured = bench_dense(config, params, chosen, batches, options=timing, advance=advance)
            table = report.dense_table(measured)
    report.show(table)
    return _finish(result | {kernel: report.as_json(measured)}, out, figure)


def _check(modes: Sequence[str], batches: Sequence[int], against: Sequence[str]) -> None:
    for mode in modes:
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are {list(batches)}, not sizes of at least 1")
    with_engine = [mode for mode in modes if mode != "offline"]
    if with_engine and "jax" not in against:
        raise ValueError(f"mode {with_engine[0]!r} compares with rival 'jax', which is left out")


def _print_head(result: dict[str, Any], lineup: Lineup) -> None:
    described, config = result["model"], lineup.config
    console.print(
        f"{config.name}: {described['tables']} tables, {described['rows']:,} rows "
        f"(largest {described['largest_table_rows']:,}) of {', '.join(described['table_dtypes'])}, "
        f"{config.compute_dtype} layers, {result['ids']} ids, seed {result['seed']}",
        markup=False,
    )
    console.print(
        f"{result['device']}, back end {lineup.backend.name} ({lineup.backend.reason})",
        markup=False,
    )
    for rival, reason in lineup.skipped.items():
        console.print(f"left out: {rival}: {reason}", markup=False)


def _input_sets(config: DLRMConfig, batches: Sequence[int], ids: str, seed: int) -> Sets:
    sets = {}
    with progress("drawing inputs", len(batches)) as advance:
        for samples in sorted({*batches}):
            sets[samples] = input_sets(config, samples, ids=ids, seed=seed)
            advance()
    return sets


def _offline(lineup: Lineup, params: Params, sets: Sets, timing: TimingOptions) -> dict[str, Any]:
    ceilings = measure_ceilings(lineup.config.compute_dtype, timing)
    with progress("offline", len(sets)) as advance:
        results = bench_offline(
            lineup, params, sets, ceilings=ceilings, options=timing, advance=advance
        )
    report.show(report.offline_table(results))
    console.print(report.ceilings_line(ceilings), markup=False)
    return {"ceilings": report.as_json(ceilings), "offline": report.as_json(results)}


def _with_engine(
    lineup: Lineup,
    params: Params,
    sets: Sets,
    batches: Sequence[int],
    modes: Sequence[str],
    profile: str | Path | None,
    ids: str,
    seed: int,
    timing: TimingOptions,
    online: OnlineOptions | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    options = engine_options(batches, lineup.backend)
    with Engine(lineup.config, params, options=options, profile=profile) as engine:
        if "numpy" in modes:
            with progress("numpy", len(sets)) as advance:
                streams = bench_stream(
                    engine, lineup, params, sets, options=timing, advance=advance
                )
            report.show(report.stream_table(streams))
            found["numpy"] = report.as_json(streams)
        if "online" in modes:
            found["online"] = _online(engine, lineup, params, ids, seed, online or OnlineOptions())
    return found


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
    )


def _online(
    engine: Engine, lineup: Lineup, params: Params, ids: str, seed: int, online: OnlineOptions
) -> dict[str, Any]:
    pool = request_pool(lineup.config, ids=ids, seed=seed, request_samples=online.request_samples)
    with progress("online", 2 + 2 * len(online.qps or online.loads)) as advance:
        result = bench_online(
            engine, lineup, params, pool, seed=seed, options=online, advance=advance
        )
    report.show(report.online_table(result))
    return report.as_json(result)


def _finish(
    result: dict[str, Any], out: str | Path | None, figure: str | Path | None
) -> dict[str, Any]:
    if out is not None:
        report.save_json(Path(out), result)
        console.print(f"wrote {out}", markup=False, soft_wrap=True)
    if figure is not None:
        plots.bench(result, Path(figure))
        console.print(f"wrote {figure}", markup=False, soft_wrap=True)
    return result
