"""The command: what it writes, whatever can be counted, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

import small_models as models
from recflow_jax import cli, console
from recflow_jax.backend import Backend, choose_backend
from recflow_jax.commands import bench_traces as command
from recflow_jax.measure.hbm import CountedKernel, HbmTraffic, HbmUse, NotCounted
from recflow_jax.measure.launch_trace import LaunchTrace, Region, summary
from recflow_jax.measure.timeline import Kernel, Timeline

CONFIG = models.BF16
KERNEL = CountedKernel(name="k", dram_bytes=5e7, us=25.0, peak_pct=40.0)
TRAFFIC = HbmTraffic(kernels=[KERNEL])
REGIONS = [
    Region(block=0, warpgroup=0, name="multiply", start_us=0, end_us=3),
    Region(block=1, warpgroup=2, name="gather", start_us=0, end_us=5),
]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pipeline on the CPU, with a profiler that has seen a kernel; what was asked for."""
    asked: dict[str, Any] = {}

    def kernels_to(_: str) -> Backend:
        backend = choose_backend("xla")
        return replace(backend, ops=replace(backend.ops, corun_configs=("plain",)))

    def launch(*_: Any, samples: int, slice_samples: int, ids: str, seed: int) -> LaunchTrace:
        return LaunchTrace(
            layer="top.0", samples=samples, inputs=8, outputs=4, slice_samples=slice_samples,
            config="deep", blocks=2, warpgroups=3, kernel_us=5.0, clock_mhz=1980.0,
            **summary(REGIONS, workers=2),
        )  # fmt: skip

    def count(_: Any, **workload: Any) -> HbmUse:
        asked.update(workload)
        return HbmUse(dnn=TRAFFIC, co_run=TRAFFIC)

    kernels = [Kernel(name="k", kind="dnn", start_us=0.0, duration_us=30.0)]
    monkeypatch.setattr(command, "kernels_to", kernels_to)
    monkeypatch.setattr(command, "trace_launch", launch)
    monkeypatch.setattr(command, "count_hbm", count)
    monkeypatch.setattr(
        command, "record", lambda n, _, batches: Timeline(name=n, batches=batches, kernels=kernels)
    )
    return asked


def test_everything_is_written(simulated: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    result = command.bench_traces(
        CONFIG, batch=8, slice_samples=4, ride="plain/all", seed=3, out=tmp_path
    )
    assert simulated == {"batch": 8, "ride": "plain/all", "ids": "uniform", "seed": 3}
    written = json.loads((tmp_path / "traces.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"device", "versions", "created", "command", "seed"} <= set(written)
    assert written["workload"] == {"batch": 8, "slice_samples": 4}
    assert [line["name"] for line in written["timelines"]] == ["serial", "plain/all"]
    assert written["timelines"][0]["us_per_batch"] == 10
    assert written["hbm"]["dnn"]["tb_per_s"] == 2 and written["hbm_missing"] is None
    assert written["launch"]["shares"] == {"multiply": 0.3, "gather": 0.5, "both": 0.0}
    assert (tmp_path / "timeline.png").exists() and (tmp_path / "launch.png").exists()
    assert "co-run 2.00 TB/s, 40 % of the peak" in capsys.readouterr().out


def test_the_fastest_ride_is_shown_even_if_nothing_is_counted(
    simulated: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> HbmUse:
        raise NotCounted("ncu is not on PATH")

    monkeypatch.setattr(command, "count_hbm", fail)
    times = {"serial": 9.0, "in-turn": 7.0, "plain/one": 5.0, "plain/all": 6.0}
    monkeypatch.setattr(
        command, "_medians_us", lambda contenders: {n: times[n] for n in contenders}
    )
    result = command.bench_traces(CONFIG, batch=8, slice_samples=4, out=tmp_path)
    assert result["ride"] == "plain/one" and result["median_us"] == times
    assert (result["hbm"], result["hbm_missing"]) == (None, "ncu is not on PATH")
    assert (tmp_path / "timeline.png").exists()


def test_a_ride_that_is_not_there_is_refused(simulated: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ride 'x' is not one of in-turn, plain/one"):
        command.bench_traces(CONFIG, batch=8, ride="x", out=tmp_path)


def test_without_a_gpu_something_is_missing(tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "m.toml"
    model.write_text(CONFIG.to_toml())
    arguments = ["bench", "traces", "--model", str(model), "--batch", "8", "--out", str(tmp_path)]
    assert cli.run(arguments) == console.MISSING
    assert "there is nothing to trace on this device" in capsys.readouterr().err


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--batch", "16", "--slice", "8", "--ride", "deep/all", "--ids", "zipf(1.2)")
    function = create_autospec(command.bench_traces)
    monkeypatch.setattr(command, "bench_traces", function)
    arguments = ["bench", "traces", "--model", "rm1", *options, "--out", str(tmp_path)]
    assert cli.run(arguments) == console.OK
    call = function.call_args
    assert call.args[0].name == "rm1"
    assert call.kwargs == {
        "batch": 16,
        "slice_samples": 8,
        "ride": "deep/all",
        "ids": "zipf(1.2)",
        "seed": 0,
        "out": tmp_path,
    }
