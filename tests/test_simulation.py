"""One GPU at a load: figures that can be told by hand, and the search for serial batching."""

import pytest

from recflow_jax.measure import simulation, traffic, tuning
from recflow_jax.measure.simulation import (
    INCREMENTAL,
    SERIAL,
    saturation_qps,
    simulate_idle,
    simulate_load,
    simulate_point,
)
from scheduling import Collecting, ProfileTable
from scheduling.request import WHOLE
from simulated import co_runs, gpu, made, parts, singles

ALONE_MS = 0.1 + 0.21  # a slice and a whole batch of 8


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LEAST_REQUESTS", 1000)


def test_an_idle_gpu_takes_a_batch_from_ids_to_scores():
    idle = simulate_idle(gpu(), INCREMENTAL, singles())
    assert (idle.p50_ms, idle.p99_9_ms) == pytest.approx((ALONE_MS, ALONE_MS))
    assert idle.batches == {8: 1000}
    assert [(u.segments, u.slice_samples, u.ride, u.share) for u in idle.steps] == [
        (1, 8, WHOLE, 1.0)
    ]


def test_serial_batching_waits_as_long_as_it_is_told():
    idle = simulate_idle(gpu(serial_wait_ms=3), SERIAL, singles())
    assert idle.p50_ms == pytest.approx(3 + ALONE_MS)
    assert idle.collecting == Collecting(wait_ms=3)


def test_saturated_it_runs_full_batches_back_to_back():
    assert saturation_qps(gpu(), SERIAL, singles()) == pytest.approx(1e6 * 16 / 550, rel=0.01)
    assert saturation_qps(gpu(), INCREMENTAL, singles()) == pytest.approx(1e6 * 16 / 550, rel=0.01)
    rides = gpu([*parts(), *co_runs()])
    assert saturation_qps(rides, INCREMENTAL, singles()) == pytest.approx(1e6 * 16 / 379, rel=0.01)


def test_the_plan_used_is_told_by_shares():
    rides = simulate_load(gpu([*parts(), *co_runs()]), INCREMENTAL, singles(), 40_000)
    assert sum(use.share for use in rides.steps) == pytest.approx(1)
    assert [use.share for use in rides.steps] == sorted(
        (u.share for u in rides.steps), reverse=True
    )
    pairs = {use.ride for use in rides.steps if use.segments and use.slice_samples}
    assert pairs == {"deep", WHOLE}


def test_serial_batching_is_as_good_as_any_wait_that_is_tried():
    for qps in (500, 12_000):
        tuned = simulate_load(gpu(), SERIAL, singles(), qps)
        fixed = [
            simulate_load(gpu(serial_wait_ms=wait_ms), SERIAL, singles(), qps).p99_ms
            for wait_ms in tuning.TRIED_WAITS_MS
        ]
        assert tuned.p99_ms <= min(fixed)
        assert tuned.collecting and tuned.collecting.wait_ms in tuning.TRIED_WAITS_MS


def test_a_load_above_saturation_falls_behind():
    assert not simulate_load(gpu(), INCREMENTAL, singles(seconds=1), 60_000).kept_up
    assert simulate_load(gpu(), INCREMENTAL, singles(), 10_000).kept_up


def test_every_request_has_its_answer_under_both_policies():
    point = simulate_point(gpu(), singles(), 20_000)
    for load in point.contenders.values():
        assert load.requests == 2000
        assert load.mean_batch * sum(load.batches.values()) == pytest.approx(2000)


def test_a_seed_gives_the_same_figures():
    def figures(table: ProfileTable, seed: int) -> simulation.SimulatedPoint:
        one = simulation.Gpu.of(table, host=gpu().host)
        return simulate_point(one, singles(seed=seed), 9000)

    assert figures(made(), 1) == figures(made(), 1) != figures(made(), 2)
