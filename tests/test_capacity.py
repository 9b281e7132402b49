"""How many GPUs a load needs: by hand, by theory, and where none will do."""

import math

import pytest

from recflow_jax.measure import traffic
from recflow_jax.measure.capacity import capacity
from recflow_jax.measure.simulation import INCREMENTAL, SERIAL, simulate_load
from simulated import co_runs, gpu, parts, singles


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LEAST_REQUESTS", 2000)


@pytest.mark.parametrize("qps", [1000, 150_000, 5_000_000])
def test_so_many_hold_the_p99_and_markedly_fewer_do_not(qps: float):
    found = capacity(gpu(), INCREMENTAL, singles(), qps=qps, p99_ms=1.2)
    assert found.gpus and found.each
    assert found.each.qps == qps / found.gpus and found.each.p99_ms <= 1.2
    fewer = math.floor(0.95 * found.gpus)
    if fewer:
        load = simulate_load(gpu(), INCREMENTAL, singles(), qps / fewer)
        assert load.p99_ms > 1.2


def test_one_gpu_is_enough_for_little():
    assert capacity(gpu(), INCREMENTAL, singles(), qps=10, p99_ms=1).gpus == 1


def test_rides_save_gpus():
    alone, riding = (
        capacity(gpu(rows), INCREMENTAL, singles(), qps=1e6, p99_ms=1.5).gpus
        for rows in (parts(), [*parts(), *co_runs()])
    )
    assert alone and riding and riding < alone


@pytest.mark.parametrize("policy", [INCREMENTAL, SERIAL])
def test_a_p99_that_an_idle_gpu_exceeds_is_held_by_none(policy: str):
    found = capacity(gpu(), policy, singles(), qps=1000, p99_ms=0.3)
    assert (found.gpus, found.each) == (None, None)
    assert found.idle_p99_ms == pytest.approx(0.31)


def test_each_load_is_told():
    told: list[None] = []
    capacity(gpu(), INCREMENTAL, singles(), qps=1e5, p99_ms=1, advance=lambda: told.append(None))
    assert 2 <= len(told) <= 20
