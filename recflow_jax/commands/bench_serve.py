"""`recflow bench serve`: a server over HTTP and gRPC beside the engine in this process."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.calibration import ready
from recflow_jax.commands.bench import finish
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import Missing, console, progress
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import report
from recflow_jax.measure.contenders import RECFLOW
from recflow_jax.measure.launched import SHARING, Launched, launched
from recflow_jax.measure.online import OnlineOptions, Servers, check_served
from recflow_jax.measure.requests import request_pool
from recflow_jax.measure.served import bench_served
from recflow_jax.model import Params
from recflow_jax.params import init_params, save_params

try:
    from recflow_jax.measure.clients import GrpcClient, HttpClient
    from recflow_jax.measure.http_cost import measure_http_cost
except ModuleNotFoundError as error:
    raise Missing(f"{error}: pip install 'recflow-jax[serve]'") from error

HTTP, GRPC = "HTTP", "gRPC"


def bench_serve(
    config: DLRMConfig,
    *,
    engine: EngineOptions,
    online: OnlineOptions,
    p99_ms: float | None = None,
    profile: Path | None = None,
    ids: str = "uniform",
    seed: int = 0,
    out: Path | None = None,
    figure: Path | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes JSON to `out` and a figure to `figure`; returns the JSON.

    Starts `recflow serve` with the same parameters, drawn from `seed`, in a process of its own, and
    sends it and the engine here the same requests at the same times. p99_ms: also looks for the
    largest loads that keep it. Raises WrongAnswers before anything is timed, NotLaunched,
    LoadError, and ValueError for a bound that is not above 0.
    """
    if p99_ms is not None and not p99_ms > 0:
        raise ValueError(f"serve: p99_ms is {p99_ms}, not above 0")
    os.environ.update(SHARING)
    params = init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    requests = request_pool(config, ids=ids, seed=seed, request_samples=online.request_samples)
    with Engine(config, params, options=engine, profile=profile) as own:
        result = report.header(config, own.backend, ids=ids, seed=seed, versions=versions())
        with _servers(own, params, requests, profile) as servers:
            check_served(config, params, requests, servers)
            each = 1 + len(online.qps or online.loads) + (p99_ms is not None)
            with progress("serving", len(servers) * each) as advance:
                served = bench_served(
                    *(servers, requests),
                    seed=seed,
                    options=online,
                    p99_ms=p99_ms,
                    advance=advance,
                )
    report.show(report.served_table(served))
    for line in report.sustained_lines(served):
        console.print(line, markup=False)
    cost = measure_http_cost(config, requests[0])
    console.print(report.http_cost_line(cost), markup=False)
    result |= {"served": report.as_json(served), "http": report.as_json(cost)}
    return finish(result, out, figure)


@contextmanager
def _servers(
    engine: Engine, params: Params, requests: Sequence[JaggedBatch], profile: Path | None
) -> Iterator[Servers]:
    """The engine, and a server of the same parameters over both protocols."""
    with (
        own_server(engine.config, params, engine.options, profile) as server,
        clients(server, engine.config, requests) as asked,
    ):
        yield {RECFLOW: engine.submit, **asked}


@contextmanager
def own_server(
    config: DLRMConfig, params: Params, options: EngineOptions, profile: Path | None
) -> Iterator[Launched]:
    """A server of these parameters in a process of its own. Raises NotLaunched."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_params(path, config, params)
        with launched(_arguments(options, path, profile)) as server:
            yield server


@contextmanager
def clients(
    server: Launched, config: DLRMConfig, requests: Sequence[JaggedBatch]
) -> Iterator[Servers]:
    """Who asks it for these, by protocol."""
    path = f"/v2/models/{server.model}/infer"
    with (
        HttpClient(server.http_port, path, requests, outputs=config.outputs) as http,
        GrpcClient(server.grpc_port, server.model, requests, outputs=config.outputs) as grpc,
    ):
        yield {HTTP: http.submit, GRPC: grpc.submit}


def _arguments(options: EngineOptions, params: Path, profile: Path | None) -> list[str]:
    """The command line of a server with the same engine."""
    values = {
        "--params": params,
        "--max-batch": options.max_batch,
        "--segments": options.segments,
        "--max-queued-samples": options.max_queued_samples,
        "--backend": options.backend,
        "--profile": profile,
    }
    return [word for n, value in values.items() if value is not None for word in (n, str(value))]
