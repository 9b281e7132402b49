"""How many GPUs a load needs, by simulation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from recflow_jax.measure.search import largest_load
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

    Both None where no load holds it, as when even requests alone have a larger one: `idle_p99_ms`.
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
    largest = 0.0
    if idle_ms <= p99_ms:
        most = min(saturation_qps(gpu, policy, traffic), qps)
        largest = largest_load(lambda q: load(q).p99_ms <= p99_ms, most, within=CLOSE_ENOUGH)
    if not largest:
        return Capacity(p99_ms=p99_ms, idle_p99_ms=idle_ms, gpus=None, each=None)
    gpus = math.ceil(qps / largest)
    while (each := load(qps / gpus)).p99_ms > p99_ms:
        gpus += max(1, int(CLOSE_ENOUGH * gpus))
    return Capacity(p99_ms=p99_ms, idle_p99_ms=idle_ms, gpus=gpus, each=each)
