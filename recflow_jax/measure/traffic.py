"""Requests to simulate with: arrival times, sizes and ids of one model, without the ids' values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import bag_lengths, request_sizes
from recflow_jax.measure.load import burst_arrivals_s, poisson_arrivals_s
from scheduling import Request

LEAST_REQUESTS = 10_000  # so that a hundred are slower than the p99
POOL_SAMPLES = 4096
ALONE_US = 10_000_000


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
