"""HDR histograms of latencies: what goes in comes out, within a thousandth."""

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from recflow_jax.measure import histograms
from recflow_jax.measure.histograms import encoded


def percentile_ms(histogram: str, percentile: float) -> float:
    return HdrHistogram.decode(histogram).get_value_at_percentile(percentile) / 1000


def test_percentiles_survive() -> None:
    latencies_ms = np.random.default_rng(1).exponential(3, 20_000)
    histogram = encoded(latencies_ms)
    assert histogram is not None
    for percentile in (50, 90, 99, 99.9, 100):
        exact = np.percentile(latencies_ms, percentile)
        assert percentile_ms(histogram, percentile) == pytest.approx(exact, rel=2e-3)


def test_what_is_outside_counts_at_the_ends() -> None:
    histogram = encoded(np.array([0.0, 1e9]))
    assert histogram is not None
    assert percentile_ms(histogram, 50) == 1e-3
    assert percentile_ms(histogram, 100) == pytest.approx(3.6e6, rel=1e-3)


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "HdrHistogram", None)
    assert encoded(np.ones(3)) is None
