"""What a profile table foretells of an online run, for the very same arrivals and requests."""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.planning import pipeline_config, plans_of
from recflow_jax.engine.profiles import load_profile
from recflow_jax.engine.segments import Segments
from recflow_jax.measure.host_rates import measured_rates, with_answers
from recflow_jax.measure.load import LoadResult
from recflow_jax.measure.simulated_gpu import Gpu, host_of
from recflow_jax.measure.simulation import SATURATING_BATCHES, SimulatedLoad, simulate_batching
from scheduling import (
    Collecting,
    HostCosts,
    ProfileTable,
    Request,
    SimulatedRun,
    TablePlans,
    TableTimes,
)

DEVICE_BOUND = 0.9  # of the time
SLOWEST, SLOWNESS_STEPS = 4.0, 10


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """Latencies of one contender at one load, and how they compare: foretold / measured. Which of
    the two limits it, device or host, say the parts of the time in which each is at work.
    """

    p50_ms: float
    p99_ms: float
    p50_ratio: float
    p99_ratio: float
    device_busy_share: float
    launcher_busy_share: float

    @classmethod
    def of(cls, foretold: SimulatedLoad, measured: LoadResult) -> "Foretold":
        return cls(
            p50_ms=foretold.p50_ms,
            p99_ms=foretold.p99_ms,
            p50_ratio=foretold.p50_ms / measured.p50_ms,
            p99_ratio=foretold.p99_ms / measured.p99_ms,
            device_busy_share=foretold.device_busy_share,
            launcher_busy_share=foretold.launcher_busy_share,
        )


class Foreteller:
    """Simulates engines on some segments by their profile table, with a host as measured here.

    Raises ProfileTableError for a table of something else.
    """

    def __init__(self, segments: Segments, profile: ProfileTable, host: HostCosts) -> None:
        self.host = host_of(segments.config, host)
        self._segments = segments
        self._table = load_profile(profile, segments)
        self._plans = plans_of(segments, segments.options, self._table)

    @classmethod
    def calibrated(
        cls,
        segments: Segments,
        profile: ProfileTable,
        engine: Engine,
        requests: Sequence[JaggedBatch],
        *,
        ids: str,
        seed: int,
    ) -> "Foreteller":
        """Measures the host for a few seconds, on the idle engine too."""

        rates = measured_rates(segments, requests, ids=ids, seed=seed)
        teller = cls(segments, profile, rates)

        def idle_ms(host: HostCosts, due_s: np.ndarray) -> float:
            return teller._on(host).foretell(None, requests, due_s).p50_ms

        return teller._on(with_answers(teller.host, engine, requests, idle_ms))

    def saturating_at(self, qps: float, requests: Sequence[JaggedBatch]) -> "Foreteller":
        """With a host as much slower as it is where `qps` requests per second are the most that the
        engine answers: under load it is slower than its stages one by one. The same where the
        device is the bottleneck.
        """
        if self._saturated(1.0, requests).device_busy_share > DEVICE_BOUND:
            return self
        least, most = 1.0, SLOWEST
        for _ in range(SLOWNESS_STEPS):
            factor = (least + most) / 2
            is_slow = self._saturated(factor, requests).requests_per_s < qps
            least, most = (least, factor) if is_slow else (factor, most)
        return self._on(self.host.slower(least))

    def _saturated(self, slowness: float, requests: Sequence[JaggedBatch]) -> SimulatedRun:
        """With more than enough waiting."""
        gpu = self._on(self.host.slower(slowness))._gpu
        samples = SATURATING_BATCHES * gpu.sizes.largest_batch
        count = math.ceil(samples / np.mean([request.samples for request in requests]))
        return gpu.run(gpu.incremental(), arriving(requests, np.zeros(count)))

    def foretell(
        self,
        collecting: Collecting | None,
        requests: Sequence[JaggedBatch],
        due_s: Float[np.ndarray, " arrivals"],
    ) -> SimulatedLoad:
        """What `run_open_loop` would measure; None batches incrementally."""
        qps = len(due_s) / max(float(due_s[-1]), 1e-9)
        return simulate_batching(self._gpu, collecting, arriving(requests, due_s), qps)

    def _on(self, host: HostCosts) -> "Foreteller":
        """The same with another host; plans need not be made again."""
        other = copy(self)
        other.host = host
        return other

    @property
    def _gpu(self) -> Gpu:
        assert isinstance(self._plans, TablePlans)
        sizes = pipeline_config(self._segments, self._plans)
        times = TableTimes(self._table)
        return Gpu(sizes=sizes, plans=self._plans, times=times, host=self.host)


def arriving(
    requests: Sequence[JaggedBatch], due_s: Float[np.ndarray, " arrivals"]
) -> Iterator[Request]:
    """Request i % len(requests) at due_s[i], as the scheduler knows it."""
    offsets = [np.asarray(r.offsets[:: r.features], np.int64) for r in requests]
    for index, due in enumerate(due_s.tolist()):
        of_ids = offsets[index % len(requests)]
        yield Request(
            id=index, samples=len(of_ids) - 1, id_offsets=of_ids, arrived_us=int(1e6 * due)
        )
