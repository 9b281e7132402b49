"""Many more inputs for the tests of tests/test_fuzz.py than `make test` draws, counted.

`python -m tools.fuzz [--out FILE]`, or `make fuzz`. Inputs are drawn anew each time. Exit status 1
if one of them crashed, hung, got a wrong answer or harmed another request; pytest shows it.

Where atheris is installed, `python -m tools.fuzz --atheris NAME` runs one of these tests under it
instead, led by coverage, until it is interrupted, or for `--seconds`; `--atheris all` runs each
that needs no fixture of pytest's, one after the other.
"""

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "test_fuzz.py"
RUNS = re.compile(r"^Done (\d+) runs in", re.MULTILINE)


class Counted:
    """A pytest plugin that counts the inputs of every test that hypothesis draws for."""

    def __init__(self) -> None:
        self.inputs: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Puts a counter around each test."""
        for item in items:
            test = getattr(getattr(item, "obj", None), "hypothesis", None)
            if test is not None:
                test.inner_test = self._counted(item.name, test.inner_test)

    def _counted(self, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def counted(*given: Any, **named: Any) -> Any:
            self.inputs[name] += 1
            return test(*given, **named)

        return counted


def fuzz(out: Path | None, tests: Path = TESTS) -> int:
    """Runs the tests, writes how many inputs each had; pytest's exit status."""
    counted, started_s = Counted(), time.perf_counter()
    status = int(pytest.main([str(tests), "-q", "-p", "no:xdist", "--timeout=0"], [counted]))
    result = {
        "passed": status == 0,
        "seconds": round(time.perf_counter() - started_s, 1),
        "inputs": counted.inputs.total(),
        "by_test": dict(counted.inputs),
    }
    print(f"{result['inputs']:,} inputs in {result['seconds']:,} s")
    _save(result, out)
    return status


def under_atheris(name: str, seconds: int | None) -> None:
    """Does not return. Raises LookupError for a test that is not there, or needs a fixture."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["recflow_jax"]):
        tests = without_fixtures(TESTS)
    if name not in tests:
        raise LookupError(f"{name!r} is not one of {', '.join(tests)}")
    limit = [] if seconds is None else [f"-max_total_time={seconds}"]
    atheris.Setup([*sys.argv[:1], *limit], tests[name].hypothesis.fuzz_one_input)
    atheris.Fuzz()


def without_fixtures(tests: Path) -> dict[str, Any]:
    """The tests of a file that hypothesis draws all arguments of, by name."""
    sys.path.insert(0, str(tests.parent))
    members = vars(importlib.import_module(tests.stem))
    return {
        name: test
        for name, test in members.items()
        if hasattr(test, "hypothesis") and not inspect.signature(test).parameters
    }


def all_under_atheris(seconds: int, out: Path | None, tests: Path = TESTS) -> int:
    """Each in a process of its own; the exit status, 1 if one of them failed."""
    runs: dict[str, int] = {}
    failed: list[str] = []
    for name in without_fixtures(tests):
        command = [sys.executable, "-m", "tools.fuzz", "--atheris", name, "--seconds", str(seconds)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        counted = RUNS.search(done.stderr)
        if done.returncode or counted is None:
            print(done.stderr, file=sys.stderr)
            failed.append(name)
        runs[name] = int(counted[1]) if counted else 0
        print(f"{name}: {runs[name]:,} inputs")
    result = {"passed": not failed, "seconds_each": seconds, "failed": failed}
    _save(result | {"inputs": sum(runs.values()), "by_test": runs}, out)
    return 1 if failed else 0


def _save(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--out", type=Path, help="how many inputs there were, as JSON")
    parser.add_argument("--atheris", metavar="NAME", help="a test that takes no fixture, or all")
    parser.add_argument("--seconds", type=int, help="of each under atheris; for all 60 without")
    given = parser.parse_args(arguments)
    os.environ.setdefault("HYPOTHESIS_PROFILE", "fuzz")
    if given.atheris == "all":
        return all_under_atheris(given.seconds or 60, given.out)
    if given.atheris is not None:
        try:
            under_atheris(given.atheris, given.seconds)
        except (ImportError, LookupError) as error:
            parser.error(str(error))
    return fuzz(given.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
