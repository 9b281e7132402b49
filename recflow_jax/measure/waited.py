"""How long requests waited for their first launch, in microseconds and in steps that ended."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Real

from recflow_jax.engine.stats import Waits

US_EDGES = np.geomspace(1, 1e5, 41)
STEPS_EDGES = np.arange(-0.5, 11)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """counts[i] values lie in edges[i] to edges[i + 1]; the first and the last also hold those
    outside.
    """

    edges: list[float]
    counts: list[int]
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Real[np.ndarray, " count"], edges: Float[np.ndarray, " edges"]) -> Self:
        """At least one value."""
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
        return cls(
            edges=edges.tolist(),
            counts=counts.tolist(),
            p50=p50,
            p95=p95,
            p99=p99,
            max=float(values.max()),
        )


@dataclass(frozen=True, kw_only=True)
class Waited:
    """Of one run. within_a_step: the part of the requests that waited for one step at most."""

    requests: int
    within_a_step: float
    us: Histogram
    steps: Histogram

    @classmethod
    def of_last(cls, waits: Waits, requests: int) -> Self:
        """Of the last so many requests."""
        us, steps = waits.us[-requests:], waits.steps[-requests:]
        return cls(
            requests=len(us),
            within_a_step=float(np.mean(steps <= 1)),
            us=Histogram.of(us, US_EDGES),
            steps=Histogram.of(steps, STEPS_EDGES),
        )
