"""The tool that times whole commands."""

import json
import sys
from pathlib import Path

import pytest

from tools import stopwatch


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stopwatch", *arguments])
    return stopwatch.main()


def test_seconds_and_exit_status_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "result.json"
    program = "import sys, time; time.sleep(0.3); sys.exit(7)"
    assert run(monkeypatch, "--out", str(out), sys.executable, "-c", program) == 7
    result = json.loads(out.read_text())
    assert result["exit_status"] == 7
    assert 0.3 <= result["seconds"] < 30
    assert program in result["command"]


def test_nothing_to_time_is_bad_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--out", str(tmp_path / "result.json"))
