"""The search for a server's largest load: what counts as kept, and what a hiccup does."""

from dataclasses import replace

import pytest

from recflow_jax.measure.load import LoadResult
from recflow_jax.measure.sustained import BEYOND, CLOSE_ENOUGH, keeps, sustained

FAST = LoadResult(
    offered_per_s=100,
    answered_per_s=100,
    samples_per_s=100,
    requests=100,
    failed=0,
    failures={},
    p50_ms=1,
    p90_ms=2,
    p95_ms=3,
    p99_ms=4,
    p999_ms=5,
    max_ms=6,
    histogram=None,
)
SLOW = replace(FAST, p99_ms=11)


def load(qps: float) -> LoadResult:
    """Keeps 10 ms up to 600 requests per second."""
    return replace(FAST if qps <= 600 else SLOW, offered_per_s=qps, answered_per_s=qps)


def test_the_largest_load_is_found_and_told() -> None:
    found = sustained(load, 1000, 10)
    assert found.load is not None
    assert found.qps <= 600 <= found.qps * (1 + 1.1 * CLOSE_ENOUGH)
    assert found.load.offered_per_s == found.qps


def test_one_hiccup_is_no_limit() -> None:
    hiccups = iter([SLOW])
    found = sustained(lambda qps: next(hiccups, load(qps)), 590, 10)
    assert found.qps == 590


@pytest.mark.parametrize("most", [300, 560])
def test_a_saturation_that_was_measured_too_low_is_no_limit(most: float) -> None:
    found = sustained(load, most, 10)
    assert found.load is not None and found.load.offered_per_s == found.qps
    assert found.qps <= 600 < BEYOND * found.qps


def test_none_keeps_it() -> None:
    found = sustained(load, 1000, 1)
    assert (found.qps, found.load) == (0, None)


def test_loads_below_the_least_are_not_offered() -> None:
    offered: list[float] = []

    def slow(qps: float) -> LoadResult:
        offered.append(qps)
        return SLOW

    assert sustained(slow, 100, 10, least=30).load is None
    assert offered == [100, 100, 50, 50]


@pytest.mark.parametrize(
    ("change", "kept"),
    [({}, True), ({"failed": 1}, False), ({"p99_ms": 10.1}, False), ({"answered_per_s": 9}, False)],
)
def test_what_counts_as_kept(change: dict[str, float], kept: bool) -> None:
    assert keeps(replace(FAST, **change), 10) is kept
