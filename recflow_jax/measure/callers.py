"""Who sends requests to a server: this process, or others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import (
    Arrivals,
    LoadResult,
    Submit,
    run_open_loop,
    saturation_samples_per_s,
)
from recflow_jax.measure.online import arrivals_at, mean_samples


@runtime_checkable
class Callers(Protocol):
    """All callers of one server. Either raises LoadError."""

    def saturate(self, seconds: float) -> float:
        """Requests per second that are answered while a few batches are inside."""
        ...

    def offer(self, qps: float, seconds: float, seed: int) -> LoadResult:
        """Arrivals of `qps` requests per second, and what became of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """A thread of this process. arrivals_s: what draws the times of arrival."""

    submit: Submit
    requests: Sequence[JaggedBatch]
    in_flight_samples: int
    arrivals_s: Arrivals

    def saturate(self, seconds: float) -> float:
        """With `in_flight_samples` inside."""
        samples_per_s = saturation_samples_per_s(
            *(self.submit, self.requests),
            in_flight_samples=self.in_flight_samples,
            seconds=seconds,
        )
        return samples_per_s / mean_samples(self.requests)

    def offer(self, qps: float, seconds: float, seed: int) -> LoadResult:
        """One after the other, as they are due."""
        due_s = arrivals_at(qps, seconds, seed, self.arrivals_s)
        return run_open_loop(self.submit, self.requests, due_s)
