"""Plans from times that make the best one plain to see, and against all there are."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hand_tables import row, table
from scheduling.costs import CO_RUN, Cost, StepCosts, segment_key, slice_key, step_key
from scheduling.planner import SerialPlans, TablePlans, _Choice, _undominated
from scheduling.request import (
    WHOLE,
    CoRun,
    SegmentShape,
    SliceBucket,
    StepShape,
    whole_batches,
)
from scheduling.table import ProfileMiss, ProfileRow

BATCHES = (8, 16)
SLICES = tuple(SliceBucket(samples=n, ids=10 * n) for n in (4, 8, 16))
FINEST = 3


def shapes(cuts: Sequence[int] = (1, FINEST)) -> Iterator[SegmentShape]:
    for cut, batch in product(cuts, BATCHES):
        yield from SegmentShape.all_of(cut, batch)


def parts(launch_us: float = 0.0, cuts: Sequence[int] = (1, FINEST)) -> list[ProfileRow]:
    """A slice of n samples takes n us, a batch of n 2 n us in all, and each launch so many more."""
    return [
        *(row(slice_key(size), size.samples + launch_us) for size in SLICES),
        *(row(segment_key(s), 2 * s.batch / s.segments + launch_us) for s in shapes(cuts)),
    ]


def co_run(shape: SegmentShape, size: SliceBucket, us: float, config: str = "deep") -> ProfileRow:
    return row(step_key(shape, size, scheme=CO_RUN, config=config), us)


def whole(batch: int) -> SegmentShape:
    return SegmentShape(segments=1, index=0, batch=batch)


# --- costs ----------------------------------------------------------------------------------------


def test_a_step_takes_the_sum_of_its_parts_unless_it_was_measured():
    costs = StepCosts(table([*parts(), row(step_key(whole(8), SLICES[0]), 17)]))
    assert costs.serial(whole(8), SLICES[0]) == Cost(17)
    assert costs.serial(whole(8), SLICES[1]) == Cost(16 + 8)
    assert costs.best(whole(8), SLICES[1]) == (Cost(24), None)


def test_the_fastest_co_run_is_taken_where_it_beats_serial():
    rows = [co_run(whole(8), SLICES[0], us, name) for us, name in ((19, "a"), (18, "b"), (30, "c"))]
    costs = StepCosts(table([*parts(), *rows, co_run(whole(8), SLICES[1], 25)]))
    assert costs.best(whole(8), SLICES[0]) == (Cost(18), "b")
    assert costs.best(whole(8), SLICES[1]) == (Cost(24), None)


def test_what_was_not_measured_is_a_miss():
    with pytest.raises(ProfileMiss, match="slice_samples=5"):
        StepCosts(table(parts())).slice(SliceBucket(samples=5, ids=5))


# --- throughput -----------------------------------------------------------------------------------


def test_launches_that_cost_time_are_avoided():
    assert TablePlans(table(parts(launch_us=1)), BATCHES, SLICES).segments(16, 0) == 1


def test_more_segments_where_each_hides_a_slice():
    """Only beside short segments slices are free."""
    rows = [co_run(s, SLICES[1], 2 * s.batch / 3) for s in shapes((FINEST,))]
    plans = TablePlans(table([*parts(), *rows]), BATCHES, SLICES)
    assert plans.segments(16, 16) == FINEST
    first = SegmentShape(segments=FINEST, index=0, batch=16)
    assert plans.slice_beside(first, 16) == SLICES[1]
    assert plans.co_run(first, SLICES[1]) == "deep"
    assert plans.predicted_us(16, 16) == pytest.approx(32)


def test_one_large_slice_where_that_is_what_hides():
    rows = [co_run(whole(16), SLICES[2], 33), co_run(whole(16), SLICES[0], 32)]
    plans = TablePlans(table([*parts(), *rows]), BATCHES, SLICES)
    assert plans.slice_beside(whole(16), 16) == SLICES[2]
    assert plans.predicted_us(16, 16) == 33
    assert plans.slice_beside(whole(16), 4) == SLICES[0]
    assert plans.predicted_us(16, 4) == 32


def test_only_what_is_used_has_to_be_compiled():
    rows = [co_run(whole(16), SLICES[2], 33), co_run(whole(8), SLICES[2], 99)]
    plans = TablePlans(table([*parts(launch_us=1), *rows]), BATCHES, SLICES)
    assert plans.cuts == {1}
    assert plans.co_runs == (CoRun(segment=whole(16), slice=SLICES[2], config="deep"),)


def test_a_host_that_launches_slowly_launches_less():
    """The cut that lets a slice hide takes three launches, and two more beside it."""
    rows = [row(r.key, r.median_us, launch_us=4) for r in parts()]
    rows += [
        row(step_key(s, SLICES[1], scheme=CO_RUN, config="deep"), 2 * s.batch / 3, launch_us=4)
        for s in shapes((FINEST,))
    ]
    fast, slow = (
        TablePlans(table(rows), BATCHES, SLICES, launch_factor=factor) for factor in (1, 5)
    )
    assert (fast.segments(16, 16), fast.predicted_us(16, 16)) == (FINEST, pytest.approx(32))
    assert (slow.segments(16, 16), slow.predicted_us(16, 16)) == (1, 48)
    assert slow.predicted_us(8, 4) == 2 * 20


def test_a_plan_takes_the_longer_of_its_launches_and_the_device():
    """A launch behind a long one is free; between short ones it is all that counts."""
    long, short = row(segment_key(whole(16)), 100, 10), row(segment_key(whole(8)), 1, 10)
    rows = [long, short, *(row(slice_key(size), 2, 10) for size in SLICES)]
    plans = TablePlans(table(rows), BATCHES, SLICES, cuts=(1,))
    assert plans.predicted_us(16, 4) == 102
    assert plans.predicted_us(8, 4) == 20


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_choices_are_those_that_none_beats_on_device_and_host(data: st.DataObject):
    times = st.integers(0, 5).map(float)
    costs = data.draw(st.lists(st.builds(Cost, times, times), min_size=1))
    kept = [choice.cost for choice in _undominated([_Choice(cost) for cost in costs])]
    for cost in costs:
        assert any(k.device_us <= cost.device_us and k.launch_us <= cost.launch_us for k in kept)
    for one, other in permutations(kept, 2):
        assert one.device_us < other.device_us or one.launch_us < other.launch_us
    assert kept[0].us == min(cost.us for cost in costs)


def all_plans(costs: StepCosts, shape: SegmentShape | None, waiting: int) -> Iterator[float]:
    """The times of every way to run the rest of a batch and gather what waits."""
    largest = SLICES[-1].samples
    if shape is None:
        total = 0.0
        while waiting > 0:
            total += costs.slice(next(s for s in SLICES if s.samples >= min(waiting, largest))).us
            waiting -= largest
        yield total
    elif waiting == 0:
        yield from (costs.segment(shape).us + rest for rest in all_plans(costs, shape.next, 0))
    else:
        for size in SLICES[: 1 + [s.samples >= waiting for s in SLICES].index(True)]:
            own, left = costs.best(shape, size)[0].us, max(waiting - size.samples, 0)
            yield from (own + rest for rest in all_plans(costs, shape.next, left))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_no_plan_is_faster_than_the_one_taken(data: st.DataObject):
    times = st.floats(1, 100)
    rows = [row(r.key, data.draw(times)) for r in parts()]
    rows += [co_run(s, size, data.draw(times)) for s in shapes() for size in SLICES]
    plans = TablePlans(table(rows), BATCHES, SLICES)
    for batch, waiting in product(BATCHES, (0, 4, 8)):
        starts = [SegmentShape(segments=cut, index=0, batch=batch) for cut in (1, FINEST)]
        best = min(us for start in starts for us in all_plans(plans.costs, start, waiting))
        assert plans.predicted_us(batch, waiting) == pytest.approx(best)


# --- latency --------------------------------------------------------------------------------------


def test_fine_cuts_let_arrivals_in_sooner():
    hidden = [co_run(s, z, 2 * s.batch / FINEST + 0.1) for s in shapes((FINEST,)) for z in SLICES]
    rows = [*parts(launch_us=0.1), *hidden]
    assert TablePlans(table(rows), BATCHES, SLICES).segments(16, 0) == 1
    assert TablePlans(table(rows), BATCHES, SLICES, objective="latency").segments(16, 0) == FINEST


def test_batches_are_kept_small_enough_for_a_p99():
    """Two whole batches of 16 with as much waiting take 2 * (32 + 16) us, two of 8 half of that."""

    def at_most(us: float) -> tuple[int, ...]:
        return TablePlans(table(parts()), BATCHES, SLICES, p99_ms=us / 1000).batch_buckets

    assert at_most(96) == BATCHES
    assert at_most(95) == (8,)
    with pytest.raises(ValueError, match="p99 of 0.047 ms: two batches of 8 samples take 0.048 ms"):
        at_most(47)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TablePlans(table(parts()), BATCHES, SLICES, objective=cast(Any, "fame")),
            "'fame' is not one",
        ),
        (lambda: TablePlans(table(parts()[1:]), BATCHES, SLICES), "slice_samples=4"),
        (lambda: TablePlans(table(parts()), (8, 16, 32), SLICES), "batch=32"),
        (lambda: TablePlans(table(parts(cuts=(1,))), BATCHES, SLICES, cuts=(3,)), "segments=3"),
    ],
)
def test_what_cannot_be_planned(make: Callable[[], TablePlans], message: str):
    with pytest.raises((ValueError, ProfileMiss), match=message):
        make()


def test_cuts_that_are_not_offered_are_not_taken():
    plans = TablePlans(table(parts()), BATCHES, SLICES, objective="latency", cuts=(1, 2))
    assert plans.cuts == {1}


def test_a_look_up_takes_microseconds():
    plans = TablePlans(table(parts()), BATCHES, SLICES)
    started, count = time.perf_counter(), 1000
    for waiting in range(count):
        shape = SegmentShape(segments=plans.segments(16, waiting), index=0, batch=16)
        plans.co_run(shape, plans.slice_beside(shape, waiting))
    assert (time.perf_counter() - started) / count < 200e-6


def test_serial_plans_launch_all_there_is():
    plans = SerialPlans(count=2, batch_buckets=BATCHES, largest_slice=SLICES[-1])
    shape = SegmentShape(segments=plans.segments(8, 99), index=1, batch=8)
    assert shape.last and plans.slice_beside(shape, 1) == SLICES[-1]
    assert plans.co_run(shape, SLICES[0]) is None and plans.co_runs == ()
    assert not plans.runs_whole(*WHOLE_BATCHES, crowded=False)


# --- whole batches --------------------------------------------------------------------------------

WHOLE_BATCHES = whole_batches((8,), SLICES)


def test_batches_that_slices_have_the_size_of_may_be_whole():
    (batch,) = WHOLE_BATCHES
    assert batch == CoRun(segment=whole(8), slice=SLICES[1], config=WHOLE)


def test_serial_plans_run_batches_whole_wherever_they_can():
    plans = SerialPlans(
        count=1, batch_buckets=BATCHES, largest_slice=SLICES[-1], whole=WHOLE_BATCHES
    )
    assert {*plans.co_runs} == WHOLE_BATCHES
    assert plans.runs_whole(*WHOLE_BATCHES, crowded=True)
    assert not plans.runs_whole(*whole_batches((16,), SLICES), crowded=False)


@pytest.mark.parametrize("rows", [[], [co_run(whole(8), SLICES[1], 20)]], ids=["none", "one"])
def test_a_batch_is_whole_unless_it_could_run_with_a_slice(rows: list[ProfileRow]):
    plans = TablePlans(table([*parts(), *rows]), BATCHES, SLICES, whole=WHOLE_BATCHES)
    assert plans.runs_whole(*WHOLE_BATCHES, crowded=False)
    assert plans.runs_whole(*WHOLE_BATCHES, crowded=True) == (not rows)
    assert WHOLE_BATCHES < {*plans.co_runs} or not rows


@pytest.mark.parametrize(("us", "rides"), [(43, True), (44, False)])
def test_slices_ride_beside_whole_batches_where_that_saves_a_tenth(us: float, rides: bool):
    """A whole batch of 16 takes 48 us."""
    every = whole_batches(BATCHES, SLICES)
    rows = [*parts(), co_run(whole(16), SLICES[2], us), co_run(whole(8), SLICES[1], 1)]
    plans = TablePlans(table(rows), BATCHES, SLICES, whole=every)
    assert plans.rides == rides and plans.riding_gain == pytest.approx(48 / us)
    assert plans.steps(16, 16) == (
        StepShape(segment=whole(16), slice=SLICES[2], co_run="deep"),
    )  # which is planned, and foretold, in either case
    assert plans.predicted_us(16, 16) == us
    riding = {cell for cell in plans.co_runs if cell.config != WHOLE}
    assert bool(riding) == rides and every <= {*plans.co_runs}
    for batch in every:
        assert plans.runs_whole(batch, crowded=False)
        assert plans.runs_whole(batch, crowded=True) != rides


def test_a_batch_may_be_whole_in_slices_of_more_ids_too():
    more_ids = SliceBucket(samples=16, ids=320)
    slices = (*SLICES, more_ids)
    rows = [*parts(), row(slice_key(more_ids), 20), co_run(whole(16), more_ids, 40)]
    plans = TablePlans(table(rows), BATCHES, slices, whole=whole_batches(BATCHES, slices))
    assert len(plans.whole) == 3 and plans.riding_gain == pytest.approx(1)


def test_where_nothing_rides_batches_are_not_cut():
    finest = product(shapes((FINEST,)), SLICES)
    rows = [co_run(s, z, 0.95 * (2 * s.batch / FINEST + z.samples)) for s, z in finest]
    of = (table([*parts(), *rows]), BATCHES, SLICES)
    assert TablePlans(*of).segments(16, 16) == FINEST
    plans = TablePlans(*of, whole=whole_batches(BATCHES, SLICES))
    assert 1 < plans.riding_gain < 1.1 and not plans.rides
    assert plans.cuts == {1} and plans.segments(16, 16) == 1
    assert len(plans.steps(16, 16)) == FINEST


def test_no_batch_is_whole_that_is_larger_than_the_p99_allows():
    every = whole_batches(BATCHES, SLICES)
    plans = TablePlans(table(parts()), BATCHES, SLICES, p99_ms=0.048, whole=every)
    assert plans.batch_buckets == (8,) and plans.whole == WHOLE_BATCHES


def test_a_whole_batch_takes_what_its_parts_take_and_one_launch():
    rows = [replace(row, launch_us=n) for n, row in enumerate(parts())]
    costs = StepCosts(table(rows))
    segment, piece = costs.segment(whole(8)), costs.slice(SLICES[1])
    found = costs.step(StepShape(segment=whole(8), slice=SLICES[1], co_run=WHOLE))
    launch_us = max(segment.launch_us, piece.launch_us)
    assert found == Cost(segment.device_us + piece.device_us, launch_us)


@pytest.mark.parametrize(("launch_us", "most"), [(0, 16), (20, 11), (1e6, 8)])
def test_a_batch_behind_others_takes_the_least_time_per_sample(launch_us: float, most: int):
    """Batches of 8 and 16: 24 and 48 us, and two launches each; a full one of 8 for up to `most`
    that wait.
    """
    every = whole_batches(BATCHES, SLICES)
    plans = TablePlans(table(parts(launch_us)), BATCHES, SLICES, whole=every)
    us = {size: 3 * size + 2 * launch_us for size in BATCHES}
    for waiting in range(1, 40):
        chosen = plans.batch(waiting)
        assert chosen == (8 if waiting <= most else 16)
        fastest = min(us[size] / min(size, waiting) for size in BATCHES)
        assert us[chosen] / min(chosen, waiting) == pytest.approx(fastest, rel=1e-3)


def test_without_whole_batches_a_batch_behind_others_takes_all():
    assert TablePlans(table(parts()), BATCHES, SLICES).batch(1) == BATCHES[-1]
    cut = TablePlans(table(parts(cuts=(FINEST,))), BATCHES, SLICES, whole=WHOLE_BATCHES)
    assert cut.batch(1) == BATCHES[-1]
