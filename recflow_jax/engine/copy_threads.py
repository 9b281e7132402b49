"""Copies and comparisons by several threads at once, which are none of Python's, while the
interpreter is left to others.

One thread reads and writes memory at a fraction of its rate; Python's own would wait for the
interpreter when they begin and when they end. These are numba's, if it is installed (the extra
`threads`), over a layer that bears several callers at once: OpenMP or TBB.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from inspect import unwrap
from typing import Any

import numpy as np

MOST_THREADS = 4  # more bring little, and are missed by the callers
CORES_PER_THREAD = 4
SAFE_LAYERS = ("omp", "tbb")
WAIT_POLICY = "OMP_WAIT_POLICY"

Copy = Callable[[np.ndarray, np.ndarray, tuple[int, int, int]], bool]
NOTHING = (0, 0, 0)


def threads() -> int:
    """So many threads copy where there are so many cores; one: none but the caller's."""
    return max(1, min(MOST_THREADS, available_cores() // CORES_PER_THREAD))


@cache
def copy() -> Copy | None:
    """As `copy_by` for `threads`."""
    return copy_by(threads())


@cache
def copy_by(count: int) -> Copy | None:
    """Copies as `count` threads do, compiled in a second when it is first asked for; None without
    numba, without a layer for it, and for one thread.

    It takes two int64 arrays, [n, 2] and [m, 2]: addresses and bytes of what is written and what is
    read, as many in all, in order. And two addresses and how many bytes there are to be compared:
    whether these are the same is what it returns.
    """
    nothing = np.zeros((0, 2), np.int64)
    return compiled(_compiled, count, nothing, nothing, NOTHING) if count > 1 else None


def compiled[T: Callable[..., Any]](
    compile_by: Callable[[Any, int], T | None], count: int, *probe: Any
) -> T | None:
    """What `compile_by` makes of numba and a number of threads, `count` at most, once it has been
    called with `probe`; None without numba, and without a layer for several threads.
    """
    with _sleeping_threads():
        try:
            numba = import_module("numba")
        except ImportError:
            return None
        count = min(count, numba.config.NUMBA_NUM_THREADS)
        found = compile_by(numba, count)
        if found is None:
            return None
        try:
            found(*probe)
        except ValueError:  # no layer at all
            return None
    return found if count < 2 or numba.threading_layer() in SAFE_LAYERS else None


def _compiled(numba: Any, count: int) -> Copy | None:
    if count < 2:
        return None
    word = numba.types.int64
    memcpy = numba.types.ExternalFunction("memcpy", word(word, word, word))
    memcmp = numba.types.ExternalFunction("memcmp", numba.types.int32(word, word, word))

    def copy(into: Any, of: Any, compared: Any) -> Any:
        of_caller = numba.get_num_threads()
        numba.set_num_threads(count)
        known, found, size = compared
        total = differ = 0  # item by item: what numba makes of `sum` waits for the interpreter
        for item in range(len(of)):
            total += of[item, 1]
        for share in numba.prange(count):
            first, last = size * share // count, size * (share + 1) // count
            differ += memcmp(known + first, found + first, last - first) != 0
            start, stop = total * share // count, total * (share + 1) // count
            write, read, written, seen = 0, 0, 0, 0
            while start < stop:
                while written + into[write, 1] <= start:
                    written += into[write, 1]
                    write += 1
                while seen + of[read, 1] <= start:
                    seen += of[read, 1]
                    read += 1
                end = min(stop, written + into[write, 1], seen + of[read, 1])
                memcpy(into[write, 0] + start - written, of[read, 0] + start - seen, end - start)
                start = end
        numba.set_num_threads(of_caller)
        return differ == 0

    signature = "boolean(int64[:, ::1], int64[:, ::1], UniTuple(int64, 3))"
    compile_it = numba.njit(signature, nogil=True, parallel=True)
    return compile_it(unwrap(copy))  # without the checks that tests put around functions


@contextmanager
def _sleeping_threads() -> Iterator[None]:
    """OpenMP, if it is loaded in here, lets its threads sleep between copies; else they would spin
    for milliseconds, each on a core of its own.
    """
    before = os.environ.get(WAIT_POLICY)
    os.environ.setdefault(WAIT_POLICY, "passive")
    try:
        yield
    finally:
        if before is None:
            del os.environ[WAIT_POLICY]


def available_cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
