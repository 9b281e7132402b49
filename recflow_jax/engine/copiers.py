"""Threads that help with work on what is large: one alone uses a fraction of a server's memory.

Only for work that leaves Python's interpreter to others. They are the process's, not an engine's,
and made when they are first needed.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

SHARE_BYTES = 2**20  # a helper is not woken for less
MOST_HELPERS = 4
CORES_EACH = 4  # the other ones are for those whom the server serves


def in_shares[Result](
    work: Callable[[int, int], Result], length: int, *, nbytes: int, unit: int = 1
) -> list[Result]:
    """What `work(start, stop)` returns for runs that make up [0, length), in order, side by side.

    nbytes: of all of it. Every run but the last is a multiple of `unit`. What one of them raises is
    raised when all have ended.
    """
    shares = shares_of(nbytes)
    if shares < 2:
        return [work(0, length)]
    ends = [length * share // shares // unit * unit for share in range(shares)] + [length]
    futures = [
        _started(work, start, stop) for start, stop in zip(ends[1:-1], ends[2:], strict=True)
    ]
    try:
        first = work(ends[0], ends[1])
    finally:
        wait(futures)
    return [first, *(future.result() for future in futures)]


def shares_of(nbytes: int) -> int:
    """How many runs, and threads, that many bytes are worth: one or none are the caller's own."""
    helpers = min(MOST_HELPERS, (os.cpu_count() or 1) // CORES_EACH)
    return min(helpers + 1, nbytes // SHARE_BYTES)


def _started[Result](work: Callable[[int, int], Result], start: int, stop: int) -> "Future[Result]":
    try:
        return _pool().submit(work, start, stop)
    except RuntimeError:  # Python ends, and starts nothing more
        done = Future[Result]()
        done.set_result(work(start, stop))
        return done


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_HELPERS, "recflow-copier")
