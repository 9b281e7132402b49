"""What is counted lies between the driver's start and stop, and everything ran once before."""

from types import SimpleNamespace
from typing import Any

import pytest
from jax import numpy as jnp

import small_models as models
from recflow_jax.measure import counted, hbm


class Driver:
    """Notes its calls; `fails` gives a status that is no success."""

    def __init__(self, calls: list[str], fails: str = "") -> None:
        self.calls, self.fails = calls, fails

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> int:
            self.calls.append(name)
            return 201 if name == self.fails else 0

        return call


CONTEXT = ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]


def test_launches_are_counted_from_start_to_stop(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(name: str) -> Any:
        return lambda *_: calls.append(name)

    co_run = SimpleNamespace(timed=SimpleNamespace(launch=noting("co-run")))
    pipeline = SimpleNamespace(run_dnn=noting("dnn"), contenders=lambda: {"deep/all": co_run})
    asked: dict[str, Any] = {}

    def built(config: Any, _: Any, backend: Any, sets: Any, rides: Any) -> Any:
        asked.update(config=config, backend=backend, sets=sets, rides=rides)
        return pipeline

    def drawn(_: Any, samples: int, **options: Any) -> Any:
        asked.update(options)
        return f"sets of {samples}"

    monkeypatch.setattr(counted, "kernels_to", lambda act: f"kernels to {act}")
    monkeypatch.setattr(counted, "input_sets", drawn)
    monkeypatch.setattr(counted, "traced_pipeline", built)
    monkeypatch.setattr(counted, "boundary", noting("boundary"))
    monkeypatch.setattr(counted.ctypes, "CDLL", lambda _: Driver(calls))
    model = tmp_path / "model.toml"
    model.write_text(models.DCN.to_toml())
    counted.main([str(model), "8", "deep/all", "zipf(1.1)", "3"])
    step = ["dnn", "boundary", "co-run"]
    assert calls == [*step, *CONTEXT, "cuProfilerStart", *step, "cuProfilerStop"]
    assert asked == {
        "config": models.DCN,
        "backend": "kernels to trace",
        "sets": "sets of 8",
        "rides": ["deep/all"],
        "ids": "zipf(1.1)",
        "seed": 3,
    }


def test_a_driver_that_refuses_is_an_error() -> None:
    calls: list[str] = []
    with pytest.raises(OSError, match="cuCtxSetCurrent of the CUDA driver gives 201"):
        with counted.counted(Driver(calls, fails="cuCtxSetCurrent")):
            calls.append("launched")
    assert calls == CONTEXT


def test_the_boundary_is_named_after_what_it_computes() -> None:
    """XLA names kernels after operations."""
    compiled = counted.boundary.lower(jnp.ones(1024)).as_text(dialect="hlo")
    assert hbm.BOUNDARY in compiled
