"""All plans of small tables, by hand."""

from hand_tables import row, table
from scheduling.alternatives import Alternatives, alone, fitting
from scheduling.costs import CO_RUN, StepCosts, segment_key, slice_key, step_key
from scheduling.request import SegmentShape, SliceBucket, StepShape

SMALL, LARGE = SLICES = tuple(SliceBucket(samples=n, ids=10 * n) for n in (4, 8))
WHOLE = SegmentShape(segments=1, index=0, batch=8)
RIDE = row(step_key(WHOLE, SMALL, scheme=CO_RUN, config="ride"), 9)
ROWS = [*(row(slice_key(size), 1) for size in SLICES), row(segment_key(WHOLE), 8), RIDE]


def beside(size: SliceBucket | None, co_run: str | None = None) -> StepShape:
    return StepShape(segment=WHOLE, slice=size, co_run=co_run)


def test_any_slice_that_can_be_filled_by_any_scheme_measured():
    alternatives = Alternatives(StepCosts(table(ROWS)), SLICES, [1])
    assert {*alternatives.of(8, 3)} == {
        (beside(None), *alone(SLICES, 3)),
        (beside(SMALL),),
        (beside(SMALL, "ride"),),
    }
    assert (beside(SMALL, "ride"), *alone(SLICES, 2)) in {*alternatives.of(8, 6)}
    assert {*alternatives.of(8, 0)} == {(beside(None),)}


def test_each_segment_has_its_choice():
    alternatives = Alternatives(StepCosts(table(ROWS)), SLICES, [1, 2])
    assert len({*alternatives.of(8, 8)}) == 4 + 6


def test_what_is_left_goes_in_the_largest_slices():
    steps = alone(SLICES, 17)
    assert [step.slice for step in steps] == [LARGE, LARGE, SMALL]
    assert fitting(SLICES, 5) == LARGE and fitting(SLICES, 100) == LARGE
    assert not alone(SLICES, 0)
