"""`recflow profile`: how long slices, segments and steps take on this device, as a table."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import batched
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
from recflow_jax.measure import plots, report
from recflow_jax.measure.profiler import Profiler
from recflow_jax.measure.schemes import Scheme, chosen_schemes, write_schemes
from recflow_jax.measure.sweep import Job, Sweep
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.model import Params
from recflow_jax.params import init_params
from recflow_jax.tiles import slug
from scheduling import ProfileRow, ProfileTable, ProfileTableError, SegmentShape
from scheduling.costs import segment_key

FULL = TimingOptions(rounds=5, round_s=0.01)
QUICK = TimingOptions(rounds=3, round_s=0.005, limit_s=1)
SAVE_EVERY_S = 5.0
COMPILED_TOGETHER = 8  # steps whose executables are compiled at a time


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """The table, and where it, its heat map and the list of schemes were written."""

    table: ProfileTable
    path: Path
    figure: Path
    schemes: Path


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
    """Writes `out`/<model>-<device>.json, .png and .csv, which lists for each pair of a segment and
    a slice the best scheme; measures what the file does not have yet, but for the half steps of
    `EngineOptions`, which take what lies between.

    Times are the device's: inputs lie on it, calls are queued. quick: fewer repeats, and of all
    batches only the largest beside slices. `options` are the engine's that will read the table;
    `max_batch` and `backend` replace theirs. Raises ProfileTableError if a file that is to be
    resumed was made for another device, back end, model or versions.
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
    path = Path(out) / f"{stem}.json"
    new = _new_table(config, segments.backend.name)
    table = _resumed(path, new) if resume and path.exists() else new
    segments.compile_all(cuts=segments.cuts)
    profiler = Profiler(segments, ids=ids, seed=seed, timing=QUICK if quick else FULL)
    table = _fill(table, Sweep(profiler, quick=quick), profiler, path)
    schemes = chosen_schemes(table)
    result = ProfileResult(
        table=table,
        path=path,
        figure=path.with_suffix(".png"),
        schemes=path.with_suffix(".csv"),
    )
    plots.profile(table, schemes, result.figure)
    write_schemes(schemes, result.schemes)
    _print(table, schemes, result)
    return result


def _engine_options(
    options: EngineOptions | None, backend: str, max_batch: int | None
) -> EngineOptions:
    values = dict(vars(options or EngineOptions()))
    values["half_steps_from"] = None
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
    # Rows of an older file may have no launches: they are measured anew.
    return replace(found, rows=tuple(row for row in found.rows if row.launch_us))


def _fill(table: ProfileTable, sweep: Sweep, profiler: Profiler, path: Path) -> ProfileTable:
    """Measures the rows that are missing, and saves every few seconds."""
    filling = _Filling(table, profiler, path)
    filling.measure(sweep.alone(), "parts")
    filling.measure(sweep.contest(), "rides")
    filling.measure(sweep.steps(filling.table), "steps")
    return filling.table


class _Filling:
    """A table that is being measured, and where it is kept."""

    def __init__(self, table: ProfileTable, profiler: Profiler, path: Path) -> None:
        self.table = table
        self._profiler = profiler
        self._path = path
        self._saved = time.monotonic()

    def measure(self, jobs: Sequence[Job], name: str) -> None:
        """Measures those jobs whose rows are missing."""
        missing = [job for job in jobs if not self.table.has(job.first)]
        if not missing:
            console.print(f"{name}: all {len(jobs)} sizes are measured already")
            return
        timings, kept = sum(job.rows for job in missing), len(jobs) - len(missing)
        least_s = timings * self._profiler.timing.rounds * self._profiler.timing.round_s
        console.print(
            f"{name}: {timings} timings to come, {least_s:.0f} s at least"
            + (f" ({kept} of {len(jobs)} sizes are measured already)" if kept else "")
        )
        with progress(name, len(missing)) as advance:
            for chunk in batched(missing, COMPILED_TOGETHER):
                self._compile(chunk)
                for job in chunk:
                    self._add(job)
                    advance()
        self._save()

    def _compile(self, jobs: Sequence[Job]) -> None:
        co_runs = [cell for job in jobs for cell in job.co_runs]
        self._profiler.segments.compile_all(progress=False, cuts=(), co_runs=co_runs)

    def _add(self, job: Job) -> None:
        self.table = self.table.with_rows(job.measure())
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        self.table.save(self._path)
        self._saved = time.monotonic()


def _print(table: ProfileTable, schemes: Sequence[Scheme], result: ProfileResult) -> None:
    for cut in sorted({row.segments for row in table.rows if row.segments is not None}):
        report.show(_segment_table(table, cut))
    report.show(_slice_table(table))
    serial = [scheme for scheme in schemes if scheme.is_serial]
    console.print(
        f"steps: {len(schemes)} pairs of a slice and a segment tried in one executable; "
        f"{len(serial)} are best one after the other"
    )
    for written in (result.path, result.figure, result.schemes):
        console.print(f"wrote {written}", markup=False, soft_wrap=True)


def _segment_table(table: ProfileTable, cut: int) -> Table:
    rows = [row for row in table.rows if row.kind == "segment" and row.segments == cut]
    title = "whole batches, microseconds" if cut == 1 else f"{cut} segments, microseconds"
    shown = Table(title=title, title_justify="left", show_edge=False)
    indices = () if cut == 1 else range(cut)
    for column in ("batch", *(f"segment {index}" for index in indices), "all"):
        shown.add_column(column, justify="right")
    for batch in sorted({row.batch for row in rows if row.batch is not None}):
        times = [table.time_us(segment_key(shape)) for shape in SegmentShape.all_of(cut, batch)]
        shown.add_row(f"{batch:,}", *(f"{us:,.0f}" for us in (*times[cut == 1 :], sum(times))))
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
