"""What front ends in processes of their own are answered together."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fake_segments import OPTIONS, FakeSegments
from recflow_jax import cli
from recflow_jax.engine.engine import Engine
from recflow_jax.measure.agreement import WrongAnswers
from recflow_jax.measure.apart import bench_apart
from recflow_jax.measure.caller_process import Pool
from recflow_jax.measure.load import LoadError
from recflow_jax.remote.front_ends import FrontEnds


def patient() -> FakeSegments:
    return FakeSegments(replace(OPTIONS, max_queued_samples=10_000))


def test_front_ends_are_answered_together(tmp_path: Path):
    checked = []

    def check(requests, answers):
        checked.append((len(requests), sum(len(found) for found in answers)))

    with (
        Engine.from_segments(patient()) as engine,
        FrontEnds(engine, tmp_path / "engine") as front_ends,
    ):
        pool = Pool(path=front_ends.path, ids="uniform", seed=3, request_samples=2)
        limits = {"in_flight_samples": 8, "loads": (0.5,), "seconds": 0.3}
        found = bench_apart(pool, 2, check=check, **limits)
        first, second = (pool.requests(engine.config, n)[0].dense for n in (0, 1))
        assert not np.array_equal(first, second)
    assert checked == [(64, 128)] * 2
    assert (found.front_ends, found.in_flight_samples) == (2, 8)
    (point,) = found.points
    assert point.qps == 0.5 * found.saturation > 0
    assert 0 < point.p50_ms <= point.p99_ms
    assert point.failed == 0 and point.answered_per_s > 0.3 * point.qps


def test_wrong_answers_are_not_timed_and_leave_nobody_behind(tmp_path: Path):
    def check(*_):
        raise WrongAnswers("no")

    with (
        Engine.from_segments(patient()) as engine,
        FrontEnds(engine, tmp_path / "engine") as front_ends,
    ):
        pool = Pool(path=front_ends.path, ids="uniform", seed=3, request_samples=2)
        with pytest.raises(WrongAnswers):
            bench_apart(pool, 1, in_flight_samples=8, loads=(), seconds=0.1, check=check)


def test_a_front_end_that_stops_is_told_of(tmp_path: Path):
    pool = Pool(path=tmp_path / "nobody", ids="uniform", seed=3, request_samples=2)
    with pytest.raises(LoadError, match="process stopped"):
        bench_apart(pool, 1, in_flight_samples=8, loads=(), seconds=0.1, check=lambda *_: None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "apart.json"
    of = ["bench", "front-ends", "--model", "dlrm-kaggle", "--max-rows-per-table", "50"]
    how = ["--processes", "1", "--load", "0.5", "--seconds", "0.2", "--max-batch", "16"]
    assert cli.run([*of, *how, "--request-samples", "2", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["front_ends"]["apart"]
    assert found["saturation"] > 0 and len(found["points"]) == 1
    assert "front ends in processes of their own" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--processes", "0"], ["--load", "-1"], ["--processes", ""]])
def test_bad_numbers(bad: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.run(["bench", "front-ends", "--model", "dlrm-kaggle", *bad]) != 0
    assert "above 0" in capsys.readouterr().err


def test_requests_larger_than_a_batch_are_refused_at_once(capsys: pytest.CaptureFixture[str]):
    of = ["bench", "front-ends", "--model", "dlrm-kaggle", "--max-rows-per-table", "50"]
    assert cli.run([*of, "--max-batch", "8", "--request-samples", "9"]) != 0
    assert "no more than the largest batch, 8" in capsys.readouterr().err
