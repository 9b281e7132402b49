"""`recflow simulate` from the table's file to tables, JSON and figure, and what it refuses."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recflow_jax import cli, console
from recflow_jax.commands.simulate import simulate
from recflow_jax.measure import traffic
from scheduling import ProfileRow
from simulated import CONFIG, co_runs, made, parts


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LEAST_REQUESTS", 500)


def run(folder: Path, *arguments: str, rows: Sequence[ProfileRow] | None = None) -> int:
    """`recflow simulate` of CONFIG by a table of these rows (None: all), for single samples."""
    (folder / "model.toml").write_text(CONFIG.to_toml())
    made([*parts(), *co_runs()] if rows is None else rows).save(folder / "table.json")
    files = ("--model", f"{folder / 'model.toml'}", "--profile", f"{folder / 'table.json'}")
    return cli.run(["simulate", *files, "--request-samples=1", "--seconds=0.1", *arguments])


def test_loads_are_shown_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, figure = tmp_path / "o.json", tmp_path / "f.png"
    assert run(tmp_path, "--load=0.2,0.9", f"--out={out}", f"--figure={figure}") == 0
    shown = capsys.readouterr().out
    assert "20%" in shown and "90%" in shown and "serial" in shown
    result = json.loads(out.read_text())
    assert [point["share"] for point in result["points"]] == [0.2, 0.9]
    slow, fast = (point["contenders"]["incremental"] for point in result["points"])
    assert slow["qps"] < fast["qps"] and slow["p99_ms"] < fast["p99_ms"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_gpus_and_the_plan_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "o.json"
    assert run(tmp_path, "--qps=2e6", "--p99=5", f"--out={out}", "--answer-us=7") == 0
    shown = capsys.readouterr().out
    assert "GPUs for 2,000,000 requests/s" in shown and "plan used" in shown and "deep" in shown
    result = json.loads(out.read_text())
    assert result["host"]["answer_us"] == 7
    needed = result["capacity"]["incremental"]
    assert needed["gpus"] * needed["each"]["qps"] == pytest.approx(2e6)
    assert needed["each"]["p99_ms"] <= 5
    assert "deep" in {use["ride"] for use in needed["each"]["steps"]}


def test_one_rate_is_one_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, "--qps=3000", "--serial-wait-ms=1", "--burst") == 0
    shown = capsys.readouterr().out
    assert "3,000" in shown and "1 ms" in shown and "bursty" in shown


@pytest.mark.parametrize(
    ("arguments", "rows", "message"),
    [
        (["--p99=1"], None, "give --qps too"),
        (["--qps=0"], None, "qps is 0.0, not above 0"),
        (["--load=0.5,-1"], None, "load is -1.0"),
        (["--qps=9", "--p99=0.001"], None, "no number of GPUs holds it"),
        (["--plan-p99=0.1"], None, "p99 of 0.1 ms"),
        ([], parts()[:-1], "profile table lacks segment(segments=2, segment=1, batch=16"),
        (["--compute-dtype=bfloat16"], None, "was made for model 'dot' with fingerprint"),
    ],
)
def test_what_cannot_be_told_is_said(
    arguments: list[str],
    rows: list[ProfileRow] | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert run(tmp_path, *arguments, rows=rows) == console.BAD_INPUT
    assert message in capsys.readouterr().err


def test_float8_layers_without_scales_go_by_the_name(tmp_path: Path):
    uncalibrated = dataclasses.replace(CONFIG, top_mlp=(16, 8, 1), compute_dtype="float8_e4m3fn")
    made().save(tmp_path / "table.json")
    options: dict[str, Any] = {"profile": tmp_path / "table.json", "request_samples": 1}
    assert simulate(uncalibrated, qps=100, seconds=0.1, **options)["points"]
