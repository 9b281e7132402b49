"""What callers send, and when: nothing here needs JAX, as little as a front end does."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate, request_sizes
from recflow_jax.measure.load import Arrivals, Submit, saturation_samples_per_s

POOL_REQUESTS = 64
LEAST_ARRIVALS = 20
LONGEST_TRY = 5  # times its seconds


def request_pool(
    config: DLRMConfig, *, ids: str, seed: int, request_samples: int | None = None
) -> list[JaggedBatch]:
    """Requests to send in turn, of MLPerf's sizes or all of `request_samples`, frozen as a server's
    are.
    """
    sizes = request_sizes(POOL_REQUESTS, seed=seed).tolist()
    if request_samples:
        sizes = [request_samples] * POOL_REQUESTS
    ends = np.cumsum([0, *sizes]).tolist()
    batch = generate(config, ends[-1], seed=seed, ids=ids)
    return [batch.part(a, b).frozen() for a, b in zip(ends, ends[1:], strict=False)]


def mean_samples(requests: Sequence[JaggedBatch]) -> float:
    """Samples per request."""
    return float(np.mean([request.samples for request in requests]))


def saturated(
    submit: Submit, requests: Sequence[JaggedBatch], *, in_flight_samples: int, seconds: float
) -> float:
    """Requests per second that are answered while so many samples are inside. Raises LoadError."""
    limits = {"in_flight_samples": in_flight_samples, "seconds": seconds}
    return saturation_samples_per_s(submit, requests, **limits) / mean_samples(requests)


def arrivals_at(
    qps: float, seconds: float, seed: int, arrivals_s: Arrivals
) -> Float[np.ndarray, " arrivals"]:
    """When requests are due, in seconds from the start; a few at least."""
    return arrivals_s(qps, max(int(qps * seconds), LEAST_ARRIVALS), seed=seed)


def least_qps(seconds: float) -> float:
    """The lowest rate to try for `seconds`: at lower ones a few arrivals take far longer."""
    return LEAST_ARRIVALS / (LONGEST_TRY * seconds)
