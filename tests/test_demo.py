"""`recflow demo` from ratings to a report, on ratings made up here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recflow_jax.commands import demo as command
from recflow_jax.commands.demo import demo
from recflow_jax.data.movielens import DataError
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.agreement import WrongAnswers

OPTIONS = EngineOptions(
    max_batch=64,
    smallest_batch=16,
    batch_factor=4,
    max_slice=32,
    smallest_slice=32,
    compilation_cache=None,
)
USERS, ITEMS, RATINGS = 12, 15, 700
START_S = 874_724_710


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like MovieLens-100K's, of a dozen users."""
    folder = tmp_path_factory.mktemp("ratings")
    rng = np.random.default_rng(1)
    users = [f"{u}\t{18 + u}\t{'MF'[u % 2]}\twriter\t{u}0000" for u in range(USERS)]
    items = [f"{i}\tMovie\t{1960 + i}\t{['Drama', 'War Drama'][i % 2]}" for i in range(ITEMS)]
    rated = [
        f"{rng.integers(USERS)}\t{rng.integers(ITEMS)}\t{rng.integers(1, 6)}\t{START_S + 60 * i}"
        for i in range(RATINGS)
    ]
    for name, header, lines in (
        ("user", "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", users),
        ("item", "item_id:token\tmovie_title:seq\trelease_year:token\tclass:token_seq", items),
        ("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rated),
    ):
        (folder / f"ml-100k.{name}").write_text("\n".join([header, *lines, ""]))
    return folder


@pytest.fixture(autouse=True)
def short_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "QUICK_SECONDS", 0.2)
    monkeypatch.setattr(command, "LOADS", (0.3,))


def test_demo_serves_and_reports(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = demo(out=tmp_path / "new", quick=True, data=data, options=OPTIONS)
    printed = capsys.readouterr().out
    for words in ("trained in", "AUC of the answers", "throughput: recflow", "p99 ms", "report:"):
        assert words in printed
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {
        "report.json",
        "movielens.safetensors",
        "movielens-100k-cpu.json",
        "movielens-100k-cpu.csv",
        "movielens-100k-cpu.png",
        "latency.png",
        "batch_sizes.png",
        "roc.png",
    }
    stored = json.loads((tmp_path / "new" / "report.json").read_text())
    assert stored["served"] == result["served"]
    assert stored["served"]["samples"] == RATINGS - int(0.8 * RATINGS)
    assert stored["served"]["error"] < 1e-4
    assert set(stored["batch_sizes"]) == {"30% load", "all at once"}
    assert sum(stored["batch_sizes"]["all at once"].values()) > 0


def test_a_second_run_loads_the_model_and_resumes_the_profile(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = demo(out=tmp_path, quick=True, data=data, options=OPTIONS)
    capsys.readouterr()
    second = demo(out=tmp_path, quick=True, data=data, options=OPTIONS)
    printed = capsys.readouterr().out
    assert "model: loaded from" in printed and "sizes are measured already" in printed
    assert "timings to come" not in printed
    assert second["served"]["auc"] == pytest.approx(first["served"]["auc"])


def test_wrong_answers_end_the_demo(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., Any] = command.predict
    monkeypatch.setattr(command, "predict", lambda *args: right(*args)[::-1])
    with pytest.raises(WrongAnswers, match="recflow gives"):
        demo(out=tmp_path, quick=True, data=data, options=OPTIONS)


def test_missing_data_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ml-100k.*pip install --no-deps recbole"):
        demo(out=tmp_path / "out", data=tmp_path)
    assert not (tmp_path / "out").exists()
