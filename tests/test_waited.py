"""Histograms of waits."""

import numpy as np

from recflow_jax.engine.stats import Waits
from recflow_jax.measure.waited import Histogram, Waited


def test_every_value_is_in_a_bin_and_those_outside_at_the_ends():
    found = Histogram.of(np.array([-5, 0.5, 1.5, 1.6, 99]), np.array([0.0, 1, 2, 3]))
    assert found.counts == [2, 2, 1]
    assert (found.p50, found.max) == (1.5, 99)


def test_waits_of_the_last_requests():
    waits = Waits(us=np.array([900, 10, 20, 30, 40]), steps=np.array([9, 0, 1, 1, 20]))
    waited = Waited.of_last(waits, 4)
    assert (waited.requests, waited.within_a_step) == (4, 0.75)
    assert waited.steps.counts[:3] == [1, 2, 0] and waited.steps.counts[-1] == 1
    assert waited.us.p50 == 25 and sum(waited.us.counts) == 4
