"""A crowd that misbehaves: who ended how is counted, and what should not be is told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest

from fake_segments import CONFIG, FakeSegments, samples, scores
from recflow_jax import cli
from recflow_jax.commands import bench_soak as command
from recflow_jax.commands.bench_soak import SoakFailed, bench_soak
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.clients import GrpcClient, HttpClient
from recflow_jax.measure.memory import Memory
from recflow_jax.measure.scraped import Scraped, final_counts
from recflow_jax.measure.soak import Crowd, send_crowd, tolerance, wrong_request
from recflow_jax.measure.soaked import ServerCounts, SoakResult
from running_server import serving
from small_models import NO_DENSE

REQUESTS = [samples(1, 2), samples(3)]
EXPECTED = [np.array(scores(1, 2), np.float32), np.array(scores(3), np.float32)]
WRONG = wrong_request(REQUESTS[0])
COUNTS = ServerCounts(arrived=3, ended=3, accepted=2, settled=2)
FINE = SoakResult(
    seconds=1,
    qps=3,
    sent={"asked": 2, "wrong": 1},
    ends={"right": 2, "told so": 1},
    server=COUNTS,
    memory=[Memory(at_s=i, rss_bytes=100, device_bytes=0) for i in range(8)],
)


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def crowd(device: FakeSegments) -> Iterator[Crowd]:
    engine, asked = Engine.from_segments(device), [*REQUESTS, WRONG]
    with serving(lambda: engine) as server:
        http, grpc = (int(a.split(":")[1]) for a in (server.http_address, server.grpc_address))
        with (
            HttpClient(http, "/v2/models/fake/infer", asked, outputs=1) as web,
            GrpcClient(grpc, "fake", asked, outputs=1) as rpc,
        ):
            yield Crowd(
                submits=[web.submit, rpc.submit],
                requests=REQUESTS,
                expected=EXPECTED,
                wrong=WRONG,
                http_port=http,
                model="fake",
                tolerance=tolerance(CONFIG, EXPECTED),
            )


def test_every_kind_is_sent_and_ends(crowd: Crowd, device: FakeSegments) -> None:
    device.takes_s = 0.003
    ends = send_crowd(crowd, 300, 2, seed=1)
    assert {*ends.sent} == {"asked", "cancelled", "wrong", "left"} and ends.sent.total() == 600
    assert {*ends.ends} == {"right", "cancelled", "told so"}
    assert ends.ends["told so"] == ends.sent["wrong"]
    assert ends.ends.total() == 600 - ends.sent["left"]
    counts = final_counts(crowd.http_port)
    assert counts.once_each
    assert counts.arrived >= 600 - ends.sent["left"] - ends.ends["cancelled"]
    assert Scraped(crowd.http_port).sum("recflow_requests_total", outcome="input") > 0


def test_wrong_scores_and_failures_are_told(crowd: Crowd, device: FakeSegments) -> None:
    device.lose_next("run")
    others = [EXPECTED[0], EXPECTED[1] + 1]
    ends = send_crowd(replace(crowd, expected=others), 100, 0.5, seed=1)
    assert ends.ends["wrong scores"] > 0 and ends.ends["right"] > 0
    assert ends.ends["ServerError"] >= 1


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"ends": {"right": 2, "wrong scores": 1}}, False),
        ({"ends": {"right": 2, "QueueFull": 1}}, False),
        ({"server": replace(COUNTS, ended=2)}, False),
        ({"server": replace(COUNTS, settled=3)}, False),
        (
            {"memory": [Memory(at_s=i, rss_bytes=i * 2**30, device_bytes=0) for i in range(8)]},
            False,
        ),
    ],
)
def test_what_passes(change: dict[str, Any], passes: bool) -> None:
    assert replace(FINE, **change).passed is passes


def test_a_server_is_soaked_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TOLD_EVERY", 5)
    engine = EngineOptions(max_batch=16, max_slice=16, segments=1)
    files: dict[str, Any] = {"out": tmp_path / "soak.json", "figure": tmp_path / "soak.png"}
    returned = bench_soak(NO_DENSE, engine=engine, minutes=0.05, qps=50, request_samples=3, **files)
    assert json.loads(files["out"].read_text()) == json.loads(json.dumps(returned))
    soak = returned["soak"]
    assert soak["passed"] and soak["flat"] and soak["as_expected"]
    assert sum(soak["sent"].values()) == 150 and len(soak["memory"]) >= 5
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "ended each once" in told and "memory flat" in told and "MiB resident" in told


def test_a_failure_is_told_after_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "own_server", create_autospec(command.own_server))
    monkeypatch.setattr(command, "clients", create_autospec(command.clients))
    monkeypatch.setattr(command, "Crowd", create_autospec(Crowd))
    grown = replace(FINE, ends={"right": 2, "wrong scores": 1})
    monkeypatch.setattr(command, "_soak", lambda *_: grown)
    with pytest.raises(SoakFailed, match="ends as they should be: False"):
        bench_soak(NO_DENSE, engine=EngineOptions(), out=tmp_path / "soak.json")
    assert not json.loads((tmp_path / "soak.json").read_text())["soak"]["passed"]


@pytest.mark.parametrize("options", [{"minutes": 0}, {"qps": 0}])
def test_no_load_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are no load"):
        bench_soak(NO_DENSE, engine=EngineOptions(), **options)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    function = create_autospec(command.bench_soak)
    monkeypatch.setattr(command, "bench_soak", function)
    words = ["--model", "dlrm-kaggle", "--minutes", "2", "--qps", "7", "--max-batch", "64"]
    assert cli.run(["bench", "soak", *words]) == 0
    named = function.call_args.kwargs
    assert (named["minutes"], named["qps"], named["engine"].max_batch) == (2, 7, 64)
