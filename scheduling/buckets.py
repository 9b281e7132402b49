"""Ladders of static sizes: work is padded to a rung, so that nothing compiles at run time."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise


def ladder(largest: int, smallest: int = 1, factor: float = 2) -> tuple[int, ...]:
    """Sizes from `smallest` to `largest`, ascending, each about `factor` times the one before.

    No size from `smallest` to `largest` is padded to more than `factor` times itself. Raises
    ValueError unless 1 <= smallest <= largest and factor > 1.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"ladder: from {smallest} to {largest}, not 1 <= smallest <= largest")
    if not factor > 1:
        raise ValueError(f"ladder: factor is {factor}, not above 1")
    rungs = [smallest]
    while rungs[-1] < largest:
        rungs.append(int(min(largest, max(rungs[-1] + 1, rungs[-1] * factor))))
    return tuple(rungs)


def with_half_steps(rungs: Sequence[int], start: int | None) -> tuple[int, ...]:
    """Ascending rungs and, from `start` up, those half way between one and the next, where that is
    at least twice as large. None: the rungs alone.
    """
    if start is None:
        return tuple(rungs)
    between = [(a + b) // 2 for a, b in pairwise(rungs) if a >= start and b >= 2 * a]
    return tuple(sorted({*rungs, *between}))


def smallest_holding(ladder: Sequence[int], n: int) -> int:
    """The first rung of an ascending ladder that is at least n; ValueError if none is."""
    index = bisect_left(ladder, n)
    if index == len(ladder):
        raise ValueError(f"{n} does not fit the largest bucket, {ladder[-1] if ladder else 'none'}")
    return ladder[index]
