"""Front ends in processes of their own, all at once: what they are answered, and how soon."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.contenders import RECFLOW
from recflow_jax.measure.load import LoadError, LoadResult, saturation_samples_per_s
from recflow_jax.measure.online import mean_samples, offer, request_pool
from recflow_jax.remote.front_end import FrontEnd

PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where front ends find their engine, and what they ask: see `request_pool`. seed: of the first
    one's requests; the others' are drawn from those that follow.
    """

    path: Path
    ids: str
    seed: int
    request_samples: int | None

    def requests(self, config: Any, number: int) -> list[JaggedBatch]:
        """Of front end `number`."""
        return request_pool(
            config, ids=self.ids, seed=self.seed + number, request_samples=self.request_samples
        )


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
    check: Callable[[Sequence[JaggedBatch], Sequence[np.ndarray]], None],
) -> ApartResult:
    """Starts so many front ends, whose answers `check` is shown before anything is timed; saturates
    the engine through all of them, and offers these shares of that. Raises LoadError for one that
    stopped, and what `check` does.
    """
    with _started(pool, front_ends) as pipes:
        for pipe in pipes:
            check(*_heard(pipe))
        rates = _all(pipes, ("saturate", in_flight_samples, seconds))
        saturation = sum(rates)
        points = tuple(_offered(pipes, share, share * saturation, seconds) for share in loads)
    return ApartResult(
        front_ends=front_ends,
        in_flight_samples=in_flight_samples,
        saturation=saturation,
        points=points,
    )


def _offered(pipes: Sequence[Connection], share: float, qps: float, seconds: float) -> ApartPoint:
    found: list[LoadResult] = _all(pipes, ("offer", qps / len(pipes), seconds))
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
        with _no_gpu():
            for number in range(count):
                pipe, other = context.Pipe()
                of = (pool, number, other)
                process = context.Process(target=_front_end, args=of, daemon=True)
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


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Processes that start in here leave the GPU's memory to the engine."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        del os.environ["JAX_PLATFORMS"]
        if before is not None:
            os.environ["JAX_PLATFORMS"] = before


def _front_end(pool: Pool, number: int, pipe: Connection) -> None:
    """In a process of its own: says what it asked and was answered, then does as it is told."""
    with FrontEnd(pool.path) as front_end:
        requests = pool.requests(front_end.config, number)
        answers = [front_end.submit(request) for request in requests]
        pipe.send((requests, [answer.result() for answer in answers]))
        while True:
            try:
                what, rate, seconds = pipe.recv()
            except EOFError:
                return
            if what == "saturate":
                limits = {"in_flight_samples": rate, "seconds": seconds}
                per_s = saturation_samples_per_s(front_end.submit, requests, **limits)
                pipe.send(per_s / mean_samples(requests))
            else:
                servers = {RECFLOW: front_end.submit}
                pipe.send(offer(servers, requests, rate, seconds, number)[RECFLOW])
