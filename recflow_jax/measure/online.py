"""Online: requests arrive when they are due, whatever the servers do; latency at each load.

Servers are first saturated; loads are shares of the lowest saturation, so that all can carry them,
of one server's, or given rates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.agreement import check_answers, reference_scores
from recflow_jax.measure.contenders import Lineup
from recflow_jax.measure.foretold import Foretold
from recflow_jax.measure.load import (
    Arrivals,
    LoadResult,
    Submit,
    burst_arrivals_s,
    poisson_arrivals_s,
    run_open_loop,
)
from recflow_jax.measure.requests import arrivals_at, saturated
from recflow_jax.measure.server import BatchingServer, PlainLadder
from recflow_jax.measure.sustained import Sustained
from recflow_jax.measure.tuning import TRIED_IN_FLIGHT
from recflow_jax.measure.waited import Waited
from recflow_jax.model import Params
from scheduling import Collecting, HostCosts

LOWEST = "lowest"

Servers = Mapping[str, Submit]


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """loads: shares of saturation; `qps`, where given, rates in requests per second instead.

    request_samples: samples of every request; None draws MLPerf's sizes. Each point lasts
    `seconds`; requests due by then are all waited for. burst: arrivals in bursts, not evenly.
    load_of: whose saturation the loads are shares of; "lowest" of all. p99_ms: the bound within
    which the largest load is looked for. wait_ms: how long plain JAX collects.
    repeats: how often each load is offered, contenders in turn; of each the run with the median p99
    counts, as a hiccup of the machine makes a tail of its own; who falls behind is not asked again.
    front_ends: in how many processes of their own the engine's requests are made; 0: in this one.
    serial_in_flight: how many batches serial batching may have on the device at once, of which the
    best is taken; one alone is collected, embedded and run before the next is launched.
    """

    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    qps: tuple[float, ...] = ()
    request_samples: int | None = None
    seconds: float = 5.0
    burst: bool = False
    load_of: str = LOWEST
    p99_ms: float = 10.0
    wait_ms: float = 2.0
    in_flight_batches: int = 3
    repeats: int = 1
    front_ends: int = 0
    serial_in_flight: tuple[int, ...] = TRIED_IN_FLIGHT

    def __post_init__(self) -> None:
        for name in ("loads", "qps"):
            bad = [value for value in getattr(self, name) if not value > 0]
            if bad:
                raise ValueError(f"online: {name} has {bad[0]}, not above 0")
        for name in ("seconds", "p99_ms", "repeats"):
            if not getattr(self, name) > 0:
                raise ValueError(f"online: {name} is {getattr(self, name)}, not above 0")
        if self.front_ends < 0:
            raise ValueError(f"online: front_ends is {self.front_ends}, below 0")
        if not self.serial_in_flight or min(self.serial_in_flight) < 1:
            some = [*self.serial_in_flight]
            raise ValueError(f"online: serial_in_flight is {some}, not some numbers of at least 1")

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
    """One load: `share` of the saturation (None for a given rate).

    Of the bench alone: the p99 of each contender in each of its repeats, how serial batching
    collected, how long the engine's requests waited for their launch, and what was foretold, with a
    profile table.
    """

    share: float | None
    qps: float
    contenders: dict[str, LoadResult]
    p99s_ms: dict[str, list[float]] = field(default_factory=dict)
    collecting: Collecting | None = None
    waited: Waited | None = None
    foretold: dict[str, Foretold] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OnlineResult:
    """All loads. saturation: requests per second that each contender answers at most.

    arrivals: "Poisson" or "burst". host: the rates that were measured to foretell with. sustained:
    the largest load of each contender with a p99 of at most `p99_ms`; both of the bench alone.
    front_ends: as in OnlineOptions.
    """

    max_batch: int
    mean_request_samples: float
    wait_ms: float
    saturation: dict[str, float]
    points: tuple[OnlinePoint, ...]
    arrivals: str = "Poisson"
    host: HostCosts | None = None
    p99_ms: float | None = None
    sustained: dict[str, Sustained] = field(default_factory=dict)
    front_ends: int = 0


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
    check_found(config, params, requests, answers)


def check_found(
    config: DLRMConfig,
    params: Params,
    requests: Sequence[JaggedBatch],
    answers: Mapping[str, np.ndarray],
) -> None:
    """Compares what each server answered to all these requests, in order. Raises WrongAnswers."""
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
    inside, saturation = options.in_flight_batches * max_batch, {}
    for name, submit in servers.items():
        saturation[name] = saturated(
            submit, requests, in_flight_samples=inside, seconds=options.seconds
        )
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
        due_s = arrivals_at(qps, seconds, seed, arrivals_s)
        results[name] = run_open_loop(submit, requests, due_s)
        advance()
    return results
