"""The times of steps from a profile table, each by its own scheme."""

from itertools import product

import pytest

from fake_device import step
from hand_tables import row, table
from scheduling import ProfileMiss, SegmentShape, SliceBucket, TableTimes
from scheduling.costs import CO_RUN, StepCosts, segment_key, slice_key, step_key

SMALL, LARGE = SliceBucket(samples=2, ids=20), SliceBucket(samples=4, ids=40)
FIRST, LAST = SegmentShape.all_of(2, 8)
TABLE = table(
    [
        row(slice_key(SMALL), 10),
        row(slice_key(LARGE), 17),
        row(segment_key(FIRST), 100),
        row(segment_key(LAST), 200),
        row(step_key(LAST, LARGE), 205),
        row(step_key(LAST, LARGE, scheme=CO_RUN, config="deep"), 202),
    ]
)


@pytest.mark.parametrize(
    ("segment", "slice", "co_run", "us"),
    [
        (None, SMALL, None, 10),
        (None, LARGE, None, 17),
        (LAST, None, None, 200),
        (LAST, LARGE, None, 205),
        (LAST, LARGE, "deep", 202),
        (LAST, SMALL, None, 210),
        (FIRST, LARGE, None, 117),
    ],
)
def test_a_step_takes_what_was_measured_of_its_scheme(segment, slice, co_run, us: float):
    times = TableTimes(TABLE)
    assert [times.step_us(step(segment, slice, co_run)) for _ in range(2)] == [us, us]


def test_a_simulated_step_takes_what_it_was_planned_with():
    costs, times = StepCosts(TABLE), TableTimes(TABLE)
    for shape, size in product((FIRST, LAST), (SMALL, LARGE)):
        cost, co_run = costs.best(shape, size)
        assert times.step_us(step(shape, size, co_run)) == cost.us
        assert times.step_us(step(shape, size)) == costs.serial(shape, size).us


@pytest.mark.parametrize("co_run", [None, "deep"])
def test_what_was_not_measured_is_no_guess(co_run: str | None):
    unknown = SegmentShape(segments=2, index=0, batch=4)
    with pytest.raises(ProfileMiss, match=r"segments=2, segment=0, batch=4"):
        TableTimes(TABLE).step_us(step(unknown, SMALL, co_run))


def test_a_co_run_by_another_config_is_no_guess_either():
    with pytest.raises(ProfileMiss, match="config=wide"):
        TableTimes(TABLE).step_us(step(LAST, LARGE, "wide"))
