"""What every command shares with the person in front of it: output, progress, errors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OK = 0
FAILED = 1
BAD_INPUT = 2
MISSING = 3
INTERRUPTED = 130

# A file or a pipe has no width: wide enough there for every table.
WIDTH_OF_FILES = 140

console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)


class Missing(RuntimeError):
    """Something that was asked for is not on this machine; the message says how to get it."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` steps; call what it yields after each. Only on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def exit_code(error: Exception) -> int:
    """What the process that met `error` tells its caller."""
    if _is_package_missing(error) or _says_what_is_missing(error):
        return MISSING
    return BAD_INPUT if isinstance(error, ValueError | OSError) else FAILED


def one_line(error: Exception) -> str:
    """The first line of what `error` says; with its type where nobody wrote it for a user."""
    lines = _said(error).strip().splitlines()
    message = lines[0].strip() if lines else ""
    if message and exit_code(error) != FAILED:
        return message
    return f"{type(error).__name__}: {message} (RECFLOW_DEBUG=1 shows where)"


def _said(error: Exception) -> str:
    """The system's errors without their numbers."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_package_missing(error: Exception) -> bool:
    if not isinstance(error, ModuleNotFoundError):
        return False
    ours = ("recflow_jax", "pallas_kernels", "scheduling")
    return (error.name or "").partition(".")[0] not in ours


def _says_what_is_missing(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    # Only now: whoever raises these has paid for the import of jax already.
    from recflow_jax.backend import BackendError
    from recflow_jax.data.movielens import DataError

    return isinstance(error, Missing | BackendError | DataError)
