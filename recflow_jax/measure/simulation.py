"""What a profile table foretells: latency at a load, and how many GPUs a load needs.

Nothing runs here but the scheduler, on a virtual clock, under two policies: the engine's incremental
batching, and serial batching with the same device and host.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import bag_lengths, request_sizes
from recflow_jax.engine.options import EngineOptions
from recflow_jax.layout import Layout
from recflow_jax.measure.load import WARM_UP_SHARE, burst_arrivals_s, poisson_arrivals_s
from scheduling import (
    HostCosts,
    Pipeline,
    PipelineConfig,
    Policy,
    ProfileKey,
    ProfileTable,
    ProfileTableError,
    Request,
    SerialBatching,
    SimulatedRun,
    SliceBucket,
    StepTimes,
    segment_key,
    simulate,
)

INCREMENTAL, SERIAL = "incremental", "serial"
LEAST_REQUESTS = 10_000  # so that a hundred are slower than the p99
POOL_SAMPLES = 4096
SATURATING_BATCHES = 20
ALONE_US = 10_000_000
CLOSE_ENOUGH = 0.01  # of a GPU's load
MISSING_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests of one model at any rate: the same draws, closer together or further apart.

    request_samples: of every request; None draws MLPerf's sizes. burst: see `burst_arrivals_s`.
    A run lasts `seconds` of arrivals, but at least 10,000 requests. Raises ValueError.
    """

    config: DLRMConfig
    request_samples: int | None = None
    burst: bool = False
    seconds: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"traffic: seconds is {self.seconds}, not above 0")

    def at_rate(self, qps: float) -> Iterator[Request]:
        """Requests at `qps` per second on average."""
        count = max(int(qps * self.seconds), LEAST_REQUESTS)
        arrivals_s = burst_arrivals_s if self.burst else poisson_arrivals_s
        return self._at(1e6 * arrivals_s(qps, count, seed=self.seed))

    def alone(self) -> Iterator[Request]:
        """Requests so far apart that each finds an idle GPU."""
        return self._at(ALONE_US * np.arange(LEAST_REQUESTS))

    def at_once(self, samples: int) -> Iterator[Request]:
        """Requests of about so many samples in all, at the same moment."""
        count = math.ceil(samples / self.mean_samples)
        return self._at(np.zeros(count))

    @property
    def mean_samples(self) -> float:
        """Samples per request."""
        return float(self._sizes(LEAST_REQUESTS).mean())

    def _sizes(self, count: int) -> np.ndarray:
        if self.request_samples is None:
            return request_sizes(count, seed=self.seed)
        return np.full(count, self.request_samples)

    def _at(self, times_us: np.ndarray) -> Iterator[Request]:
        """Each takes a run of samples from a pool, from a random one on."""
        sizes = self._sizes(len(times_us))
        rng = np.random.default_rng(self.seed)
        ids = bag_lengths(self.config, POOL_SAMPLES, rng).sum(axis=1)
        laps = 1 + math.ceil(sizes.max() / POOL_SAMPLES)
        ends = np.concatenate([[0], np.cumsum(np.tile(ids, laps))])
        firsts = rng.integers(POOL_SAMPLES, size=len(sizes))
        draws = zip(times_us.tolist(), sizes.tolist(), firsts.tolist(), strict=True)
        for id, (time_us, samples, first) in enumerate(draws):
            offsets = ends[first : first + samples + 1] - ends[first]
            yield Request(id=id, samples=samples, id_offsets=offsets, arrived_us=int(time_us))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One engine, as its times tell. wait_ms: how long serial batching collects."""

    sizes: PipelineConfig
    times: StepTimes
    host: HostCosts
    wait_ms: float = 2.0

    def run(self, policy: str, requests: Iterator[Request]) -> SimulatedRun:
        """All requests under one of the two policies."""
        return simulate(self._policy(policy), requests, times=self.times, host=self.host)

    def _policy(self, policy: str) -> Policy:
        if policy == INCREMENTAL:
            return Pipeline(self.sizes)
        return SerialBatching(self.sizes, wait_us=round(1000 * self.wait_ms))


def sizes_of(table: ProfileTable, *, complete: bool = True) -> PipelineConfig:
    """The pipeline that a table was measured for. Raises ProfileTableError if rows are missing.

    complete: every segment of every batch size has to be there.
    """
    slices = {
        (row.slice_samples, row.slice_ids): SliceBucket(
            samples=row.slice_samples, ids=row.slice_ids
        )
        for row in table.rows
        if row.kind == "slice" and row.slice_samples and row.slice_ids
    }
    of_batches = [row for row in table.rows if row.kind == "segment" and row.batch is not None]
    if not slices or not of_batches:
        raise ProfileTableError(_lacking(table, "slices" if not slices else "segments"))
    sizes = PipelineConfig(
        batch_buckets=tuple(sorted({row.batch for row in of_batches if row.batch})),
        slice_buckets=tuple(slices[size] for size in sorted(slices)),
        segments=1 + max(row.segment or 0 for row in of_batches),
        max_steps_in_flight=EngineOptions.max_steps_in_flight,
    )
    if complete:
        _check_segments(table, sizes)
    return sizes


def _check_segments(table: ProfileTable, sizes: PipelineConfig) -> None:
    needed = [segment_key(i, n) for n in sizes.batch_buckets for i in range(sizes.segments)]
    if missing := [key for key in needed if not table.has(key)]:
        raise ProfileTableError(_lacking(table, _named(missing)))


def _named(missing: list[ProfileKey]) -> str:
    named = ", ".join(str(key) for key in missing[:MISSING_NAMED])
    return named + (f" and {len(missing) - MISSING_NAMED} more" * (len(missing) > MISSING_NAMED))


def _lacking(table: ProfileTable, what: str) -> str:
    return f"profile table lacks {what}. Measure it: recflow profile --model {table.model}"


def host_of(config: DLRMConfig, rates: HostCosts) -> HostCosts:
    """`rates` with the bytes that a slice of this model takes: per id its row (and weight), per
    sample its dense features and one offset per slot.
    """
    return HostCosts(
        launch_us=rates.launch_us,
        sample_us=rates.sample_us,
        id_us=rates.id_us,
        byte_us=rates.byte_us,
        answer_us=rates.answer_us,
        bytes_per_sample=4 * (config.dense_width + len(Layout.of(config).slots)),
        bytes_per_id=8 if config.weighted else 4,
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedLoad:
    """One GPU at one load, less the first tenth of the requests. `batches` counts them by bucket."""

    qps: float
    requests: int
    answered_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p99_9_ms: float
    mean_wait_ms: float
    mean_batch: float
    batches: dict[int, int]
    device_busy_share: float
    launcher_busy_share: float

    @property
    def kept_up(self) -> bool:
        """Whether answers came about as fast as requests: if not, latency grows with the run."""
        return self.answered_per_s >= 0.95 * self.qps


def simulate_load(gpu: Gpu, policy: str, traffic: Traffic, qps: float) -> SimulatedLoad:
    """Requests at `qps` per second."""
    return _summary(gpu.run(policy, traffic.at_rate(qps)), qps)


def simulate_idle(gpu: Gpu, policy: str, traffic: Traffic) -> SimulatedLoad:
    """Each request alone: no load is faster."""
    return _summary(gpu.run(policy, traffic.alone()), 1e6 / ALONE_US)


def saturation_qps(gpu: Gpu, policy: str, traffic: Traffic) -> float:
    """Requests per second when more than enough are waiting."""
    samples = SATURATING_BATCHES * gpu.sizes.largest_batch
    done = gpu.run(policy, traffic.at_once(samples))
    return 1e6 * len(done.samples) / done.span_us


def _summary(done: SimulatedRun, qps: float) -> SimulatedLoad:
    counted = slice(int(WARM_UP_SHARE * len(done.samples)), None)
    latencies_ms = done.latencies_us[counted] / 1000
    p50, p95, p99, p99_9 = np.percentile(latencies_ms, [50, 95, 99, 99.9]).tolist()
    span_us = done.answered_us[counted].max() - done.arrived_us[counted][0]
    buckets, counts = np.unique(done.batch_buckets, return_counts=True)
    return SimulatedLoad(
        qps=qps,
        requests=len(done.samples),
        answered_per_s=1e6 * len(latencies_ms) / span_us,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        p99_9_ms=p99_9,
        mean_wait_ms=float(done.waits_us[counted].mean()) / 1000,
        mean_batch=float(done.batch_samples.mean()),
        batches=dict(zip(buckets.tolist(), counts.tolist(), strict=True)),
        device_busy_share=float(done.device_busy_share),
        launcher_busy_share=float(done.launcher_busy_share),
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedPoint:
    """Both policies at one load; `share` of the lower saturation (None for a given rate)."""

    share: float | None
    qps: float
    contenders: Mapping[str, SimulatedLoad]


def simulate_point(
    gpu: Gpu, traffic: Traffic, qps: float, share: float | None = None
) -> SimulatedPoint:
    """The same requests under both policies."""
    both = {policy: simulate_load(gpu, policy, traffic, qps) for policy in (INCREMENTAL, SERIAL)}
    return SimulatedPoint(share=share, qps=qps, contenders=both)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many GPUs answer all requests with a p99 of at most `p99_ms`, and what each then does.

    Both None where even requests alone, one after the other, have a larger one: `idle_p99_ms`.
    """

    p99_ms: float
    idle_p99_ms: float
    gpus: int | None
    each: SimulatedLoad | None


def capacity(
    gpu: Gpu,
    policy: str,
    traffic: Traffic,
    *,
    qps: float,
    p99_ms: float,
    advance: Callable[[], None] = lambda: None,
) -> Capacity:
    """By bisection over the load of one GPU; the arrivals are split evenly and at random.

    Poisson arrivals that are split so are Poisson arrivals at each GPU. `advance` is called after
    each load.
    """

    def load(of_gpu: float) -> SimulatedLoad:
        found = simulate_load(gpu, policy, traffic, of_gpu)
        advance()
        return found

    idle_ms = simulate_idle(gpu, policy, traffic).p99_ms
    if idle_ms > p99_ms:
        return Capacity(p99_ms=p99_ms, idle_p99_ms=idle_ms, gpus=None, each=None)
    most = min(saturation_qps(gpu, policy, traffic), qps)
    gpus = math.ceil(qps / _largest_load(lambda of_gpu: load(of_gpu).p99_ms <= p99_ms, most))
    while (each := load(qps / gpus)).p99_ms > p99_ms:
        gpus += max(1, int(CLOSE_ENOUGH * gpus))
    return Capacity(p99_ms=p99_ms, idle_p99_ms=idle_ms, gpus=gpus, each=each)


def _largest_load(is_fast: Callable[[float], bool], most: float) -> float:
    """The largest load up to `most` that is fast, to a hundredth; one near 0 has to be."""
    if is_fast(most):
        return most
    low, high = 0.0, most
    while high - low > CLOSE_ENOUGH * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_fast(middle) else (low, middle)
    return low
