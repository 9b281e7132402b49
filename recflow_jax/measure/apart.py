"""Front ends in processes of their own, all at once: what they are answered, and how soon."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import MLPERF_REQUEST_SIZES
from recflow_jax.measure.caller_process import Pool, call_engine
from recflow_jax.measure.load import (
    Arrivals,
    LoadError,
    LoadResult,
    Offered,
    poisson_arrivals_s,
)
from recflow_jax.measure.online import check_found
from recflow_jax.model import Params
from recflow_jax.remote.arena import SLOTS

PATIENCE_S = 120.0
MOST_QUEUED = 2**20  # samples in the engine: each front end has several bundles inside

Check = Callable[[Sequence[JaggedBatch], Sequence[np.ndarray]], None]
"""Is shown requests and their answers, and raises WrongAnswers."""


@dataclass(frozen=True, kw_only=True)
class ApartPoint:
    """Poisson arrivals of `qps` requests per second in all, the same share from each front end: of
    them, all that was answered, and the latencies of the one that fared worst.
    """

    share: float
    qps: float
    answered_per_s: float
    failed: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class ApartResult:
    """So many front ends at once. saturation: requests per second that they are answered together
    while each has `in_flight_samples` inside.
    """

    front_ends: int
    in_flight_samples: int
    saturation: float
    points: tuple[ApartPoint, ...]


def bench_apart(
    pool: Pool,
    front_ends: int,
    *,
    in_flight_samples: int,
    loads: Sequence[float],
    seconds: float,
    check: Check,
) -> ApartResult:
    """Starts so many front ends, whose answers `check` is shown before anything is timed; saturates
    the engine through all of them, and offers these shares of that. Raises LoadError for one that
    stopped, and what `check` does.
    """
    with apart(pool, front_ends, in_flight_samples=in_flight_samples, check=check) as callers:
        saturation = callers.saturate(seconds)
        points = tuple(_point(callers, share, share * saturation, seconds) for share in loads)
    return ApartResult(
        front_ends=front_ends,
        in_flight_samples=in_flight_samples,
        saturation=saturation,
        points=points,
    )


def check_fits(request_samples: int | None, max_batch: int) -> None:
    """Raises ValueError where a front end would refuse requests of a Pool."""
    largest = request_samples or max(MLPERF_REQUEST_SIZES)
    if largest > max_batch:
        raise ValueError(
            f"requests of up to {largest} samples: a front end passes on no more than the largest "
            f"batch, {max_batch}, at once (request_samples asks for smaller ones)"
        )


def check_answers_of(
    name: str,
    config: DLRMConfig,
    params: Params,
    requests: Sequence[JaggedBatch],
    answers: Sequence[np.ndarray],
) -> None:
    """A Check, with the first three given."""
    check_found(config, params, requests, {name: np.concatenate(answers)})


def saturating_samples(max_batch: int) -> int:
    """Inside, of a front end: what is under way, and what waits for it."""
    return (SLOTS + 1) * max_batch


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Front ends as callers, all at once. in_flight_samples: of each, to saturate. arrivals_s: what
    draws the times of arrival.
    """

    pipes: Sequence[Connection]
    in_flight_samples: int
    arrivals_s: Arrivals

    def saturate(self, seconds: float) -> float:
        """Requests per second that all are answered together. Raises LoadError."""
        return sum(_all(self.pipes, ("saturate", self.in_flight_samples, seconds)))

    def offer(self, qps: float, seconds: float, seed: int) -> LoadResult:
        """Arrivals of `qps` requests per second in all, the same share from each. Raises
        LoadError.
        """
        return LoadResult.of(Offered.joined(self.offered(qps, seconds, seed)))

    def offered(self, qps: float, seconds: float, seed: int) -> list[Offered]:
        """As `offer`, front end by front end."""
        rate = qps / len(self.pipes)
        return _all(self.pipes, ("offer", rate, seconds, seed, self.arrivals_s))


@contextmanager
def apart(
    pool: Pool,
    front_ends: int,
    *,
    in_flight_samples: int,
    check: Check,
    arrivals_s: Arrivals = poisson_arrivals_s,
) -> Iterator[Apart]:
    """So many front ends, whose answers `check` is shown first. Raises LoadError for one that
    stopped, and what `check` does.
    """
    with _started(pool, front_ends) as pipes:
        for pipe in pipes:
            check(*_heard(pipe))
        yield Apart(pipes=pipes, in_flight_samples=in_flight_samples, arrivals_s=arrivals_s)


def _point(callers: Apart, share: float, qps: float, seconds: float) -> ApartPoint:
    found = [LoadResult.of(offered) for offered in callers.offered(qps, seconds, 0)]
    return ApartPoint(
        share=share,
        qps=qps,
        answered_per_s=sum(one.answered_per_s for one in found),
        failed=sum(one.failed for one in found),
        p50_ms=max(one.p50_ms for one in found),
        p99_ms=max(one.p99_ms for one in found),
    )


def _all(pipes: Sequence[Connection], command: tuple[Any, ...]) -> list[Any]:
    """What each makes of it, all at once."""
    for pipe in pipes:
        pipe.send(command)
    return [_heard(pipe) for pipe in pipes]


def _heard(pipe: Connection) -> Any:
    try:
        if pipe.poll(PATIENCE_S):
            return pipe.recv()
    except EOFError as error:
        raise LoadError("a front end's process stopped; what it said is above") from error
    raise LoadError(f"a front end said nothing for {PATIENCE_S:g} s")


@contextmanager
def _started(pool: Pool, count: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for number in range(count):
            pipe, other = context.Pipe()
            of = (pool, number, other)
            process = context.Process(target=call_engine, args=of, daemon=True)
            process.start()
            other.close()
            pipes.append(pipe)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(PATIENCE_S)
