"""The largest load that a server takes with its p99 within a bound, by trying."""

from collections.abc import Callable
from dataclasses import dataclass

from recflow_jax.measure.load import LoadResult
from recflow_jax.measure.search import largest_load

CLOSE_ENOUGH = 0.05  # of the load: runs of seconds tell no more
TRIES = 2  # a hiccup of the machine is no limit of the server
BEYOND = 1.1  # times a saturation that was measured too low, again and again


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """A rate in requests per second, within CLOSE_ENOUGH, and what the server did at it.

    0 and None where no load that was tried kept the bound.
    """

    qps: float
    load: LoadResult | None


def keeps(load: LoadResult, p99_ms: float) -> bool:
    """Whether everything was answered, as fast as it came, with a p99 of at most `p99_ms`."""
    return load.p99_ms <= p99_ms and not load.failed and load.kept_up


def sustained(
    offer: Callable[[float], LoadResult], most: float, p99_ms: float, *, least: float = 0.0
) -> Sustained:
    """Looks from `least` to `most` requests per second, the saturation as it was measured, and
    beyond where that is kept. A load that fails is offered once more.
    """
    kept: list[LoadResult] = []

    def is_kept(qps: float) -> bool:
        for _ in range(TRIES):
            load = offer(qps)
            if keeps(load, p99_ms):
                kept.append(load)
                return True
        return False

    qps = largest_load(is_kept, most, within=CLOSE_ENOUGH, least=least)
    while qps >= most and is_kept(BEYOND * qps):
        qps *= BEYOND
    return Sustained(qps=qps, load=kept[-1] if kept else None)
