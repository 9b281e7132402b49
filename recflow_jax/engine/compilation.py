"""Compiling ahead: every executable at start, with a progress bar, kept on disk for next time."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

QUIET_S = 2.0
CACHED_FROM_S = 0.05


class Job(NamedTuple):
    """A jitted function and the shapes to compile it for, under the key that it is found by."""

    key: Any
    function: Any
    arguments: tuple[Any, ...]


def compile_jobs(
    jobs: Sequence[Job],
    progress: bool | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> dict[Any, Callable[..., Any]]:
    """The executables by key. They take their own shapes and never compile again.

    options: XLA's, for this compilation. workers: how many compile at a time.
    """
    console = Console(stderr=True)
    can_show = console.is_terminal if progress is None else progress

    def compile_one(job: Job) -> Any:
        return job.function.lower(*job.arguments).compile(compiler_options=dict(options or {}))

    with ThreadPoolExecutor(workers) as threads:
        executables = zip(jobs, threads.map(compile_one, jobs), strict=True)
        if can_show:
            executables = _with_bar(executables, len(jobs), console, 0 if progress else QUIET_S)
        return {job.key: executable for job, executable in executables}


def _with_bar(done: Iterable[Any], total: int, console: Console, quiet_s: float) -> Iterator[Any]:
    """What is done, with a bar from `quiet_s` seconds on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    started, bar = time.monotonic(), Progress(*columns, TimeElapsedColumn(), console=console)
    task = bar.add_task("compiling", total=total)
    try:
        for one in done:
            if time.monotonic() - started >= quiet_s:
                bar.start()
            bar.advance(task)
            yield one
    finally:
        bar.stop()


def default_cache() -> Path:
    """The user's cache folder for compiled executables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recflow-jax" / "xla"


def use_cache(folder: str | Path | None) -> None:
    """Makes JAX keep executables in `folder` ("auto": the default one; None: nowhere new).

    This holds for the whole process, as JAX has one such cache: a folder that was set before, by
    the program or by JAX_COMPILATION_CACHE_DIR, stays. One that cannot be made is a warning.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    path = default_cache() if folder == "auto" else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"no compilation cache: {error}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_FROM_S)
