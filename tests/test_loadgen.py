"""MLPerf LoadGen against the fake device: its verdicts, its files, and what failed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from fake_segments import OPTIONS, FakeSegments, samples
from recflow_jax import cli
from recflow_jax.commands import bench_loadgen as command
from recflow_jax.commands.bench_loadgen import LoadGenOptions, bench_loadgen
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.loadgen import read_log, run_offline, run_server
from small_models import NO_DENSE

REQUESTS = [samples(1), samples(*range(5))]
FILES = {"mlperf_log_summary.txt", "mlperf_log_detail.txt"}


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def engine(device: FakeSegments) -> Iterator[Engine]:
    with Engine.from_segments(device) as engine:
        yield engine


def test_server_counts_every_query_once(tmp_path: Path) -> None:
    ticks: list[None] = []
    patient = FakeSegments(replace(OPTIONS, max_queued_samples=10_000))
    with Engine.from_segments(patient) as engine:
        found = run_server(
            *(engine, REQUESTS),
            qps=800,
            p99_ms=20_000,
            seconds=1,
            seed=3,
            folder=tmp_path / "made",
            tick=lambda: ticks.append(None),
        )
    assert found.valid and found.scenario == "server" and found.failures == {}
    assert found.target_qps == 800 and found.p99_ms == 20_000
    assert engine.stats().requests_accepted == engine.stats().requests_answered == found.queries
    assert found.queries >= 600 and ticks
    assert 1 < found.mean_query_pairs < 5
    assert found.pairs_per_s == found.queries_per_s * found.mean_query_pairs
    latencies = [*found.latencies_ms.values()]
    assert [*found.latencies_ms] == ["50", "90", "95", "97", "99", "99.9"]
    assert 0 < latencies[0] and latencies == sorted(latencies)
    assert {path.name for path in (tmp_path / "made").iterdir()} >= FILES


def test_offline_keeps_so_many_inside(engine: Engine, tmp_path: Path) -> None:
    """The queue of 64 samples would refuse some, were they all sent at once."""
    shared: dict[str, Any] = {"seconds": 0.2, "seed": 0, "folder": tmp_path}
    found = run_offline(engine, REQUESTS, expected_qps=2000, in_flight=4, **shared)
    assert found.failures == {} and found.latencies_ms == {}
    assert found.queries == engine.stats().requests_answered == 440
    assert (found.target_qps, found.p99_ms) == (None, None)


def test_too_few_queries_for_the_time_are_not_valid(engine: Engine, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"seconds": 60, "seed": 0, "folder": tmp_path}
    found = run_offline(engine, REQUESTS, expected_qps=1, in_flight=4, **shared)
    assert not found.valid and "Increase expected QPS" in found.reasons


def test_too_few_queries_for_a_p99_are_not_valid(engine: Engine, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"seconds": 0.2, "seed": 0, "folder": tmp_path}
    found = run_server(engine, REQUESTS, qps=50, p99_ms=20_000, **shared)
    assert not found.valid and "more queries" in found.reasons


def test_a_p99_beyond_the_bound_is_not_valid(
    engine: Engine, device: FakeSegments, tmp_path: Path
) -> None:
    device.takes_s = 0.005
    shared: dict[str, Any] = {"seconds": 0.5, "seed": 0, "folder": tmp_path}
    found = run_server(engine, REQUESTS, qps=50, p99_ms=1, **shared)
    assert not found.valid and found.latencies_ms["99"] > 5


def test_what_fails_makes_a_run_invalid_and_ends(
    engine: Engine, device: FakeSegments, tmp_path: Path
) -> None:
    """Refused at the door, or failed on the device: LoadGen waits for neither."""
    device.lose_next("run")
    shared: dict[str, Any] = {"seconds": 0.5, "seed": 0, "folder": tmp_path}
    found = run_server(engine, REQUESTS, qps=100, p99_ms=20_000, **shared)
    assert found.failures["StepFailed"] >= 1 and not found.valid
    device.hold()
    held = [engine.submit(samples(*range(16))) for _ in range(4)]
    found = run_server(engine, REQUESTS, qps=100, p99_ms=20_000, **shared)
    device.go_on()
    assert found.failures == {"QueueFull": found.queries} and not found.valid
    assert all(answer.result(60).shape == (16, 1) for answer in held)


def test_logs_are_read_with_all_reasons(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    entries = [("a", 1), ("result_invalid_reason", "x "), ("a", 2), ("result_invalid_reason", "y")]
    lines = [f":::MLLOG {json.dumps({'key': key, 'value': value})}" for key, value in entries]
    path.write_text("\n".join(["something else", *lines]))
    assert read_log(path) == {"a": 2, "result_invalid_reason": "x y"}


def test_server_runs_are_at_shares_of_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes waits: the engine's own queue would be full with two queries."""
    monkeypatch.setattr(command, "WARM_UP_S", 0.3)
    options = LoadGenOptions(shares=(0.1, 0.2), p99_ms=(5000, 9000), request_samples=2, seconds=0.5)
    engine = EngineOptions(max_batch=16, max_slice=16, segments=1, max_queued_samples=4)
    returned = bench_loadgen(NO_DENSE, engine=engine, options=options, out=tmp_path)
    assert json.loads((tmp_path / "loadgen.json").read_text()) == json.loads(json.dumps(returned))
    runs = returned["loadgen"]["runs"]
    assert {path.name for path in tmp_path.iterdir()} == {*runs, "loadgen.json"}
    offline_qps = runs["offline"]["queries_per_s"]
    for name, share, p99_ms in (("server-0", 0.1, 5000), ("server-1", 0.2, 9000)):
        assert runs[name]["target_qps"] == pytest.approx(share * offline_qps, rel=1e-3)
        assert runs[name]["p99_ms"] == p99_ms
        ratio = runs[name]["pairs_per_s"] / runs["offline"]["pairs_per_s"]
        assert returned["loadgen"]["of_offline"][name] == ratio
        assert {path.name for path in (tmp_path / name).iterdir()} >= FILES
    assert "of offline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": "stream"}, "scenario 'stream' is not one of server, offline, both"),
        ({"scenario": "server"}, "rates"),
        ({"qps": (5.0,)}, "rates"),
        ({"shares": (0.5, 0.0)}, "shares has 0.0"),
        ({"p99_ms": (1.0, 2.0, 3.0)}, "3 bounds of p99 for 2 loads"),
        ({"seconds": 0}, "seconds is 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadGenOptions(**options)


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function = create_autospec(command.bench_loadgen)
    monkeypatch.setattr(command, "bench_loadgen", function)
    words = ["--model", "dlrm-kaggle", "--scenario", "server", "--qps", "5,10", "--p99-ms", "9"]
    assert cli.run(["bench", "loadgen", *words, "--out", str(tmp_path), "--max-batch", "64"]) == 0
    named = function.call_args.kwargs
    assert named["options"].loads(0) == [(5.0, 9.0), (10.0, 9.0)]
    assert named["engine"].max_batch == 64 and named["out"] == tmp_path
