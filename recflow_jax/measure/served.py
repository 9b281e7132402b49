"""The same arrivals for the engine in this process and for a server, over HTTP and gRPC."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import LoadResult
from recflow_jax.measure.online import OnlineOptions, OnlinePoint, Servers, offer
from recflow_jax.measure.requests import least_qps, mean_samples, saturated
from recflow_jax.measure.sustained import Sustained, sustained

AT_ONCE = 64  # requests inside, to saturate


@dataclass(frozen=True, kw_only=True)
class ServedResult:
    """All loads. saturation: requests per second with `at_once` requests always inside.

    arrivals: "Poisson" or "burst". sustained: by server, the largest load with a p99 of
    at most `p99_ms`, which None if no bound was asked for.
    """

    mean_request_samples: float
    arrivals: str
    at_once: int
    saturation: dict[str, float]
    points: tuple[OnlinePoint, ...]
    p99_ms: float | None
    sustained: dict[str, Sustained]


@dataclass(frozen=True, kw_only=True)
class HttpCost:
    """Microseconds of a server's CPU per request over HTTP, see `http_cost` and `bare_apps`.

    Each is a median over rounds in which the apps take turns; over_bare: served_us / bare_us.
    """

    request_samples: int
    requests: int
    echo_us: float
    bare_us: float
    served_us: float
    over_bare: float


def bench_served(
    servers: Servers,
    requests: Sequence[JaggedBatch],
    *,
    seed: int,
    options: OnlineOptions,
    p99_ms: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ServedResult:
    """Saturates each, then offers all the same arrivals, one after the other; with `p99_ms`, looks
    for each one's largest load that keeps it.

    Shares of load are of the lowest saturation. `advance` is called after each measurement: for
    each server once, once per load, and once for a search. Raises LoadError.
    """
    saturation = _saturation(servers, requests, options.seconds, advance)
    offered = partial(_offered, requests=requests, options=options, seed=seed)
    points = [
        OnlinePoint(share=share, qps=qps, contenders=offered(servers, qps, advance=advance))
        for share, qps in options.rates(min(saturation.values()))
    ]

    def alone(name: str, qps: float) -> LoadResult:
        return offered({name: servers[name]}, qps)[name]

    found, least = {}, least_qps(options.seconds)
    if p99_ms is not None:
        for name, most in saturation.items():
            found[name] = sustained(partial(alone, name), most, p99_ms, least=least)
            advance()
    return ServedResult(
        mean_request_samples=mean_samples(requests),
        arrivals="burst" if options.burst else "Poisson",
        at_once=AT_ONCE,
        saturation=saturation,
        points=tuple(points),
        p99_ms=p99_ms,
        sustained=found,
    )


def _saturation(
    servers: Servers,
    requests: Sequence[JaggedBatch],
    seconds: float,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Requests per second of each server, AT_ONCE of them inside."""
    inside, saturation = int(AT_ONCE * mean_samples(requests)), {}
    for name, submit in servers.items():
        saturation[name] = saturated(submit, requests, in_flight_samples=inside, seconds=seconds)
        advance()
    return saturation


def _offered(
    servers: Servers,
    qps: float,
    *,
    requests: Sequence[JaggedBatch],
    options: OnlineOptions,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LoadResult]:
    """The same arrivals for each, as the options have them."""
    return offer(servers, requests, qps, options.seconds, seed, advance, options.arrivals_s)
