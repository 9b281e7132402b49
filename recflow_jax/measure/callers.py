"""Who sends requests to a server: this process, or others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import Arrivals, LoadResult, Submit, run_open_loop
from recflow_jax.measure.requests import arrivals_at, saturated


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
        inside = self.in_flight_samples
        return saturated(self.submit, self.requests, in_flight_samples=inside, seconds=seconds)

    def offer(self, qps: float, seconds: float, seed: int) -> LoadResult:
        """One after the other, as they are due."""
        due_s = arrivals_at(qps, seconds, seed, self.arrivals_s)
        return run_open_loop(self.submit, self.requests, due_s)
