"""`recflow bench serve`: its clients get the engine's answers and errors, its report has all."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from fake_segments import CONFIG, FakeSegments, samples, scores
from recflow_jax import cli
from recflow_jax.commands import bench_serve as command
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import DeadlineExceeded, QueueFull
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.clients import Client, GrpcClient, HttpClient, ServerError, _Connection
from recflow_jax.measure.http_cost import measure_http_cost
from recflow_jax.measure.launched import NotLaunched, until_ready
from recflow_jax.measure.online import OnlineOptions
from recflow_jax.measure.served import HttpCost
from running_server import SOON_S, serving, wait_for
from small_models import NO_DENSE

REQUESTS = [samples(1, 2), samples(3), samples(*range(60))]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.fixture(params=["HTTP", "gRPC"])
def client(request: pytest.FixtureRequest, device: FakeSegments) -> Iterator[Client]:
    engine = Engine.from_segments(device)
    with serving(lambda: engine, default_timeout_s=1, max_requests=2) as server:
        http, grpc = port_of(server.http_address), port_of(server.grpc_address)
        made: dict[str, Callable[[], Client]] = {
            "HTTP": lambda: HttpClient(http, "/v2/models/fake/infer", REQUESTS, outputs=1),
            "gRPC": lambda: GrpcClient(grpc, "fake", REQUESTS, outputs=1),
        }
        with made[request.param]() as client:
            yield client
        device.go_on()


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


def test_clients_bring_the_scores(client: Client) -> None:
    for request, dense in ((REQUESTS[0], (1, 2)), (REQUESTS[1], (3,))):
        assert client.submit(request).result(SOON_S).tolist() == scores(*dense)


def test_clients_bring_the_engines_errors(client: Client, device: FakeSegments) -> None:
    device.hold()
    sent = [client.submit(request) for request in REQUESTS]
    errors = {type(error_of(answer)) for answer in sent}
    assert errors == {QueueFull, DeadlineExceeded}


def error_of(answer: Future[np.ndarray]) -> BaseException | None:
    return answer.exception(SOON_S)


def test_a_request_may_be_cancelled(
    client: Client, device: FakeSegments, caplog: pytest.LogCaptureFixture
) -> None:
    device.hold()
    sent = client.submit(REQUESTS[0])
    wait_for(lambda: device.states_made == 1)
    sent.cancel()
    device.go_on()
    for _ in range(100):  # over every connection
        assert client.submit(REQUESTS[1]).result(SOON_S).tolist() == scores(3)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_an_answer_to_a_request_given_up_is_nobodys() -> None:
    """It may come in the moment between the cancellation and the end of its connection."""

    async def give_up() -> None:
        connection = _Connection()
        connection.connection_made(Mock())
        asking = asyncio.ensure_future(connection.ask(b""))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    asyncio.run(give_up())


def test_another_answer_is_a_servers_error(client: Client, device: FakeSegments) -> None:
    device.break_next("run")
    with pytest.raises(ServerError, match="DeviceBroke"):
        client.submit(REQUESTS[0]).result(SOON_S)


def test_a_server_that_does_not_start_says_why() -> None:
    said = ['{"event": "listening", "http_port": 1, "grpc_port": 2}', "recflow: error: no room"]
    with pytest.raises(NotLaunched, match="did not start: recflow: error: no room"):
        until_ready(said)
    assert until_ready([*said, '{"event": "ready"}']) == (1, 2)


def test_http_is_measured_beside_bare_apps() -> None:
    cost = measure_http_cost(CONFIG, samples(1, 2), requests=100, rounds=1)
    assert (cost.request_samples, cost.requests) == (2, 100)
    assert 0 < cost.echo_us < cost.bare_us and cost.over_bare == cost.served_us / cost.bare_us


def test_all_ways_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = HttpCost(request_samples=2, requests=9, echo_us=1, bare_us=2, served_us=3, over_bare=1.5)
    monkeypatch.setattr(command, "measure_http_cost", lambda *_: cost)
    command.bench_serve(
        NO_DENSE,
        engine=EngineOptions(max_batch=16, max_slice=16, segments=1),
        online=OnlineOptions(qps=(50.0,), request_samples=2, seconds=0.5, burst=True),
        p99_ms=5000,
        out=tmp_path / "serve.json",
        figure=tmp_path / "serve.png",
    )
    printed = capsys.readouterr().out
    told = ("burst arrivals", "p99.9 ms", "rejected/late/failed", "3 us of CPU per request of 2")
    assert all(words in printed for words in (*told, "gRPC: ", "with a p99 of at most 5000 ms"))
    result = json.loads((tmp_path / "serve.json").read_text())
    assert {*result["served"]["saturation"]} == {"recflow", "HTTP", "gRPC"}
    (point,) = result["served"]["points"]
    for load in point["contenders"].values():
        assert load["failed"] == load["rejected"] == load["late"] == 0 and load["failures"] == {}
        assert 0 < load["p50_ms"] <= load["p90_ms"] <= load["p99_ms"] <= load["p999_ms"]
        counted = load["requests"] - load["requests"] // 10
        assert HdrHistogram.decode(load["histogram"]).get_total_count() == counted
    assert all(found["qps"] > 0 for found in result["served"]["sustained"].values())
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_a_bound_has_to_be_above_nothing() -> None:
    with pytest.raises(ValueError, match="p99_ms is 0, not above 0"):
        command.bench_serve(NO_DENSE, engine=EngineOptions(), online=OnlineOptions(), p99_ms=0)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    function = create_autospec(command.bench_serve)
    monkeypatch.setattr(command, "bench_serve", function)
    words = ["--model", "dlrm-kaggle", "--max-rows-per-table", "9", "--qps", "5,10", "--burst"]
    assert (
        cli.run(["bench", "serve", *words, "--max-batch", "64", "--seed", "3", "--p99", "9"]) == 0
    )
    (config,), named = function.call_args
    assert max(table.rows for table in config.tables) == 9
    assert named["engine"] == EngineOptions(max_batch=64)
    assert named["online"].qps == (5.0, 10.0) and named["online"].burst
    assert (named["p99_ms"], named["seed"]) == (9, 3)
