"""Counts and percentiles of what an engine has done."""

import numpy as np

from fake_segments import FakeSegments, samples
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.stats import Tally
from scheduling import Step
from test_launcher import fill_the_device, result

STEP = Step(id=0, slice=None, segment=None)


def test_waits_are_of_the_last_requests_only():
    tally = Tally(latency_window=2)
    tally.launched(STEP, [(1, 0), (2, 0), (3, 1)])
    assert tally.waits().us.tolist() == [2, 3]
    assert tally.waits().steps.tolist() == [0, 1]


def test_percentiles_of_waits_and_none_before_the_first():
    tally = Tally(latency_window=1000)
    names = {"queued_samples": 0, "backend": "xla", "backend_reason": "", "profile": None}
    assert np.isnan(tally.stats(accepted=(0, 0), **names).wait_p99_steps)
    tally.launched(STEP, [(us, us // 50) for us in range(101)])
    stats = tally.stats(accepted=(0, 0), **names)
    assert (stats.wait_p50_us, stats.wait_p95_us, stats.wait_p99_us) == (50, 95, 99)
    assert (stats.wait_p50_steps, stats.wait_p99_steps) == (1, 1)


def test_a_request_waits_until_its_first_launch():
    """Sixteen samples take four steps, of which three are in flight when another one comes."""
    device = FakeSegments()
    with Engine.from_segments(device) as engine:
        held = fill_the_device(engine, device)
        assert engine.waits().steps.tolist() == [0]
        later = engine.submit(samples(1))
        device.go_on()
        result(held)
        result(later)
        waits = engine.waits()
    assert len(waits.us) == 2 and (waits.us >= 0).all()
    assert 1 <= waits.steps[1] <= 4
