"""Many more inputs for the tests of tests/test_fuzz.py than `make test` draws, counted.

`python -m tools.fuzz [--out FILE]`, or `make fuzz`. Inputs are drawn anew each time. Exit status 1
if one of them crashed, hung, got a wrong answer or harmed another request; pytest shows it.

Where atheris is installed, `python -m tools.fuzz --atheris NAME` runs one of these tests under it
instead, led by coverage, until it is interrupted.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "test_fuzz.py"


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
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return status


def under_atheris(name: str) -> None:
    """Does not return."""
    atheris: Any = importlib.import_module("atheris")
    sys.path.insert(0, str(TESTS.parent))
    with atheris.instrument_imports(include=["recflow_jax"]):
        test = getattr(importlib.import_module(TESTS.stem), name)
    atheris.Setup(sys.argv[:1], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--out", type=Path, help="how many inputs there were, as JSON")
    parser.add_argument("--atheris", metavar="NAME", help="a test that takes no fixture")
    given = parser.parse_args(arguments)
    os.environ.setdefault("HYPOTHESIS_PROFILE", "fuzz")
    if given.atheris is not None:
        under_atheris(given.atheris)
    return fuzz(given.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
