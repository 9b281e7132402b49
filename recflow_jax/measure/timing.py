"""How long calls take on a device: many queued, one wait at the end, medians over rounds.

A device runs what it is given in order, so that a wait for the last call is a wait for all, and
the host's launches hide behind the device's work exactly as far as they do in use. The first call
of each, which compiles, is never timed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

Launch = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How much to measure. A round queues calls for `round_s` at least; there are `rounds` of
    them, fewer (but 2) once a measurement has taken `limit_s`.
    """

    rounds: int = 5
    round_s: float = 0.02
    limit_s: float = 10.0
    max_calls: int = 2000

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.max_calls < 1 or self.round_s < 0 or self.limit_s < 0:
            raise ValueError(f"timing: {self} measures nothing")


STEADY = TimingOptions(round_s=1.0, limit_s=20.0, max_calls=200_000)
"""Rounds of a second, under which a card's power cap lowers its clocks."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile of `samples` rounds of `calls`."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    calls: int

    @classmethod
    def of(cls, rounds_us: Sequence[float], *, calls: int = 1) -> "Timing":
        """The timing of rounds that took `rounds_us` per call. Raises ValueError for none."""
        if not rounds_us:
            raise ValueError("timing: no rounds")
        p10, median, p90 = np.percentile(rounds_us, [10, 50, 90]).tolist()
        return cls(median_us=median, p10_us=p10, p90_us=p90, samples=len(rounds_us), calls=calls)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Something to time: `launch(i)` queues call i and returns what `wait` waits for."""

    launch: Launch
    wait: Callable[[Any], Any] = field(default=jax.block_until_ready)


def launch_us(timed: Timed, *, rounds: int = 20, calls: int = 1) -> float:
    """Microseconds of the host for a call: the median of `rounds`, each of `calls` on a device that
    was idle before. Several calls tell what launches take ahead of a device: a host that has waited
    is slower.
    """
    taken_us = []
    for first in range(0, rounds * calls, calls):
        started = time.perf_counter()
        launched = [timed.launch(call) for call in range(first, first + calls)]
        taken_us.append(1e6 * (time.perf_counter() - started) / calls)
        timed.wait(launched[-1])
    return float(np.median(taken_us))


def kernels_us(timed: Timed, *, calls: int = 5) -> float | None:
    """Microseconds of the kernels of a call on a GPU, however it launches them: the mean over
    `calls`. None where CUPTI saw none, as on a CPU. Not beside another profiler.
    """
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    cupti = getattr(getattr(profiler, "mosaic_gpu_lib", None), "_mosaic_gpu_ext", None)
    if cupti is None:
        return None
    timed.wait(timed.launch(0))
    cupti._cupti_init()
    try:
        for launched in [timed.launch(call) for call in range(calls)]:
            timed.wait(launched)
    finally:
        kernels = cupti._cupti_get_timings(True)
    return 1e3 * sum(taken_ms for _, taken_ms in kernels) / calls if kernels else None


def device_us(
    executable: Any, inputs: Sequence[tuple[Any, ...]], *, calls: int = 10
) -> float | None:
    """Microseconds that an executable's kernels take on a GPU, launches and gaps apart: the median
    over `calls` with each of `inputs`. None where no kernels were seen, as on a CPU.

    By CUPTI, through JAX's Mosaic GPU profiler; not beside another profiler.
    """
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu.profiler import measure

    taken_us: list[float] = []
    for arguments in inputs:
        _, times_ms = measure(executable, iterations=calls)(*arguments)
        taken_us += [1e3 * time_ms for time_ms in times_ms or ()]
    return float(np.median(taken_us)) if taken_us else None


def measure(timed: Timed, options: TimingOptions | None = None) -> Timing:
    """The timing of one thing alone."""
    return measure_side_by_side({"": timed}, options)[""]


def measure_side_by_side(
    contenders: Mapping[str, Timed], options: TimingOptions | None = None
) -> dict[str, Timing]:
    """All timings from one run in which the contenders take turns, round by round.

    A round is turned around from one to the next (A B C, C B A, ...), so that a clock that drifts
    favours nobody.
    """
    options = options or TimingOptions()
    calls = {name: _calls_for(timed, options) for name, timed in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    started = time.perf_counter()
    for done in range(options.rounds):
        if done >= 2 and time.perf_counter() - started > options.limit_s * len(contenders):
            break
        for name in order:
            first = done * calls[name]
            taken[name].append(_round_us(contenders[name], first, calls[name]))
        order.reverse()
    return {name: Timing.of(taken[name], calls=calls[name]) for name in contenders}


def _calls_for(timed: Timed, options: TimingOptions) -> int:
    """Calls that fill a round. What it runs on the way warms everything up."""
    _round_us(timed, 0, 1)
    calls = 1
    while True:
        round_s = calls * _round_us(timed, 0, calls) / 1e6
        if round_s >= options.round_s or calls >= options.max_calls:
            return calls
        growth = min(8, 1.2 * options.round_s / max(round_s, 1e-9))
        calls = min(options.max_calls, math.ceil(calls * growth))


def _round_us(timed: Timed, first: int, calls: int) -> float:
    started = time.perf_counter()
    for call in range(first, first + calls - 1):
        timed.launch(call)
    timed.wait(timed.launch(first + calls - 1))
    return (time.perf_counter() - started) / calls * 1e6
