"""The console command: options reach the functions, errors are one line, exit codes hold."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from recflow_jax import cli, console
from recflow_jax.commands import info
from recflow_jax.measure.timing import STEADY
from recflow_jax.serving.options import ServerOptions

COMMANDS = ("demo", "train", "profile", "bench", "simulate", "serve", "tune", "info")

TINY = """
name = "tiny"
dense_width = 2
top_mlp = [4, 1]

[[tables]]
name = "items"
rows = 100
dim = 4

[[features]]
name = "items"
table = "items"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A model file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error may take."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("recflow: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("recflow: error: ").strip()


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command that raises `error`."""

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(info, "info", fail)
    return cli.run(["info"])


def called(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> Any:
    """How `command` calls the function of its name, which must take such a call."""
    words = command.split()
    module = importlib.import_module(f"recflow_jax.commands.{words[0]}")
    function = create_autospec(getattr(module, "_".join(words)))
    monkeypatch.setattr(module, "_".join(words), function)
    assert cli.run([*words, *arguments]) == 0
    function.assert_called_once()
    return function.call_args


COMPARING = [
    f"bench {name}"
    for name in (
        "model",
        "kernels",
        "host",
        "plans",
        "serve",
        "loadgen",
        "front-ends",
        "soak",
        "traces",
    )
]


@pytest.mark.parametrize("command", [*COMMANDS, *COMPARING])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:" in out and f"recflow {command}" in out.partition("Example:")[2]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_commands_and_exit_codes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {command}" in out for command in COMMANDS)
    codes = (console.OK, console.FAILED, console.BAD_INPUT, console.MISSING, console.INTERRUPTED)
    assert all(f"\n    {code} " in out for code in codes)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["serf"], "serf"),
        (["profile"], "--model"),
        (["profile", "--model", "no-such-model"], "no-such-model"),
        (["profile", "--model", "no-such.toml"], "no-such.toml"),
        (["profile", "--model", "rm1", "--table-dtype", "int4"], "int4"),
        (["bench", "model", "--model", "rm1", "--compute-dtype", "int8"], "int8"),
        (["profile", "--model", "rm1", "--max-batch", "0"], "--max-batch"),
        (["bench", "model", "--model", "rm1", "--batch", "256,many"], "'256,many'"),
        (["bench", "kernels", "--model", "rm1", "--backend", "triton"], "triton"),
        (["bench", "host", "--model", "rm1", "--request", "0"], "[0]"),
        (["train", "netflix", "--out", "x"], "netflix"),
        (["info", "--jsn"], "--jsn"),
        (["bench", "host", "--model", "rm1", "--out", "{file}/x.json"], "{file} is no folder"),
        (["bench", "model", "--model", "rm1", "--figure", "{folder}"], "{folder} is a folder"),
        (["train", "movielens", "--out", "{file}/x"], "{file} is no folder"),
        (["profile", "--model", "rm1", "--out", "{file}"], "{file} is no folder"),
        (["demo", "--out", "{file}"], "{file} is no folder"),
        (["serve", "--params", "x", "--token-file", "no-such"], "'no-such' does not exist"),
        (["serve", "--tls-certificate", "{file}", "--tls-key", "no-such"], "'no-such' does not"),
    ],
)
def test_bad_usage_names_the_culprit(
    arguments: list[str], culprit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"folder": tmp_path, "file": tmp_path / "file"}
    paths["file"].write_text("")
    assert cli.run([argument.format(**paths) for argument in arguments]) == console.BAD_INPUT
    assert culprit.format(**paths) in error_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("table 'x': no rows\nmore"), console.BAD_INPUT, "table 'x': no rows"),
        (FileNotFoundError(2, "No such file", "a.toml"), console.BAD_INPUT, "a.toml: No such file"),
        (console.Missing("no GPU; use xla"), console.MISSING, "no GPU; use xla"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), console.MISSING, "'torch'"),
        (ModuleNotFoundError("it is not", name="scheduling.x"), console.FAILED, "it is not"),
        (RuntimeError("ptxas died"), console.FAILED, "RuntimeError: ptxas died (RECFLOW_DEBUG=1"),
        (AssertionError(), console.FAILED, "AssertionError: "),
        (KeyboardInterrupt(), console.INTERRUPTED, "interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RECFLOW_DEBUG", raising=False)
    assert fails_with(monkeypatch, error) == code
    assert message in error_line(capsys)


def test_train_options(monkeypatch: pytest.MonkeyPatch) -> None:
    call = called(monkeypatch, "train", "movielens", "--out", "m.safetensors", "--seed", "3")
    assert call.args == ("movielens",)
    assert call.kwargs == {
        "out": Path("m.safetensors"),
        "data": None,
        "seed": 3,
        "epochs": 2,
        "compute_dtype": "float32",
        "interaction": "dot",
        "report": None,
    }


def test_demo_options(monkeypatch: pytest.MonkeyPatch) -> None:
    call = called(monkeypatch, "demo", "--quick", "--out", "d", "--data", "ml-100k")
    assert call.kwargs == {"out": Path("d"), "quick": True, "data": Path("ml-100k")}


def test_simulate_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    plans = ("--objective", "latency", "--plan-p99", "3", "--serial-wait-ms", "1")
    rates = ("--sample-ns", "40", "--id-ns", "2", "--upload-gb-s", "10", "--load", "0.5")
    call = called(
        monkeypatch,
        "simulate",
        "--model",
        tiny,
        "--profile",
        "t.json",
        "--qps",
        "2e6",
        *plans,
        *rates,
    )
    assert call.args[0].name == "tiny"
    host = call.kwargs.pop("host")
    assert (host.launch_us, host.sample_us, host.id_us, host.byte_us, host.answer_us) == (
        *(20, 0.04, 0.002, 1e-4, 30),
    )
    assert call.kwargs == {
        "profile": Path("t.json"),
        "qps": 2e6,
        "p99_ms": None,
        "loads": (0.5,),
        "objective": "latency",
        "plan_p99_ms": 3,
        "serial_wait_ms": 1,
        "request_samples": None,
        "burst": False,
        "seconds": 5.0,
        "seed": 0,
        "out": None,
        "figure": None,
    }


def test_profile_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    others = ("--no-resume", "--quick", "--max-batch", "64", "--ids", "zipf(1.05)")
    call = called(monkeypatch, "profile", "--model", tiny, "--out", "p", *others)
    assert call.args[0].name == "tiny"
    assert call.kwargs == {
        "out": Path("p"),
        "backend": "auto",
        "max_batch": 64,
        "resume": False,
        "quick": True,
        "seed": 0,
        "ids": "zipf(1.05)",
    }


def test_tune_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    call = called(monkeypatch, "tune", "--model", f"{tiny},rm1", "--batch", "8", "--out", "t")
    assert [config.name for config in call.kwargs.pop("models")] == ["tiny", "rm1"]
    assert call.kwargs == {"out": Path("t"), "batches": (8,), "resume": True}


def test_nothing_is_tuned_where_no_kernels_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune"]) == console.MISSING
    assert "there is nothing to tune on this device: cpu is no GPU" in capsys.readouterr().err


def test_bench_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    lists = ("--batch", "8, 16", "--against", "jax,torch", "--mode", "numpy,online")
    call = called(
        monkeypatch, "bench model", "--model", tiny, *lists, "--qps", "10,20.5", "--load", ""
    )
    assert call.args[0].name == "tiny"
    assert call.kwargs["batches"] == (8, 16)
    assert call.kwargs["against"] == ("jax", "torch")
    assert call.kwargs["modes"] == ("numpy", "online")
    assert call.kwargs["online"].qps == (10.0, 20.5)
    assert call.kwargs["online"].loads == ()


def test_model_options_vary_the_model(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    dtypes = ("--table-dtype", "bfloat16", "--compute-dtype", "float16")
    call = called(monkeypatch, "bench model", "--model", tiny, "--max-rows-per-table", "7", *dtypes)
    (table,) = call.args[0].tables
    assert (table.rows, table.dtype, call.args[0].compute_dtype) == (7, "bfloat16", "float16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_tables_may_be_quantised(dtype: str, monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    call = called(monkeypatch, "profile", "--model", tiny, "--table-dtype", dtype)
    assert {table.dtype for table in call.args[0].tables} == {dtype}


def test_shipped_models_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        called(monkeypatch, "bench model", "--model", "dlrm-kaggle").args[0].name == "dlrm-kaggle"
    )


def test_bench_kernels_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    options = ("--kernel", "gather,dense", "--batch", "8", "--out", "g.json", "--steady")
    call = called(monkeypatch, "bench kernels", "--model", tiny, *options)
    assert call.kwargs["kernels"] == ("gather", "dense")
    assert call.kwargs["batches"] == (8,)
    assert call.kwargs["out"] == Path("g.json")
    assert call.kwargs["timing"] == STEADY


def test_serve_options(monkeypatch: pytest.MonkeyPatch, tiny: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("open sesame\n")
    engine = ("--max-batch", "64", "--max-queued-samples", "100")
    server = ("--host", "0.0.0.0", "--no-grpc", "--max-body-mib", "1", "--token-file", str(token))
    call = called(
        monkeypatch, "serve", "--model", tiny, "--random-params", *engine, *server, "--name", "n"
    )
    assert call.args[0].name == "tiny"
    assert (call.kwargs["random"], call.kwargs["params"], call.kwargs["name"]) == (True, None, "n")
    assert call.kwargs["engine"].max_batch == 64
    assert call.kwargs["engine"].max_queued_samples == 100
    assert call.kwargs["server"] == ServerOptions(
        host="0.0.0.0", grpc_port=None, max_body_bytes=2**20, token="open sesame"
    )


def test_served_models_are_varied_only_if_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--params", "p", "--table-dtype", "int8"]) == console.BAD_INPUT
    assert "vary --model, which is missing" in error_line(capsys)


def test_bench_host_options(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    options = ("--request", "1,8", "--busy", "--steady")
    call = called(monkeypatch, "bench host", "--model", tiny, *options)
    assert call.args[0].name == "tiny"
    assert call.kwargs == {
        "request_sizes": (1, 8),
        "ids": "uniform",
        "seed": 0,
        "busy": True,
        "timing": STEADY,
        "out": None,
    }


def test_a_missing_gpu_and_missing_data_are_missing() -> None:
    from recflow_jax.backend import BackendError
    from recflow_jax.data.movielens import DataError

    for error in (BackendError("no GPU"), DataError("no MovieLens")):
        assert console.exit_code(error) == console.MISSING
        assert console.one_line(error) == str(error)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECFLOW_DEBUG", "1")
    with pytest.raises(ValueError, match="here"):
        fails_with(monkeypatch, ValueError("here"))


def test_the_option_debug_sets_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECFLOW_DEBUG", "")
    assert cli.run(["--debug", "info", "--json"]) == 0
    assert os.environ["RECFLOW_DEBUG"] == "1"


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"]["platform"] == "cpu"
    assert facts["backend"]["name"] == "xla" and facts["backend"]["reason"]
    assert facts["versions"]["jax"]
    assert "dlrm-v2" in facts["models"]


def test_info_for_reading(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info"]) == 0
    out = capsys.readouterr().out
    assert "back end  xla (" in out and "dlrm-v2" in out


def test_ceilings_have_a_source() -> None:
    h100 = info.ceilings("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    assert h100["copy_tb_s"] == [2.96, 3.02] and "JAX" in h100["source"]
    assert info.ceilings("NVIDIA H200") is not None
    assert info.ceilings("abacus") is None


def test_the_command_sets_the_exit_code_of_the_process() -> None:
    command = [sys.executable, "-m", "recflow_jax", "profile", "--model", "no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (console.BAD_INPUT, "")
    assert done.stderr.startswith("recflow: error: no model 'no-such-model' is shipped")


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("compiling", 2) as advance:
        advance()
    assert capsys.readouterr() == ("", "")
