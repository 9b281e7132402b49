"""Without the extras' packages most commands work, and the others say which extra they want."""

import subprocess
import sys

import pytest

OF_EXTRAS = {
    "serve": {"starlette", "uvicorn", "uvloop", "httptools", "grpc", "google", "orjson"},
    "load": {"hdrh"},
    "loadgen": {"mlperf_loadgen"},
    "torch": {"torch"},
    "dev": {"httpx", "tritonclient", "opentelemetry", "prometheus_client"},
}
IMPORTED = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {commands!r}:
    try:
        importlib.import_module(f"recflow_jax.commands.{{name}}")
        print(name, "imported")
    except Exception as error:
        print(name, type(error).__name__, error)
"""
ALONE = ("bench", "bench_plans", "demo", "info", "profile", "simulate", "train", "tune")
WANTING = {
    "bench_loadgen": "recflow-jax[loadgen]",
    "bench_serve": "recflow-jax[serve]",
    "bench_soak": "recflow-jax[serve]",
    "serve": "recflow-jax[serve]",
}


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """What came of importing each command, in a Python that lacks the extras' packages."""
    blocked = set().union(*OF_EXTRAS.values())
    program = IMPORTED.format(blocked=blocked, commands=[*ALONE, *WANTING])
    python = [sys.executable, "-c", program]
    lines = subprocess.run(python, check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split(" ", 1) for line in lines)


@pytest.mark.parametrize("command", ALONE)
def test_a_command_needs_no_extra(imported: dict[str, str], command: str) -> None:
    assert imported[command] == "imported"


@pytest.mark.parametrize("command", WANTING)
def test_a_command_names_the_extra_that_it_needs(imported: dict[str, str], command: str) -> None:
    assert imported[command].startswith("Missing No module named ")
    assert imported[command].endswith(f": pip install '{WANTING[command]}'")
