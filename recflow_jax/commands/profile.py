"""`recflow profile`: how long slices, segments and steps take on this device, as a table."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jax
from rich.table import Table

from recflow_jax.backend import choose_backend
from recflow_jax.calibration import ready
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.profiles import versions
from recflow_jax.engine.segments import Segments
from recflow_jax.measure import plots
from recflow_jax.measure.profiler import Profiler
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.model import Params
from recflow_jax.params import init_params
from recflow_jax.tiles import slug
from scheduling import (
    ProfileKey,
    ProfileRow,
    ProfileTable,
    ProfileTableError,
    segment_key,
    slice_key,
    step_key,
)

FULL = TimingOptions(rounds=5, round_s=0.01)
QUICK = TimingOptions(rounds=3, round_s=0.005, limit_s=1)
SAVE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """The table and where it and its heat map were written."""

    table: ProfileTable
    path: Path
    figure: Path


def profile(
    config: DLRMConfig,
    *,
    out: str | Path = "profiles",
    backend: str = "auto",
    max_batch: int | None = None,
    resume: bool = True,
    quick: bool = False,
    seed: int = 0,
    ids: str = "uniform",
    params: Params | None = None,
    options: EngineOptions | None = None,
) -> ProfileResult:
    """Writes `out`/<model>-<device>.json and .png; measures what the file does not have yet.

    Times are the device's: inputs lie on it, calls are queued. quick: fewer repeats, and steps
    with the largest slice alone. `options` are the engine's that will read the table; `max_batch`
    and `backend` replace theirs. Raises ProfileTableError if a file that is to be resumed was made
    for another device, back end, model or versions.
    """
    options = _engine_options(options, backend, max_batch)
    params = params if params is not None else init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    segments = Segments(config, params, choose_backend(options.backend), options)
    return profile_segments(segments, out=out, resume=resume, quick=quick, seed=seed, ids=ids)


def profile_segments(
    segments: Segments,
    *,
    out: str | Path,
    resume: bool = True,
    quick: bool = False,
    seed: int = 0,
    ids: str = "uniform",
) -> ProfileResult:
    """`profile` of segments that an engine may use afterwards; compiles them."""
    config = segments.config
    stem = f"{slug(config.name)}-{slug(jax.devices()[0].device_kind)}"
    path, figure = Path(out) / f"{stem}.json", Path(out) / f"{stem}.png"
    new = _new_table(config, segments.backend.name)
    table = _resumed(path, new) if resume and path.exists() else new
    _check_segments(path, table, segments.count)
    segments.compile_all()
    profiler = Profiler(segments, ids=ids, seed=seed, timing=QUICK if quick else FULL)
    table = _fill(table, profiler, path, largest_slice_only=quick)
    plots.profile(table, figure)
    _print(table, path, figure)
    return ProfileResult(table=table, path=path, figure=figure)


def _engine_options(
    options: EngineOptions | None, backend: str, max_batch: int | None
) -> EngineOptions:
    values = dict(vars(options or EngineOptions()))
    if backend != "auto":
        values["backend"] = backend
    if max_batch is not None:
        values["max_batch"] = max_batch
    return EngineOptions(**values)


def _new_table(config: DLRMConfig, backend: str) -> ProfileTable:
    return ProfileTable(
        device=jax.devices()[0].device_kind,
        backend=backend,
        versions=versions(),
        model=config.name,
        fingerprint=config.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _resumed(path: Path, new: ProfileTable) -> ProfileTable:
    found = ProfileTable.load(path)
    try:
        found.check(
            device=new.device,
            backend=new.backend,
            fingerprint=new.fingerprint,
            versions=new.versions,
        )
    except ProfileTableError as error:
        raise ProfileTableError(f"{path}: {error} --no-resume (it replaces the file)") from error
    return found


def _check_segments(path: Path, table: ProfileTable, count: int) -> None:
    """All segments of a batch size are written together, so that the last one tells."""
    known = [row.segment for row in table.rows if row.kind == "segment" and row.segment is not None]
    if known and max(known) + 1 != count:
        raise ProfileTableError(
            f"{path}: was made for batches of {max(known) + 1} segments, not {count}; "
            "--no-resume replaces it"
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Rows that are measured and written together: one slice, a batch size's segments or steps."""

    first: ProfileKey
    rows: int
    measure: Callable[[], list[ProfileRow]]


def _jobs(profiler: Profiler, *, largest_slice_only: bool) -> list[_Job]:
    """All there is to measure, the largest of each kind first: they tell how long it will take."""
    segments = profiler.segments
    slices = segments.slice_buckets[::-1]
    batches = segments.batch_buckets[::-1]
    return [
        *(
            _Job(first=slice_key(s), rows=1, measure=lambda s=s: profiler.slice_rows(s))
            for s in slices
        ),
        *(
            _Job(
                first=segment_key(0, b),
                rows=segments.count,
                measure=lambda b=b: profiler.segment_rows(b),
            )
            for b in batches
        ),
        *(
            _Job(
                first=step_key(0, b, s),
                rows=segments.count,
                measure=lambda b=b, s=s: profiler.step_rows(b, s),
            )
            for b in batches
            for s in (slices[:1] if largest_slice_only else slices)
        ),
    ]


def _fill(
    table: ProfileTable, profiler: Profiler, path: Path, *, largest_slice_only: bool
) -> ProfileTable:
    """Measures the rows that are missing, and saves every few seconds."""
    jobs = _jobs(profiler, largest_slice_only=largest_slice_only)
    kept = sum(table.has(job.first) for job in jobs)
    table = _measure_missing(table, _largest(jobs, profiler.segments))
    missing = [job for job in jobs if not table.has(job.first)]
    seconds = _seconds(table, missing, profiler)
    console.print(
        f"profile: {sum(job.rows for job in missing)} timings to come, about {seconds:.0f} s"
        + (f" ({kept} of {len(jobs)} sizes were measured before)" if kept else "")
    )
    table.save(path)
    saved = time.monotonic()
    with progress("profile", len(missing)) as advance:
        for job in missing:
            table = table.with_rows(job.measure())
            if time.monotonic() - saved > SAVE_EVERY_S:
                table.save(path)
                saved = time.monotonic()
            advance()
    table.save(path)
    return table


def _largest(jobs: Sequence[_Job], segments: Segments) -> list[_Job]:
    largest = {slice_key(segments.slice_buckets[-1]), segment_key(0, segments.batch_buckets[-1])}
    return [job for job in jobs if job.first in largest]


def _measure_missing(table: ProfileTable, jobs: Sequence[_Job]) -> ProfileTable:
    for job in jobs:
        if not table.has(job.first):
            table = table.with_rows(job.measure())
    return table


def _seconds(table: ProfileTable, jobs: Sequence[_Job], profiler: Profiler) -> float:
    """About how long `jobs` take, with times that grow with the samples up to the largest's."""
    segments, timing = profiler.segments, profiler.timing
    largest_slice = segments.slice_buckets[-1]
    largest_batch = segments.batch_buckets[-1]
    slice_us = table.time_us(slice_key(largest_slice))
    total = 0.0
    for key, rows in ((job.first, job.rows) for job in jobs):
        call_us = slice_us * (key.slice_samples or 0) / largest_slice.samples
        if key.batch is not None:
            indices = range(segments.count)
            whole_us = sum(table.time_us(segment_key(i, largest_batch)) for i in indices)
            call_us += whole_us / segments.count * key.batch / largest_batch
        rounds = timing.rounds + 2  # finding out how many calls fill a round takes about two
        total += rows * min(rounds * max(timing.round_s, call_us / 1e6), 2 * timing.limit_s)
    return total


def _print(table: ProfileTable, path: Path, figure: Path) -> None:
    console.print(_segment_table(table))
    console.print(_slice_table(table))
    for written in (path, figure):
        console.print(f"wrote {written}", markup=False, soft_wrap=True)


def _segment_table(table: ProfileTable) -> Table:
    rows = [row for row in table.rows if row.kind == "segment"]
    indices = sorted({row.segment for row in rows if row.segment is not None})
    shown = Table(title="segments, microseconds", title_justify="left", show_edge=False)
    for column in ("batch", *(f"segment {index}" for index in indices), "all"):
        shown.add_column(column, justify="right")
    for batch in sorted({row.batch for row in rows if row.batch is not None}):
        times = [table.time_us(segment_key(index, batch)) for index in indices]
        shown.add_row(f"{batch:,}", *(f"{us:,.0f}" for us in (*times, sum(times))))
    return shown


def _slice_table(table: ProfileTable) -> Table:
    shown = Table(title="slices, microseconds", title_justify="left", show_edge=False)
    for column in ("samples", "ids", "median", "p10", "p90"):
        shown.add_column(column, justify="right")
    for row in _slices(table):
        times = (row.median_us, row.p10_us, row.p90_us)
        sizes = (f"{row.slice_samples:,}", f"{row.slice_ids:,}")
        shown.add_row(*sizes, *(f"{us:,.0f}" for us in times))
    return shown


def _slices(table: ProfileTable) -> Iterator[ProfileRow]:
    slices = (row for row in table.rows if row.kind == "slice")
    yield from sorted(slices, key=lambda row: row.sizes)
