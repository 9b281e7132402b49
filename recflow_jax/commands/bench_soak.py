"""`recflow bench soak`: a server under load for long, among clients that misbehave."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from recflow_jax.backend import choose_backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.calibration import ready
from recflow_jax.commands.bench import finish
from recflow_jax.commands.bench_serve import clients, own_server
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import report
from recflow_jax.measure.agreement import reference_scores
from recflow_jax.measure.launched import SHARING, Launched
from recflow_jax.measure.memory import Memory, sampled
from recflow_jax.measure.requests import request_pool
from recflow_jax.measure.scraped import Scraped, final_counts
from recflow_jax.measure.soak import Crowd, send_crowd, tolerance, wrong_request
from recflow_jax.measure.soaked import SoakResult
from recflow_jax.params import init_params

TOLD_EVERY = 30  # samples of memory


class SoakFailed(RuntimeError):
    """Memory grew, or a request had no end, two ends or the wrong one."""


def bench_soak(
    config: DLRMConfig,
    *,
    engine: EngineOptions,
    minutes: float = 10,
    qps: float = 100,
    request_samples: int = 16,
    profile: Path | None = None,
    ids: str = "uniform",
    seed: int = 0,
    out: Path | None = None,
    figure: Path | None = None,
) -> dict[str, Any]:
    """Loads a server of its own, prints how it does, writes JSON and figure; returns the JSON.

    Raises SoakFailed when all is written, NotLaunched, LoadError if a request has no end, Missing
    where the memory of another process cannot be seen, and ValueError for no load.
    """
    if not (minutes > 0 and qps > 0):
        raise ValueError(f"soak: {minutes} minutes at {qps} requests per second are no load")
    os.environ.update(SHARING)
    params = init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    requests = request_pool(config, ids=ids, seed=seed, request_samples=request_samples)
    result = report.header(
        config, choose_backend(engine.backend), ids=ids, seed=seed, versions=versions()
    )
    everything = JaggedBatch.join(requests)
    reference = reference_scores(config, params, everything, samples=everything.samples)
    expected = np.split(reference, np.cumsum([r.samples for r in requests])[:-1])
    wrong = wrong_request(requests[0])
    with own_server(config, params, engine, profile) as server:
        with clients(server, config, [*requests, wrong]) as asked:
            crowd = Crowd(
                submits=[*asked.values()],
                requests=requests,
                expected=expected,
                wrong=wrong,
                http_port=server.http_port,
                model=server.model,
                tolerance=tolerance(config, expected),
            )
            soaked = _soak(server, crowd, qps, 60 * minutes, seed)
    console.print(report.soak_line(soaked), markup=False)
    soak = report.as_json(soaked) | {"request_samples": request_samples}
    finish(result | {"soak": soak}, out, figure)
    if not soaked.passed:
        raise SoakFailed(
            f"memory flat: {soaked.flat}; ends as they should be: {soaked.as_expected}"
        )
    return result | {"soak": soak}


def _soak(server: Launched, crowd: Crowd, qps: float, seconds: float, seed: int) -> SoakResult:
    every_s, samples = min(1.0, seconds / 40), itertools.count(1)
    with progress("soaking", round(seconds / every_s)) as advance:

        def tell(memory: Memory) -> None:
            advance()
            if next(samples) % TOLD_EVERY == 0:
                console.print(
                    f"{memory.at_s:4.0f} s: {memory.rss_bytes / 2**20:,.1f} MiB resident",
                    markup=False,
                )

        with sampled(
            server.process_id,
            lambda: Scraped(server.http_port).device_bytes,
            every_s=every_s,
            on_sample=tell,
        ) as memory:
            ends = send_crowd(crowd, qps, seconds, seed=seed)
    return SoakResult(
        seconds=seconds,
        qps=qps,
        sent=dict(ends.sent),
        ends=dict(ends.ends),
        server=final_counts(server.http_port),
        memory=tuple(memory),
    )
