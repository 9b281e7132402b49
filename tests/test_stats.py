"""Counts and percentiles of what an engine has done."""

import numpy as np

from fake_segments import FakeSegments, samples
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.stats import Tally
from scheduling import Step
from test_launcher import eventually, fill_the_device, result

STEP = Step(id=0, slice=None, segment=None)


def test_a_wait_is_a_part_of_the_step_that_ended_last():
    tally = Tally(latency_window=10)
    tally.launched(STEP, [7])
    tally.ended_step(100, 150)
    tally.launched(STEP, [25])
    tally.ended_step(120, 250)  # behind the first, from 150 on
    tally.launched(STEP, [50, 200])
    waits = tally.waits()
    assert waits.us.tolist() == [7, 25, 50, 200]
    np.testing.assert_array_equal(waits.steps, [np.nan, 0.5, 0.5, 2])


def test_waits_are_of_the_last_requests_only():
    tally = Tally(latency_window=2)
    tally.launched(STEP, [1, 2, 3])
    assert tally.waits().us.tolist() == [2, 3]


def test_percentiles_of_waits_and_none_before_the_first():
    tally = Tally(latency_window=1000)
    names = {"queued_samples": 0, "backend": "xla", "backend_reason": "", "profile": None}
    assert np.isnan(tally.stats(**names).wait_p99_steps)
    tally.ended_step(0, 50)
    tally.launched(STEP, list(range(101)))
    stats = tally.stats(**names)
    assert (stats.wait_p50_us, stats.wait_p95_us, stats.wait_p99_us) == (50, 95, 99)
    assert (stats.wait_p50_steps, stats.wait_p99_steps) == (1, 1.98)


def test_a_request_waits_for_its_first_launch_alone():
    device = FakeSegments()
    with Engine.from_segments(device) as engine:
        held = fill_the_device(engine, device)
        assert len(engine.waits().us) == 1  # in four slices
        later = engine.submit(samples(1))
        eventually(lambda: engine.stats().queued_samples == 17)
        device.go_on()
        result(held)
        result(later)
        waits = engine.waits()
    assert len(waits.us) == 2 and 0 <= waits.us[0] and 0 < waits.us[1] < 30e6
