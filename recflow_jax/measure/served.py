"""The same Poisson arrivals for the engine in this process and for a server, over HTTP and gRPC."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import saturation_samples_per_s
from recflow_jax.measure.online import OnlineOptions, OnlinePoint, Servers, mean_samples, offer

AT_ONCE = 64  # requests inside, to saturate


@dataclass(frozen=True, kw_only=True)
class ServedResult:
    """All loads. saturation: requests per second with `at_once` requests always inside."""

    mean_request_samples: float
    at_once: int
    saturation: dict[str, float]
    points: tuple[OnlinePoint, ...]


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
    advance: Callable[[], None] = lambda: None,
) -> ServedResult:
    """Saturates each, then offers all the same arrivals, one after the other.

    Shares of load are of the lowest saturation. `advance` is called after each measurement: for
    each server once, and once per load. Raises LoadError.
    """
    mean = mean_samples(requests)
    saturation = {}
    for name, submit in servers.items():
        inside, seconds = int(AT_ONCE * mean), options.seconds
        per_s = saturation_samples_per_s(
            submit, requests, in_flight_samples=inside, seconds=seconds
        )
        saturation[name] = per_s / mean
        advance()
    points = [
        OnlinePoint(
            share=share,
            qps=qps,
            contenders=offer(servers, requests, qps, options.seconds, seed, advance),
        )
        for share, qps in options.rates(min(saturation.values()))
    ]
    return ServedResult(
        mean_request_samples=mean, at_once=AT_ONCE, saturation=saturation, points=tuple(points)
    )
