"""Which requests of a slice lie where they can stay: in a berth, one behind the other.

The berth is the slice's buffer then. What else belongs to the slice is written behind its ids, and
only the ids of others are copied, before and behind those that stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recflow_jax.engine.berths import AROUND, Berth
from recflow_jax.engine.prepared import Prepared


class Run(NamedTuple):
    """Parts [first, last) of a slice, whose ids are the slice's [start, stop)."""

    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0


class Stay(NamedTuple):
    """A slice's buffer in a berth, where the ids of `run` lie in their places."""

    berth: Berth
    buffer: np.ndarray
    run: Run


def stay(parts: Sequence[Prepared], *, ids: int, length: int, dense_at: int) -> Stay | None:
    """The buffer of a slice of `parts`, `length` long, with room for `ids` and with dense features
    from `dense_at` on, around the longest run of them that lie one behind the other; None where
    that would write over other requests, or over dense features that wait there.
    """
    first, last = _longest_run(parts)
    berth = parts[first].berth if first < last else None
    if berth is None:
        return None
    start = parts[first].place
    end = start + _ids(parts[first:last])
    before, behind = _ids(parts[:first]), _ids(parts[last:])
    if before > (AROUND if start == AROUND else 0):
        return None
    place = start - before
    is_last = end == berth.end
    if not is_last and (behind or place + ids < berth.end):
        return None
    if place + length > len(berth.array):
        return None
    if berth.has_dense and (place, dense_at) != (AROUND, berth.dense_at):
        return None
    berth.has_left = True
    run = Run(first, last, before, end - place)
    return Stay(berth, berth.array[place : place + length], run)


def _longest_run(parts: Sequence[Prepared]) -> tuple[int, int]:
    """[first, last) of the parts that lie one behind the other, by ids; empty if none is in a berth
    that no slice has left from.
    """
    best, most = (0, 0), 0
    first, run_ids, end, berth = 0, 0, 0, None
    for index, part in enumerate(parts):
        ids = len(part.rows)
        if part.berth is None or part.berth is not berth or part.place != end:
            first, run_ids, berth = index, 0, part.berth
        end, run_ids = part.place + ids, run_ids + ids
        if berth is not None and not berth.has_left and run_ids > most:
            best, most = (first, index + 1), run_ids
    return best


def _ids(parts: Sequence[Prepared]) -> int:
    return sum([len(part.rows) for part in parts])
