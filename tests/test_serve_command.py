"""`recflow serve` as a process: what it says, what it answers, how it ends."""

import importlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest

from recflow_jax import cli, console
from recflow_jax.params import init_params, save_params
from recflow_jax.serving.server import Ending
from request_tensors import as_json, packed, request
from running_server import SOON_S
from small_models import NO_DENSE, reference_scores

COMMAND = [sys.executable, "-m", "recflow_jax", "serve", "--http-port", "0", "--no-grpc"]
COMMAND += ["--log-format", "json"]
SMALL = ["--max-batch", "8", "--segments", "1"]


class Process:
    """A server of its own; its log as it comes."""

    def __init__(self, *arguments: str) -> None:
        small = [] if "--engine" in arguments else SMALL
        self._process = subprocess.Popen(
            [*COMMAND, *small, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._lines.put(line)

    def wait_for(self, event: str) -> dict[str, Any]:
        while True:
            told = json.loads(self._lines.get(timeout=SOON_S))
            if told["event"] == event:
                return told

    @cached_property
    def port(self) -> int:
        return self.wait_for("listening")["http_port"]

    def has_loaded(self, library: str) -> bool:
        """Whether its memory has something of that library's."""
        return library in Path(f"/proc/{self._process.pid}/maps").read_text()

    def end(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self.code()

    def code(self) -> int:
        return self._process.wait(SOON_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(SOON_S)
        self._reader.join(SOON_S)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_params(path, NO_DENSE, init_params(NO_DENSE, seed=1))
    return path


@pytest.fixture
def process(params: Path) -> Iterator[Process]:
    process = Process("--params", str(params))
    yield process
    process.kill()


def test_it_serves_a_model_until_sigterm(process: Process) -> None:
    url = f"http://127.0.0.1:{process.port}"
    ready = process.wait_for("ready")
    assert (ready["model"], ready["backend"], ready["level"]) == ("no_dense", "xla", "info")
    batch = request(NO_DENSE, 3, seed=1)
    body = as_json(packed(NO_DENSE, batch))
    answer = httpx.post(f"{url}/v2/models/no_dense/infer", json=body, timeout=SOON_S)
    expected = reference_scores(NO_DENSE, init_params(NO_DENSE, seed=1), batch)
    assert answer.json()["outputs"][0]["data"] == pytest.approx(expected.ravel().tolist(), rel=1e-4)
    assert process.end() == 0
    assert process.wait_for("ended")["drained"] is True


def test_servers_share_an_engine_until_it_is_gone(params: Path, tmp_path: Path) -> None:
    """Whichever starts first; to share it takes no JAX."""
    path = tmp_path / "engine"
    other = Process("--engine", str(path))
    engines = Process("--params", str(params), "--front-ends", str(path))
    try:
        urls = [f"http://127.0.0.1:{server.port}" for server in (other, engines)]
        ready = other.wait_for("ready")
        assert (ready["model"], ready["backend"]) == ("no_dense", "xla")
        batch = request(NO_DENSE, 3, seed=1)
        body = as_json(packed(NO_DENSE, batch))
        expected = reference_scores(NO_DENSE, init_params(NO_DENSE, seed=1), batch).ravel().tolist()
        engines.wait_for("ready")
        for url in urls:
            answer = httpx.post(f"{url}/v2/models/no_dense/infer", json=body, timeout=SOON_S)
            assert answer.json()["outputs"][0]["data"] == pytest.approx(expected, rel=1e-4)
        assert "recflow_front_end_samples_answered_total" in httpx.get(f"{urls[0]}/metrics").text
        assert engines.has_loaded("jaxlib") and not other.has_loaded("jaxlib")
        assert engines.end() == 0 and not path.exists()
        assert other.wait_for("ended")["drained"] is True
        assert other.code() == 1
    finally:
        other.kill()
        engines.kill()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--engine", "e", "--model", "rm1"], "the model and its engine are the other server's"),
        (["--engine", "e", "--max-batch", "8"], "the model and its engine are the other server's"),
        (["--params", "p", "--front-ends", "f", "--model-control", "."], "--model-control not"),
        (["--params", "p", "--front-ends", "."], "front ends cannot be let in at .:"),
        (["--params", "p", "--front-ends", 200 * "x"], "too long"),
    ],
    ids=["engine and model", "engine and its size", "front ends and control", "taken", "long"],
)
def test_what_does_not_go_together(
    told: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["serve", *told]) == console.BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["serve"]) == console.BAD_INPUT
    assert "serve takes --params FILE, or --model with --random-params" in capsys.readouterr().err
    for module in ("serve_engine_of", "server_process"):
        monkeypatch.delitem(sys.modules, f"recflow_jax.commands.{module}")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert cli.run(["serve"]) == console.MISSING
    assert "pip install 'recflow-jax[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("drained", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_all_was_answered(
    drained: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    command = importlib.import_module("recflow_jax.commands.server_process")
    with pytest.raises(SystemExit) if code else nullcontext():
        command._leave(Ending(drained=drained, quiet=True))
    assert exits == []
    with suppress(SystemExit):  # the real one does not come back
        command._leave(Ending(drained=drained, quiet=False))
    assert exits == [code]
