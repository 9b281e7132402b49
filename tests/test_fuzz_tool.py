"""Tests run under atheris, which is pretended here: those that need no fixture, and all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import fuzz

ATHERIS = """
import contextlib, sys

@contextlib.contextmanager
def instrument_imports(include):
    assert include == ["recflow_jax"] and "recflow_jax" not in sys.modules
    yield

def Setup(arguments, one_input):
    global limit, run
    limit, run = arguments[1:], one_input

def Fuzz():
    run(bytes(100))
    print(f"\\nDone 7 runs in 1 second(s) {limit}", file=sys.stderr)
    raise SystemExit(STATUS)
"""
WITHOUT_FIXTURES = [
    "test_bytes_come_through",
    "test_numbers_come_through",
    "test_typed_contents_come_through",
    "test_any_bytes_over_http",
    "test_a_json_body_that_is_wrong_somewhere",
    "test_a_body_with_bytes_that_is_wrong_somewhere",
    "test_a_message_that_is_wrong_somewhere",
]


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an atheris that ends with a status on the path of processes to come."""

    def pretend(status: int) -> None:
        (tmp_path / "atheris.py").write_text(ATHERIS.replace("STATUS", str(status)))
        paths = [str(tmp_path), str(fuzz.ROOT), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    return pretend


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=fuzz.ROOT)


def test_one_test_runs_for_so_long(pretended: Any) -> None:
    pretended(0)
    done = run("--atheris", "test_any_bytes_over_http", "--seconds", "5")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        0,
        "Done 7 runs in 1 second(s) ['-max_total_time=5']",
    )


def test_a_test_that_is_not_there_or_needs_a_fixture_is_refused(pretended: Any) -> None:
    pretended(0)
    for name in ("test_of_nothing", "test_tensors_become_scores_or_an_error"):
        done = run("--atheris", name)
        assert done.returncode == 2
        assert f"error: {name!r} is not one of test_bytes_come_through, " in done.stderr


def test_without_atheris_it_says_so(pretended: Any, tmp_path: Path) -> None:
    pretended(0)
    (tmp_path / "atheris.py").write_text("raise ModuleNotFoundError('No module named atheris')")
    done = run("--atheris", "test_any_bytes_over_http")
    assert done.returncode == 2 and "error: No module named atheris" in done.stderr


@pytest.mark.parametrize("status", [0, 77])
def test_all_are_counted(pretended: Any, tmp_path: Path, status: int) -> None:
    pretended(status)
    few = tmp_path / "few.py"
    few.write_text("from test_fuzz import test_any_bytes_over_http, test_bytes_come_through\n")
    out = tmp_path / "out.json"
    assert fuzz.all_under_atheris(1, out, few) == (1 if status else 0)
    found = json.loads(out.read_text())
    names = ["test_any_bytes_over_http", "test_bytes_come_through"]
    assert found == {
        "passed": not status,
        "seconds_each": 1,
        "failed": names if status else [],
        "inputs": 14,
        "by_test": dict.fromkeys(names, 7),
    }


def test_those_without_fixtures_are_found() -> None:
    assert [*fuzz.without_fixtures(fuzz.TESTS)] == WITHOUT_FIXTURES
