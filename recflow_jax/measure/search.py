"""The largest load that still meets a bound."""

from collections.abc import Callable


def largest_load(
    is_fast: Callable[[float], bool], most: float, *, within: float, least: float = 0.0
) -> float:
    """By bisection: the largest load up to `most` that is fast, within this part of it.

    0 if none is found that is: down to `within` of `most` one is looked for. None below `least` is
    tried.
    """
    if is_fast(most):
        return most
    low, high = 0.0, most
    while high - low > within * max(high, most * within):
        middle = (low + high) / 2
        if middle < least:
            break
        low, high = (middle, high) if is_fast(middle) else (low, middle)
    return low
