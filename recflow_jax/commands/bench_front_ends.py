"""`recflow bench front-ends`: requests of other processes, beside those of this one."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from recflow_jax.calibration import ready
from recflow_jax.commands.bench import finish
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import console, progress
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import report
from recflow_jax.measure.apart import (
    MOST_QUEUED,
    bench_apart,
    check_answers_of,
    check_fits,
    saturating_samples,
)
from recflow_jax.measure.caller_process import Pool
from recflow_jax.measure.contenders import RECFLOW
from recflow_jax.measure.online import OnlineOptions, check_served, saturate
from recflow_jax.measure.requests import mean_samples, request_pool
from recflow_jax.params import init_params
from recflow_jax.remote.front_ends import FrontEnds


def bench_front_ends(
    config: DLRMConfig,
    *,
    engine: EngineOptions,
    front_ends: Sequence[int],
    loads: Sequence[float],
    request_samples: int | None = None,
    seconds: float,
    profile: Path | None = None,
    ids: str = "uniform",
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes JSON to `out`; returns the JSON.

    Raises ValueError for no front ends, loads that are not above 0 and requests larger than a
    batch; WrongAnswers before anything is timed, LoadError.
    """
    bad = [n for n in (*front_ends, *loads) if not n > 0]
    if bad or not front_ends or not loads:
        raise ValueError(f"front ends {[*front_ends]}, loads {[*loads]}: some of each, above 0")
    check_fits(request_samples, engine.max_batch)
    params = init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    here = request_pool(config, ids=ids, seed=seed, request_samples=request_samples)
    engine = replace(engine, max_queued_samples=MOST_QUEUED)
    online = OnlineOptions(seconds=seconds)
    inside = saturating_samples(engine.max_batch)
    check = partial(check_answers_of, "front end", config, params)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(config, params, options=engine, profile=profile) as system,
        FrontEnds(system, Path(folder) / "engine") as listening,
    ):
        result = report.header(config, system.backend, ids=ids, seed=seed, versions=versions())
        servers = {RECFLOW: system.submit}
        check_served(config, params, here, servers)
        own = saturate(servers, here, engine.max_batch, online)[RECFLOW]
        console.print(f"from this process: {own:,.0f} requests/s at saturation", markup=False)
        pool = Pool(path=listening.path, ids=ids, seed=seed, request_samples=request_samples)
        apart = []
        with progress("front ends", len(front_ends)) as advance:
            for count in front_ends:
                limits = {"in_flight_samples": inside, "loads": loads, "seconds": seconds}
                apart.append(bench_apart(pool, count, check=check, **limits))
                advance()
    report.show(report.apart_table(apart))
    result["front_ends"] = {
        "mean_request_samples": mean_samples(here),
        "saturation_from_this_process": own,
        "apart": report.as_json(apart),
    }
    return finish(result, out, None)
