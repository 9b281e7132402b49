"""Ladders: geometric, complete, and never wasteful beyond their factor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.buckets import ladder, smallest_holding


@pytest.mark.parametrize(
    ("arguments", "rungs"),
    [
        ({"largest": 8}, (1, 2, 4, 8)),
        ({"largest": 100, "smallest": 19}, (19, 38, 76, 100)),
        ({"largest": 7, "smallest": 7}, (7,)),
        ({"largest": 12, "factor": 1.5}, (1, 2, 3, 4, 6, 9, 12)),
        ({"largest": 2048, "smallest": 32, "factor": 4}, (32, 128, 512, 2048)),
        ({"largest": 9, "smallest": 2, "factor": float("inf")}, (2, 9)),
    ],
)
def test_a_ladder_climbs_by_its_factor_to_the_largest(arguments, rungs):
    assert ladder(**arguments) == rungs


@given(
    smallest=st.integers(1, 50),
    more=st.integers(0, 500),
    factor=st.floats(1.01, 10),
    share=st.floats(0, 1),
)
def test_no_size_is_padded_by_more_than_the_factor(smallest, more, factor, share):
    rungs, n = ladder(smallest + more, smallest, factor), smallest + int(share * more)
    bucket = smallest_holding(rungs, n)
    assert n <= bucket <= max(n, factor * n)
    assert all(rung < n for rung in rungs if rung < bucket)
    assert list(rungs) == sorted(set(rungs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest": 4, "smallest": 0}, "from 0 to 4"),
        ({"largest": 4, "smallest": 5}, "from 5 to 4"),
        ({"largest": 4, "factor": 1}, "factor is 1"),
        ({"largest": 4, "factor": float("nan")}, "factor is nan"),
    ],
)
def test_a_ladder_that_does_not_climb_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ladder(**arguments)


@pytest.mark.parametrize(("n", "bucket"), [(0, 1), (1, 1), (3, 4), (4, 4)])
def test_the_smallest_bucket_that_holds(n, bucket):
    assert smallest_holding((1, 2, 4), n) == bucket


def test_what_no_bucket_holds_is_refused():
    with pytest.raises(ValueError, match="5 does not fit the largest bucket, 4"):
        smallest_holding((1, 2, 4), 5)
    with pytest.raises(ValueError, match="none"):
        smallest_holding((), 1)
