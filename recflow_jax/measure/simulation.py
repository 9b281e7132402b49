"""What a profile table foretells of one GPU: the latency at a load, and the steps that it takes.

Nothing runs here but the scheduler, on a virtual clock, under two policies: the engine's
incremental batching by its plans, and serial batching with the same device and host.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from recflow_jax.measure.load import WARM_UP_SHARE
from recflow_jax.measure.simulated_gpu import Gpu
from recflow_jax.measure.traffic import ALONE_US, Traffic
from recflow_jax.measure.tuning import best_collecting
from scheduling import Collecting, Request, SimulatedRun, StepShape

INCREMENTAL, SERIAL = "incremental", "serial"
SATURATING_BATCHES = 20
SATURATING = Collecting(wait_ms=0, in_flight=2)

Requests = Callable[[], Iterator[Request]]


@dataclass(frozen=True, kw_only=True)
class StepUse:
    """Steps of one kind: their share of all steps.

    segments: the cut that their segment is of; None: a slice alone. slice_samples: the bucket of
    their slice; None: a segment alone. ride: how they co-run; None: one after the other.
    """

    segments: int | None
    slice_samples: int | None
    ride: str | None
    share: float


@dataclass(frozen=True, kw_only=True)
class SimulatedLoad:
    """One GPU at one load; times and rates are less the first tenth of the requests.

    batches: how many ran, by bucket. steps: what was launched, the most frequent first.
    collecting: how serial batching collected; None for incremental batching.
    """

    qps: float
    requests: int
    answered_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p99_9_ms: float
    mean_wait_ms: float
    mean_batch: float
    batches: Mapping[int, int]
    steps: Sequence[StepUse]
    device_busy_share: float
    launcher_busy_share: float
    collecting: Collecting | None = None

    @property
    def kept_up(self) -> bool:
        """Whether answers came about as fast as requests: if not, latency grows with the run."""
        return self.answered_per_s >= 0.95 * self.qps


def simulate_load(gpu: Gpu, policy: str, traffic: Traffic, qps: float) -> SimulatedLoad:
    """Requests at `qps` per second."""
    return _served(gpu, policy, partial(traffic.at_rate, qps), qps)


def simulate_idle(gpu: Gpu, policy: str, traffic: Traffic) -> SimulatedLoad:
    """Each request alone: no load is faster."""
    return _served(gpu, policy, traffic.alone, 1e6 / ALONE_US)


def saturation_qps(gpu: Gpu, policy: str, traffic: Traffic) -> float:
    """Requests per second when more than enough are waiting."""
    fresh = gpu.incremental() if policy == INCREMENTAL else gpu.serial(SATURATING)
    arrivals = traffic.at_once(SATURATING_BATCHES * gpu.sizes.largest_batch)
    return gpu.run(fresh, arrivals).requests_per_s


def simulate_batching(
    gpu: Gpu, collecting: Collecting | None, requests: Iterator[Request], qps: float
) -> SimulatedLoad:
    """These requests, at so many per second; None batches incrementally."""
    policy = gpu.incremental() if collecting is None else gpu.serial(collecting)
    return replace(_summary(gpu.run(policy, requests), qps), collecting=collecting)


def _served(gpu: Gpu, policy: str, requests: Requests, qps: float) -> SimulatedLoad:
    if policy == INCREMENTAL:
        return simulate_batching(gpu, None, requests(), qps)

    def serial(collecting: Collecting) -> SimulatedLoad:
        return simulate_batching(gpu, collecting, requests(), qps)

    if gpu.serial_wait_ms is not None:
        return serial(Collecting(wait_ms=gpu.serial_wait_ms))
    return best_collecting(serial, gpu.sizes.batch_buckets)[1]


def _summary(done: SimulatedRun, qps: float) -> SimulatedLoad:
    counted = slice(int(WARM_UP_SHARE * len(done.samples)), None)
    latencies_ms = done.latencies_us[counted] / 1000
    p50, p95, p99, p99_9 = np.percentile(latencies_ms, [50, 95, 99, 99.9]).tolist()
    span_us = float(done.answered_us[counted].max() - done.arrived_us[counted][0])
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
        steps=_uses(done.steps_by_shape),
        device_busy_share=done.device_busy_share,
        launcher_busy_share=done.launcher_busy_share,
    )


def _uses(steps_by_shape: Mapping[StepShape, int]) -> list[StepUse]:
    counts: Counter[tuple[int | None, int | None, str | None]] = Counter()
    for step, count in steps_by_shape.items():
        cut, samples = step.segment and step.segment.segments, step.slice and step.slice.samples
        counts[cut, samples, step.co_run] += count
    return [
        StepUse(segments=cut, slice_samples=samples, ride=ride, share=count / counts.total())
        for (cut, samples, ride), count in counts.most_common()
    ]


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
