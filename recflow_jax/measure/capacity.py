"""How many GPUs a load needs, by simulation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from recflow_jax.measure.simulated_gpu import Gpu
from recflow_jax.measure.simulation import (
    SimulatedLoad,
    saturation_qps,
    simulate_idle,
    simulate_load,
)
from recflow_jax.measure.traffic import Traffic

CLOSE_ENOUGH = 0.01  # of a GPU's load


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
