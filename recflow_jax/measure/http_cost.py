"""What the HTTP layer costs: the server's CPU time per request, beside bare apps on its uvicorn."""

import multiprocessing
from http.client import HTTPConnection

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.bare_apps import CPU, PATHS, serve
from recflow_jax.measure.clients import HttpClient, ServerError
from recflow_jax.measure.served import HttpCost

AT_ONCE = 16
STARTS_IN_S = 120


def measure_http_cost(
    config: DLRMConfig, request: JaggedBatch, *, requests: int = 2000, rounds: int = 5
) -> HttpCost:
    """Sends `request` so many times a round to each app. Raises ServerError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(config, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(STARTS_IN_S):
            raise ServerError(f"the bare server did not start within {STARTS_IN_S} s")
        taken = _measured(config, request, ours.recv(), requests, rounds)
    finally:
        process.terminate()
        process.join()
    medians = {name: float(np.median(us)) for name, us in taken.items()}
    return HttpCost(
        request_samples=request.samples,
        requests=requests * rounds,
        **{f"{name}_us": us for name, us in medians.items()},
        over_bare=medians["served"] / medians["bare"],
    )


def _measured(
    config: DLRMConfig, request: JaggedBatch, port: int, requests: int, rounds: int
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in PATHS}
    for _ in range(rounds + 1):  # the first warms up
        for name, path in PATHS.items():
            with HttpClient(
                port, path, [request], outputs=config.outputs, connections=AT_ONCE
            ) as client:
                taken[name].append(_us_per_request(client, request, port, requests))
    return {name: us[1:] for name, us in taken.items()}


def _us_per_request(client: HttpClient, request: JaggedBatch, port: int, requests: int) -> float:
    before_s = _cpu_s(port)
    for answer in [client.submit(request) for _ in range(requests)]:
        answer.result()
    return 1e6 * (_cpu_s(port) - before_s) / requests


def _cpu_s(port: int) -> float:
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", CPU)
        return float(connection.getresponse().read())
    finally:
        connection.close()
