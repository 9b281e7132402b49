"""How serial batching had best collect: some ways are tried."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from scheduling import Collecting

TRIED_WAITS_MS = (0.0, 0.5, 2.0, 5.0)
TRIED_LIMITS = 3  # a half, a quarter, an eighth of the largest batch
TRIED_IN_FLIGHT = (2, 1)


def tries(in_flight: Sequence[int] = TRIED_IN_FLIGHT) -> int:
    """How many ways to collect `best_collecting` tries at most."""
    return len(TRIED_WAITS_MS) + TRIED_LIMITS + len(in_flight) - 1


@runtime_checkable
class Served(Protocol):
    """What became of requests."""

    @property
    def p99_ms(self) -> float: ...


def best_collecting[S: Served](
    serve: Callable[[Collecting], S],
    batch_buckets: Sequence[int],
    in_flight: Sequence[int] = TRIED_IN_FLIGHT,
    is_enough: Callable[[S], bool] = lambda _: False,
) -> tuple[Collecting, S]:
    """The lowest p99 of some waits for full batches, then of smaller batches after that wait, then
    of other numbers in flight; and what `serve` gave for it. At most `tries(in_flight)` are served,
    and none behind one that `is_enough`, which is taken.
    """
    first, *others = in_flight
    waits = [Collecting(wait_ms=wait_ms, in_flight=first) for wait_ms in TRIED_WAITS_MS]
    best = _best(serve, waits, is_enough)
    halves = [batch_buckets[-1] >> times for times in range(TRIED_LIMITS, 0, -1)]
    smaller = [limit for limit in halves if limit >= batch_buckets[0]]
    limited = [replace(best[0], max_samples=limit) for limit in smaller]
    best = _best(serve, limited, is_enough, best)
    ahead = [replace(best[0], in_flight=number) for number in others]
    return _best(serve, ahead, is_enough, best)


def tuned_where_it_fails[S](
    offer: Callable[[float], S], tune: Callable[[float], S], keeps: Callable[[S], bool]
) -> Callable[[float], S]:
    """Offers a load, and where it fails tunes for that load, once: what comes of it is in force
    from then on.
    """
    tuned_for = set[float]()

    def offered(qps: float) -> S:
        load = offer(qps)
        if keeps(load) or qps in tuned_for:
            return load
        tuned_for.add(qps)
        return tune(qps)

    return offered


def _best(
    serve: Callable[[Collecting], Any],
    tried: Sequence[Collecting],
    is_enough: Callable[[Any], bool],
    *best: Any,
) -> Any:
    """With what came of it."""
    served = []
    for pair in chain(best, ((collecting, serve(collecting)) for collecting in tried)):
        if is_enough(pair[1]):
            return pair
        served.append(pair)
    return min(served, key=lambda pair: pair[1].p99_ms)
