"""Requests to simulate with: as many, as large and as often as was asked for."""

import numpy as np
import pytest

import small_models as models
from recflow_jax.data.workloads import expected_ids_per_sample
from recflow_jax.measure import traffic
from recflow_jax.measure.traffic import Traffic


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LEAST_REQUESTS", 2000)


def test_requests_come_at_the_rate_for_so_long():
    requests = [*Traffic(config=models.DOT, seconds=3).at_rate(1000)]
    assert len(requests) == 3000
    assert requests[-1].arrived_us == pytest.approx(3e6, rel=0.1)
    sizes = [request.samples for request in requests]
    assert np.mean(sizes) == pytest.approx(270, rel=0.1)


def test_samples_have_the_ids_of_the_model():
    made = Traffic(config=models.CONCAT, request_samples=100).at_rate(1)
    ids = [request.ids / request.samples for request in made]
    assert np.mean(ids) == pytest.approx(expected_ids_per_sample(models.CONCAT), rel=0.05)
    assert np.std(ids) > 0


def test_a_request_may_be_larger_than_the_pool():
    (one,) = Traffic(config=models.DOT, request_samples=10_000).at_once(10_000)
    assert (one.samples, len(one.id_offsets)) == (10_000, 10_001)


def test_a_slow_load_still_has_enough_requests():
    assert len([*Traffic(config=models.DOT, seconds=1).at_rate(10)]) == 2000


def test_alone_and_at_once():
    made = Traffic(config=models.DOT, request_samples=7)
    alone = [request.arrived_us for request in made.alone()]
    assert set(np.diff(alone)) == {traffic.ALONE_US}
    assert [request.arrived_us for request in made.at_once(21)] == [0, 0, 0]


def test_the_same_seed_draws_the_same_requests():
    def drawn(seed: int) -> list[tuple[int, int, int]]:
        made = Traffic(config=models.DOT, seed=seed).at_rate(500)
        return [(request.arrived_us, request.samples, request.ids) for request in made]

    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float):
    with pytest.raises(ValueError, match="seconds is"):
        Traffic(config=models.DOT, seconds=seconds)
