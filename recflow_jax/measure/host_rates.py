"""What the host's work costs here: the rates that a simulation of this machine needs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.staging import Buffer
from recflow_jax.measure.host import HostResult, Stages, bench_host
from recflow_jax.measure.load import run_open_loop
from recflow_jax.measure.timing import Timed, TimingOptions, launch_us
from scheduling import HostCosts, SegmentShape, SliceBucket

STAGES = TimingOptions(rounds=3, round_s=0.1, max_calls=100_000)
CALLS = 30
SLEEP_S = 0.001
LEAST_US = 1e-3
ALONE_REQUESTS = 200
ALONE_SPACING = 4  # of their latency, so that they do not meet


def measured_rates(
    segments: Segments, requests: Sequence[JaggedBatch], *, ids: str, seed: int
) -> HostCosts:
    """All but `answer_us`: the engine's own stages on a device that is done at once, of requests
    that have to be copied if some of these have, and launches and copies on this one. The segments
    are compiled, in one cut too.

    Requests that come one at a time have a step each, at saturation many share one: so what a step
    costs is told from what its requests do.
    """
    mean = max(round(np.mean([request.samples for request in requests])), 1)
    given_as = "batch" if any(r.values.flags.writeable for r in requests) else "frozen"
    bench = partial(bench_host, segments.config, (1, 2 * mean), ways=[given_as], ids=ids, seed=seed)
    crowded, alone = bench(options=STAGES), bench(options=STAGES, in_flight=1)
    submit_us, submit_sample_us = _line(
        *((result.request_samples, result.stages.submit_us) for result in crowded)
    )
    both = [*crowded, *alone]
    step_us, request_us, sample_us = _by_steps(both, lambda s: s.pack_us + s.launch_us)
    end_us, resolve_us, resolve_sample_us = _by_steps(both, lambda stages: stages.resolve_us)
    host = HostCosts(
        wake_us=_oversleep_us(),
        submit_us=submit_us,
        submit_sample_us=submit_sample_us,
        step_us=step_us,
        request_us=request_us,
        sample_us=sample_us,
        id_us=0.0,
        end_us=end_us,
        resolve_us=resolve_us + mean * resolve_sample_us,
        answer_us=0.0,
    )
    return _with_launches(host, segments)


def with_answers(
    host: HostCosts,
    engine: Engine,
    requests: Sequence[JaggedBatch],
    idle_ms: Callable[[HostCosts, np.ndarray], float],
) -> HostCosts:
    """`host` with the `answer_us` that an idle engine has: what its median latency is longer than
    `idle_ms` foretells for these arrivals, in seconds.
    """
    alone_s = ALONE_SPACING * _latency_s(engine, requests)
    due_s = alone_s * np.arange(ALONE_REQUESTS)
    measured_ms = run_open_loop(engine.submit, requests, due_s).p50_ms
    return replace(host, answer_us=1000 * max(measured_ms - idle_ms(host, due_s), 0.0))


def _latency_s(engine: Engine, requests: Sequence[JaggedBatch]) -> float:
    return _median_us(lambda i: engine.submit(requests[i % len(requests)]).result()) / 1e6


def _by_steps(
    results: Sequence[HostResult], stage_us: Callable[[Stages], float]
) -> tuple[float, float, float]:
    """Microseconds per step, per request and per sample, none below 0, with the least squares of
    relative errors.
    """
    found_us = np.maximum([stage_us(result.stages) for result in results], LEAST_US)
    counts = np.array([(r.request_samples / r.mean_batch, 1, r.request_samples) for r in results])
    fit, *_ = np.linalg.lstsq(counts / found_us[:, None], np.ones(len(results)))
    step_us, request_us, sample_us = np.maximum(fit, 0).tolist()
    return step_us, request_us, sample_us


def _line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Offset and slope, neither below 0, of the line through two points."""
    (x0, y0), (x1, y1) = first, second
    slope = max((y1 - y0) / (x1 - x0), 0.0) if x1 > x0 else 0.0
    return max(y0 - slope * x0, 0.0), slope


def _with_launches(host: HostCosts, segments: Segments) -> HostCosts:
    """With launch_us, hand_over_us and byte_us."""
    sizes = segments.slice_buckets
    arrays = [_empty(segments, size) for size in (sizes[0], sizes[-1])]
    calls = [(array.nbytes, _embed_us(segments, array)) for array in arrays]
    copies = [(array.nbytes, _copy_us(array)) for array in arrays]
    embed_us, hand_over_us = _line(*calls)
    _, copy_us = _line(*copies)
    return replace(
        host,
        launch_us=(embed_us + _start_us(segments)) / 2,
        hand_over_us=hand_over_us,
        byte_us=max(copy_us - hand_over_us, 0.0),
    )


def _empty(segments: Segments, size: SliceBucket) -> np.ndarray:
    return Buffer.of(segments.staging.shape(size)).array


def _embed_us(segments: Segments, packed: np.ndarray) -> float:
    """Of the call alone."""
    state = segments.new_state()

    def call(_: int) -> Any:
        nonlocal state
        state = segments.embed(state, packed)
        return state.landed

    return _median_us(call)


def _start_us(segments: Segments) -> float:
    """Of the call alone."""
    state = segments.new_state()
    shape = SegmentShape(segments=1, index=0, batch=segments.batch_buckets[0])

    def call(_: int) -> Any:
        nonlocal state
        x, state = segments.start(shape, state)
        return x

    return _median_us(call)


def _oversleep_us() -> float:
    """How much later than it asked a thread wakes."""
    return max(_median_us(lambda _: time.sleep(SLEEP_S)) - 1e6 * SLEEP_S, 0.0)


def _copy_us(packed: np.ndarray) -> float:
    return _median_us(lambda _: jax.block_until_ready(jax.device_put(packed)))


def _median_us(call: Callable[[int], Any]) -> float:
    """Of CALLS calls, each begun when what the one before gave has been waited for."""
    return launch_us(Timed(launch=call), rounds=CALLS)
