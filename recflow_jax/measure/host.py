"""What the host does for each request: the engine on a device that is done at once.

Requests are sent as fast as they are answered. The wall clock says what a request costs at
saturation; the clocks of the three threads, which share one interpreter, say where it goes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch, bag_features
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.instant import InstantSegments
from recflow_jax.measure.stream import InFlight
from recflow_jax.measure.timing import Timing, TimingOptions, measure

WAYS = ("batch", "frozen", "features")
REQUESTS_DRAWN = 16
SAMPLES_IN_FLIGHT, MOST_IN_FLIGHT, LEAST_IN_FLIGHT = 32768, 1024, 4
TIMING = TimingOptions(rounds=7, round_s=0.25, max_calls=100_000)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Microseconds of processor time per request. submit: the caller's thread, reading answers too.
    pack, launch: the launcher's thread, filling slices and everything else. resolve: the completion
    thread.
    """

    submit_us: float
    pack_us: float
    launch_us: float
    resolve_us: float

    @property
    def sum_us(self) -> float:
        """Of all threads."""
        return self.submit_us + self.pack_us + self.launch_us + self.resolve_us


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """Requests of one size. `given_as`: "batch" is a JaggedBatch, "frozen" one that is not copied,
    "features" are arrays by name.
    timing: from one answered request to the next, `in_flight` of them inside.
    """

    request_samples: int
    given_as: str
    in_flight: int
    timing: Timing
    stages: Stages
    mean_batch: float

    @property
    def us_per_sample(self) -> float:
        """Microseconds, by the wall clock."""
        return self.timing.median_us / self.request_samples


def bench_host(
    config: DLRMConfig,
    request_sizes: Sequence[int],
    *,
    ids: str,
    seed: int,
    ways: Sequence[str] = WAYS,
    in_flight: int | None = None,
    options: TimingOptions = TIMING,
    advance: Callable[[], None] = lambda: None,
) -> list[HostResult]:
    """Times requests of each size, given in each way; `advance` is called after each size.

    ways: of WAYS, see HostResult. in_flight: requests inside at a time; None: as many as make the
    host the bottleneck.
    """
    results = []
    for samples in request_sizes:
        batches = [generate(config, samples, seed=seed + i, ids=ids) for i in range(REQUESTS_DRAWN)]
        requests = {
            "batch": [(batch,) for batch in batches],
            "frozen": [(batch.frozen(),) for batch in batches],
            "features": [(batch.dense, by_name(config, batch)) for batch in batches],
        }
        inside = in_flight or saturating(samples)
        results += [_measure(config, samples, how, requests[how], inside, options) for how in ways]
        advance()
    return results


@contextmanager
def computing() -> Iterator[None]:
    """Beside a thread that keeps Python's interpreter for as long as it may, as an application's
    own threads do.
    """
    ended = Event()

    def compute() -> None:
        while not ended.is_set():
            pass

    thread = Thread(target=compute, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def by_name(config: DLRMConfig, batch: JaggedBatch) -> dict[str, Any]:
    """The sparse features of `batch` as `JaggedBatch.from_features` takes them."""
    return {f.name: _feature(config, batch, place) for place, f in enumerate(config.features)}


def _feature(config: DLRMConfig, batch: JaggedBatch, place: int) -> Any:
    mine = bag_features(batch) == place
    lengths = np.diff(batch.offsets)[place :: batch.features]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if batch.weights is not None and config.features[place].weighted:
        return batch.values[mine], offsets, batch.weights[mine]
    return batch.values[mine] if (lengths == 1).all() else (batch.values[mine], offsets)


def saturating(samples: int) -> int:
    """Requests of so many samples that are inside at a time."""
    return min(max(SAMPLES_IN_FLIGHT // samples, LEAST_IN_FLIGHT), MOST_IN_FLIGHT)


def _measure(
    config: DLRMConfig,
    samples: int,
    how: str,
    requests: Sequence[Any],
    most: int,
    options: TimingOptions,
) -> HostResult:
    segments = InstantSegments(config, EngineOptions(max_queued_samples=most * samples))
    with Engine.from_segments(segments) as engine:
        engine.submit(*requests[0]).result()
        before, answered = segments.clocks_us(), engine.stats().requests_answered
        stream = InFlight(
            lambda i: engine.submit(*requests[i % len(requests)]), Answer.result, most
        )
        timing = measure(stream.timed, options)
        after, stats = segments.clocks_us(), engine.stats()
    count = stats.requests_answered - answered
    return HostResult(
        request_samples=samples,
        given_as=how,
        in_flight=most,
        timing=timing,
        stages=Stages(**{name: (after[name] - before[name]) / count for name in after}),
        mean_batch=stats.mean_batch,
    )
