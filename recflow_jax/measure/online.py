"""Online: requests arrive by a Poisson process, whatever the server does; latency at each load.

The engine against a serial batching server in front of plain JAX. Both are first saturated; loads
are shares of the lower of the two saturations, so that both can carry them, or given rates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate, request_sizes
from recflow_jax.engine.engine import Engine
from recflow_jax.measure.agreement import check_answers, reference_scores
from recflow_jax.measure.contenders import RECFLOW, Lineup
from recflow_jax.measure.load import (
    Arrivals,
    LoadResult,
    Submit,
    burst_arrivals_s,
    poisson_arrivals_s,
    run_open_loop,
    saturation_samples_per_s,
)
from recflow_jax.measure.server import BatchingServer, PlainLadder
from recflow_jax.model import Params

POOL_REQUESTS = 64
LEAST_ARRIVALS = 20

Servers = Mapping[str, Submit]


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """loads: shares of saturation; `qps`, where given, rates in requests per second instead.

    request_samples: samples of every request; None draws MLPerf's sizes. Each point lasts
    `seconds`; requests due by then are all waited for. burst: arrivals in bursts, not evenly.
    wait_ms: how long plain JAX collects.
    """

    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    qps: tuple[float, ...] = ()
    request_samples: int | None = None
    seconds: float = 5.0
    burst: bool = False
    wait_ms: float = 2.0
    in_flight_batches: int = 3

    def __post_init__(self) -> None:
        for name in ("loads", "qps"):
            bad = [value for value in getattr(self, name) if not value > 0]
            if bad:
                raise ValueError(f"online: {name} has {bad[0]}, not above 0")
        if not self.seconds > 0:
            raise ValueError(f"online: seconds is {self.seconds}, not above 0")

    @property
    def arrivals_s(self) -> Arrivals:
        """What draws the times of arrival."""
        return burst_arrivals_s if self.burst else poisson_arrivals_s

    def rates(self, saturation: float) -> list[tuple[float | None, float]]:
        """Each load as a share of `saturation`, if it is one, and in requests per second."""
        if self.qps:
            return [(None, qps) for qps in self.qps]
        return [(share, share * saturation) for share in self.loads]


@dataclass(frozen=True, kw_only=True)
class OnlinePoint:
    """One load: `share` of the lower saturation (None for a given rate)."""

    share: float | None
    qps: float
    contenders: dict[str, LoadResult]


@dataclass(frozen=True, kw_only=True)
class OnlineResult:
    """All loads. saturation: requests per second that each contender answers at most."""

    max_batch: int
    mean_request_samples: float
    wait_ms: float
    saturation: dict[str, float]
    points: tuple[OnlinePoint, ...]


def request_pool(
    config: DLRMConfig, *, ids: str, seed: int, request_samples: int | None = None
) -> list[JaggedBatch]:
    """Requests to send in turn, of MLPerf's sizes or all of `request_samples`."""
    sizes = request_sizes(POOL_REQUESTS, seed=seed).tolist()
    if request_samples:
        sizes = [request_samples] * POOL_REQUESTS
    ends = np.cumsum([0, *sizes]).tolist()
    batch = generate(config, ends[-1], seed=seed, ids=ids)
    return [batch.part(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def bench_online(
    engine: Engine,
    lineup: Lineup,
    params: Params,
    requests: Sequence[JaggedBatch],
    *,
    seed: int,
    options: OnlineOptions,
    advance: Callable[[], None] = lambda: None,
) -> OnlineResult:
    """Saturates engine and plain server, then offers both the same arrivals, one after the other.

    `advance` is called after each measurement: 2 + 2 per load. Raises WrongAnswers, LoadError.
    """
    with plain_server(lineup, requests, engine.options.max_batch, options.wait_ms) as server:
        servers: Servers = {RECFLOW: engine.submit, "jax": server.submit}
        check_served(engine.config, params, requests, servers)
        saturation = saturate(servers, requests, engine.options.max_batch, options, advance)
        points = [
            OnlinePoint(
                share=share,
                qps=qps,
                contenders=offer(
                    servers, requests, qps, options.seconds, seed, advance, options.arrivals_s
                ),
            )
            for share, qps in options.rates(min(saturation.values()))
        ]
    return OnlineResult(
        max_batch=engine.options.max_batch,
        mean_request_samples=mean_samples(requests),
        wait_ms=options.wait_ms,
        saturation=saturation,
        points=tuple(points),
    )


def plain_server(
    lineup: Lineup, requests: Sequence[JaggedBatch], max_batch: int, wait_ms: float
) -> BatchingServer:
    """Plain JAX, compiled for batches from the smallest request to `max_batch`, behind a queue."""
    example = JaggedBatch.join(requests)
    plain = lineup.fastest_poolers({max_batch: [_resized(example, max_batch)]})[max_batch]
    run = PlainLadder(
        plain,
        lineup.plain_params,
        smallest=min(max_batch, *(request.samples for request in requests)),
        largest=max_batch,
        example=example,
    )
    return BatchingServer(run, batch=max_batch, wait_ms=wait_ms)


def _resized(batch: JaggedBatch, samples: int) -> JaggedBatch:
    repeats = -(-samples // batch.samples)
    return JaggedBatch.join([batch] * repeats).part(0, samples)


def mean_samples(requests: Sequence[JaggedBatch]) -> float:
    """Samples per request."""
    return float(np.mean([request.samples for request in requests]))


def check_served(
    config: DLRMConfig, params: Params, requests: Sequence[JaggedBatch], servers: Servers
) -> None:
    """Sends all requests through each server at once and compares the answers.

    Raises WrongAnswers.
    """
    sent = {name: [submit(r) for r in requests] for name, submit in servers.items()}
    answers = {
        name: np.concatenate([answer.result() for answer in answers])
        for name, answers in sent.items()
    }
    reference = reference_scores(config, params, JaggedBatch.join(requests))
    check_answers(reference, answers, dtype=config.compute_dtype)


def saturate(
    servers: Servers,
    requests: Sequence[JaggedBatch],
    max_batch: int,
    options: OnlineOptions,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Requests per second that each server answers while a few batches of samples are inside."""
    saturation = {}
    for name, submit in servers.items():
        samples_per_s = saturation_samples_per_s(
            submit,
            requests,
            in_flight_samples=options.in_flight_batches * max_batch,
            seconds=options.seconds,
        )
        saturation[name] = samples_per_s / mean_samples(requests)
        advance()
    return saturation


def offer(
    servers: Servers,
    requests: Sequence[JaggedBatch],
    qps: float,
    seconds: float,
    seed: int,
    advance: Callable[[], None] = lambda: None,
    arrivals_s: Arrivals = poisson_arrivals_s,
) -> dict[str, LoadResult]:
    """The same arrivals for each server, one after the other."""
    results = {}
    for name, submit in servers.items():
        due_s = arrivals_s(qps, max(int(qps * seconds), LEAST_ARRIVALS), seed=seed)
        results[name] = run_open_loop(submit, requests, due_s)
        advance()
    return results
