"""The incremental batching, told by examples and then attacked with random events."""

import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import pipeline as pipeline_module
from scheduling import waiting as waiting_module
from scheduling.pipeline import (
    LATE_US,
    Action,
    Apply,
    Arrive,
    Cancel,
    Event,
    Expire,
    Launch,
    Pipeline,
    PipelineConfig,
    StepDone,
)
from scheduling.planner import SerialPlans
from scheduling.request import (
    WHOLE,
    Part,
    Request,
    Segment,
    Slice,
    SliceBucket,
    Step,
    whole_batches,
)
from scheduling.waiting import WaitingQueue

# A small engine: batches of 4 or 8 rows, slices of up to 4 samples and 40 ids, three segments.
SMALL = PipelineConfig(
    batch_buckets=(4, 8),
    slice_buckets=(SliceBucket(samples=2, ids=20), SliceBucket(samples=4, ids=40)),
    segments=3,
    max_steps_in_flight=20,
)

BATCHES_OF_32 = PipelineConfig(
    batch_buckets=(16, 32),
    slice_buckets=tuple(SliceBucket(samples=n, ids=20 * n) for n in (1, 16, 32)),
    segments=1,
)


def request(id: int, samples: int = 1, ids: Sequence[int] | None = None, **how: Any) -> Request:
    """A request of so many samples, each with one id or with as many as `ids` says."""
    counts = [1] * samples if ids is None else ids
    offsets = np.cumsum([0, *counts], dtype=np.int64)
    return Request(id=id, samples=len(counts), id_offsets=offsets, **how)


def arrive(id: int, samples: int = 1, ids: Sequence[int] | None = None, **how: Any) -> Arrive:
    return Arrive(request=request(id, samples, ids, **how))


def told(actions: list[Action]) -> list[str]:
    """Actions in short: `slice 1: r7[0:2] | segment 0.1` is samples 0 and 1 of request 7, gathered
    for batch 1, beside segment 1 of batch 0."""
    return [_told(action) for action in actions]


def _told(action: Action) -> str:
    if isinstance(action, Expire):
        return f"expire {action.request_id}"
    if isinstance(action, Apply):
        return "apply"
    parts = []
    if slice_ := action.step.slice:
        whose = ",".join(f"r{p.request_id}[{p.start}:{p.stop}]" for p in slice_.parts)
        parts.append(f"slice {slice_.batch_id}: {whose}")
    if segment := action.step.segment:
        parts.append(f"segment {segment.batch_id}.{segment.shape.index}")
    return " | ".join(parts)


def steps(actions: list[Action]) -> list[Step]:
    return [action.step for action in actions if isinstance(action, Launch)]


def with_whole(config: PipelineConfig) -> SerialPlans:
    """Plans with an executable for each batch that one slice of its size is all of."""
    return SerialPlans(
        count=config.segments,
        batch_buckets=config.batch_buckets,
        largest_slice=config.largest_slice,
        whole=whole_batches(config.batch_buckets, config.slice_buckets),
    )


# --- the story ------------------------------------------------------------------------------------


def test_an_arrival_on_an_idle_engine_is_answered_without_waiting():
    pipeline = Pipeline(SMALL)
    actions = pipeline.step(0, [arrive(7, samples=2)])
    assert told(actions) == ["slice 0: r7[0:2]", "segment 0.0", "segment 0.1", "segment 0.2"]
    answers = steps(actions)[-1].segment
    assert answers is not None and answers.shape.last
    assert answers.parts == ((0, Part(request_id=7, start=0, stop=2)),)


def test_an_arrival_during_the_top_mlp_rides_beside_a_segment():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=2))
    assert told(pipeline.step(0, [arrive(1)])) == ["slice 0: r1[0:1]", "segment 0.0"]
    actions = pipeline.step(5, [StepDone(step_id=0), arrive(2)])
    assert told(actions) == ["slice 1: r2[0:1] | segment 0.1"]
    # The next batch follows at once: its embeddings are on the stream already.
    actions = pipeline.step(9, [StepDone(step_id=1), StepDone(step_id=2)])
    assert told(actions) == ["segment 0.2", "segment 1.0"]


def test_a_large_request_is_split_over_batches_and_rejoined_in_order():
    actions = Pipeline(SMALL).step(0, [arrive(1, samples=11)])
    assert told(actions) == [
        "slice 0: r1[0:4]",
        "slice 0: r1[4:8]",
        "slice 1: r1[8:11] | segment 0.0",
        "segment 0.1",
        "segment 0.2",
        "segment 1.0",
        "segment 1.1",
        "segment 1.2",
    ]
    answers = [
        step.segment.parts for step in steps(actions) if step.segment and step.segment.shape.last
    ]
    assert answers == [
        ((0, Part(request_id=1, start=0, stop=4)), (4, Part(request_id=1, start=4, stop=8))),
        ((0, Part(request_id=1, start=8, stop=11)),),
    ]


def test_what_waits_for_an_idle_engine_is_gathered_before_the_segments_start():
    events = [arrive(id, samples=n) for id, n in enumerate((3, 2, 2, 2))]
    assert told(Pipeline(SMALL).step(0, events))[:3] == [
        "slice 0: r0[0:3],r1[0:1]",
        "slice 0: r1[1:2],r2[0:2],r3[0:1]",
        "slice 1: r3[1:2] | segment 0.0",
    ]


def test_a_trickle_of_arrivals_does_not_hold_a_batch_back():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    story = [told(pipeline.step(0, [arrive(0)]))]
    story += [told(pipeline.step(id, [StepDone(step_id=id - 1), arrive(id)])) for id in (1, 2)]
    assert story == [
        ["slice 0: r0[0:1]"],
        ["slice 1: r1[0:1] | segment 0.0"],
        ["slice 1: r2[0:1] | segment 0.1"],
    ]


def test_a_filled_batch_runs_at_once_however_much_waits_behind_it():
    pipeline = Pipeline(replace(SMALL, segments=1))
    actions = pipeline.step(0, [arrive(0, samples=16)])
    assert [(step.slice is not None, step.segment is not None) for step in steps(actions)] == [
        (True, False),
        (True, False),
        (True, True),
        (True, True),
        (False, True),
    ]


ONE_PIECE = replace(SMALL, segments=1)


def test_a_batch_that_one_slice_is_all_of_runs_in_one_executable():
    pipeline = Pipeline(ONE_PIECE, with_whole(ONE_PIECE))
    (step,) = steps(pipeline.step(0, [arrive(1, samples=3), arrive(2)]))
    assert step.co_run == WHOLE and step.slice and step.segment
    assert step.slice.batch_id == step.segment.batch_id == 0
    assert step.segment.parts == tuple(zip((0, 3), step.slice.parts, strict=True))
    # The smallest slice has room for two samples, and no batch has that size.
    assert told(pipeline.step(1, [arrive(3)])) == ["slice 1: r3[0:1]", "segment 1.0"]


def test_a_batch_of_two_slices_is_gathered_first():
    pipeline = Pipeline(ONE_PIECE, with_whole(ONE_PIECE))
    assert told(pipeline.step(0, [arrive(1, samples=6)])) == [
        "slice 0: r1[0:4]",
        "slice 0: r1[4:6]",
        "segment 0.0",
    ]


def test_slices_ride_where_whole_batches_are_only_while_more_waits_than_a_batch_takes():
    config = replace(SMALL, batch_buckets=(4,), max_steps_in_flight=3)
    pipeline = Pipeline(config, with_whole(config))
    (step,) = steps(pipeline.step(0, [arrive(1, samples=4)]))
    assert step.co_run == WHOLE
    assert told(pipeline.step(1, [arrive(2, samples=12)])) == [
        "slice 1: r2[0:4]",
        "slice 2: r2[4:8] | segment 1.0",
    ]
    launched: list[str] = []
    for id in range(7):
        launched += told(pipeline.step(2 + id, [StepDone(step_id=id)]))
    assert launched == [
        "segment 1.1",
        "segment 1.2",
        "slice 3: r2[8:12] | segment 2.0",
        *("segment 2.1", "segment 2.2"),
        *("segment 3.0", "segment 3.1"),
    ]
    late = [StepDone(step_id=7), arrive(3, samples=3)]
    assert told(pipeline.step(9, late)) == ["segment 3.2"]
    (step,) = steps(pipeline.step(10, [StepDone(step_id=8)]))
    assert step.co_run == WHOLE and step.slice and step.slice.samples == 3


def test_in_a_crowd_nothing_goes_beside_segments_where_that_is_not_worth_it():
    """Here a batch of 1 sample, for which there is no slice of its size, is two steps."""
    config = replace(ONE_PIECE, max_steps_in_flight=1)
    pipeline = Pipeline(config, with_whole(config))
    launched = told(pipeline.step(0, [arrive(1)]))
    launched += told(pipeline.step(1, [StepDone(step_id=0), arrive(2, samples=12)]))
    for id in range(1, 6):
        launched += told(pipeline.step(1 + id, [StepDone(step_id=id)]))
    assert launched == [
        *("slice 0: r1[0:1]", "segment 0.0"),
        *("slice 1: r2[0:4]", "slice 1: r2[4:8]", "segment 1.0"),
        "slice 2: r2[8:12] | segment 2.0",
    ]


@dataclass(frozen=True, kw_only=True)
class SmallBehind(SerialPlans):
    """A batch behind others has so many samples."""

    most: int

    def batch(self, waiting: int) -> int:
        return self.most


def with_small(config: PipelineConfig, most: int) -> SerialPlans:
    return SmallBehind(**vars(with_whole(config)), most=most)


def test_a_batch_behind_others_is_as_large_as_the_plans_say():
    """Not one that the device waits for, nor one of a crowd."""
    config = replace(BATCHES_OF_32, max_steps_in_flight=2)
    pipeline = Pipeline(config, with_small(config, 16))
    small = [arrive(id, samples=1) for id in range(100)]
    found = steps(pipeline.step(0, small[:30]))
    found += steps(pipeline.step(1, small[30:60]))
    found += steps(pipeline.step(2, [StepDone(step_id=0)]))
    found += steps(pipeline.step(3, [StepDone(step_id=1), *small[60:]]))
    assert [step.slice.samples for step in found if step.slice] == [30, 16, 14, 32]
    assert {step.co_run for step in found} == {WHOLE}


@pytest.mark.parametrize(
    ("now_us", "samples", "is_launched"),
    [(LATE_US, 15, False), (LATE_US, 16, True), (LATE_US - 1, 15, True)],
)
def test_a_host_that_is_late_launches_no_small_batch_behind_two_others(
    now_us, samples, is_launched
):
    """Of batches of 32: 16 samples or none, until a step has ended."""
    pipeline = _with_two_in_flight()
    found = steps(pipeline.step(now_us, [arrive(3, samples=samples)]))
    assert len(found) == is_launched and pipeline.can_launch != is_launched
    found += steps(pipeline.step(now_us + 1, [StepDone(step_id=0)]))
    assert [step.slice.samples for step in found if step.slice] == [samples]


def test_a_host_that_was_late_launches_at_once_when_it_is_not_any_more():
    pipeline = _with_two_in_flight()
    assert not pipeline.step(LATE_US, [arrive(3), arrive(4, arrived_us=LATE_US)])
    (step,) = steps(pipeline.step(LATE_US + 9, [arrive(5, arrived_us=LATE_US)]))
    assert step.slice and step.slice.samples == 3


def _with_two_in_flight() -> Pipeline:
    """Of three steps, each a whole batch."""
    pipeline = Pipeline(BATCHES_OF_32, with_whole(BATCHES_OF_32))
    found = [*steps(pipeline.step(0, [arrive(1, 16)])), *steps(pipeline.step(1, [arrive(2, 16)]))]
    assert [step.co_run for step in found] == [WHOLE, WHOLE]
    return pipeline


def test_a_late_host_goes_on_with_a_batch_of_several_steps():
    """Those of one batch can be all that may be in flight."""
    pipeline = Pipeline(BATCHES_OF_32)
    (*_, last) = steps(pipeline.step(0, [arrive(1)]))
    assert last.id == 1 and last.segment
    assert told(pipeline.step(LATE_US, [arrive(2)])) == ["slice 1: r2[0:1]"]


def test_a_sample_of_more_ids_than_the_plans_batch_has_room_for_gets_a_larger_one():
    config = replace(BATCHES_OF_32, max_steps_in_flight=2)
    pipeline = Pipeline(config, with_small(config, 16))
    found = steps(pipeline.step(0, [arrive(1, samples=16)]))
    found += steps(pipeline.step(1, [arrive(2, ids=[500]), arrive(3, ids=[100])]))
    assert [step.slice.ids for step in found if step.slice] == [16, 600]


def test_a_request_that_is_larger_than_the_plans_batch_is_not_cut_for_it():
    config = replace(BATCHES_OF_32, max_steps_in_flight=2)
    pipeline = Pipeline(config, with_small(config, 16))
    found = steps(pipeline.step(0, [arrive(1, samples=16)]))
    found += steps(pipeline.step(1, [arrive(2, samples=17), arrive(3, samples=3)]))
    assert [step.slice.samples for step in found if step.slice] == [16, 20]


def test_launches_run_ahead_by_no_more_than_the_steps_allowed():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=3))
    assert len(pipeline.step(0, [arrive(0)])) == pipeline.steps_in_flight == 3
    assert pipeline.step(1, [arrive(1)]) == []
    assert told(pipeline.step(2, [StepDone(step_id=0)])) == ["slice 1: r1[0:1] | segment 0.2"]


def test_an_idle_pipeline_does_nothing():
    pipeline = Pipeline(SMALL)
    assert pipeline.idle and pipeline.step(0) == [] and pipeline.next_deadline_us is None
    ended = [StepDone(step_id=step.id) for step in steps(pipeline.step(0, [arrive(0)]))]
    assert not pipeline.idle and pipeline.queued_samples == 0
    assert pipeline.step(1, ended) == [] and pipeline.idle


# --- order ----------------------------------------------------------------------------------------


def test_urgent_requests_go_first_and_equals_in_the_order_of_arrival():
    events = [arrive(1, priority=5), arrive(2), arrive(3, priority=5), arrive(4), arrive(5)]
    assert told(Pipeline(SMALL).step(0, events))[:2] == [
        "slice 0: r2[0:1],r4[0:1],r5[0:1],r1[0:1]",
        "slice 0: r3[0:1]",
    ]


def test_the_remainder_of_a_split_request_stays_first_in_its_priority():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    pipeline.step(0, [arrive(1, samples=6)])
    actions = pipeline.step(1, [StepDone(step_id=0), arrive(2), arrive(3, priority=-1)])
    assert told(actions) == ["slice 0: r3[0:1],r1[4:6],r2[0:1]"]


# --- buckets --------------------------------------------------------------------------------------


def test_a_slice_ends_before_the_sample_whose_ids_do_not_fit():
    events = [arrive(1, ids=[30, 10]), arrive(2, ids=[0, 1]), arrive(3, ids=[0])]
    assert told(Pipeline(SMALL).step(0, events))[:2] == [
        "slice 0: r1[0:2],r2[0:1]",  # 40 ids, and a sample of none
        "slice 0: r2[1:2],r3[0:1]",
    ]


@pytest.mark.parametrize(
    ("before", "samples", "ids", "first"),
    [
        (31, 2, [1, 1], [(0, 31)]),
        (31, 3, [1, 1, 1], [(0, 31), (0, 1)]),
        (31, 2, [20, 21], [(0, 31), (0, 1)]),
        (32, 2, [1, 1], [(0, 32)]),
        (30, 2, [1, 1], [(0, 30), (0, 2)]),
        (31, 16, [1] * 16, [(0, 31), (0, 1)]),
        (31, 17, [1] * 17, [(0, 31)]),
        (31, 3, [1, 1, 320], [(0, 31)]),
        (31, 32, [20] * 32, [(0, 31)]),
        (31, 33, [1] * 33, [(0, 31), (0, 1)]),
        (31, 3, [1, 320, 320], [(0, 31), (0, 1)]),
    ],
    ids=[
        *("small", "more samples", "more ids", "full", "fits"),
        *("half", "most samples", "most ids", "all", "more samples than all", "more ids than all"),
    ],
)
def test_a_request_that_takes_little_of_a_slice_or_most_is_not_cut(before, samples, ids, first):
    room, queue = SliceBucket(samples=32, ids=640), WaitingQueue()
    queue.push(request(1, before))
    queue.push(request(2, samples, ids))
    parts, _ = queue.take(room)
    assert [(part.start, part.stop) for part in parts] == first
    left = sum(part.samples for part in queue.take(room)[0])
    assert left == before + samples - sum(stop - start for start, stop in first)
    assert queue.samples == 0 and not queue.has_begun


def test_a_small_request_that_finds_nothing_else_is_cut():
    """In what a batch has left, which is too little for it."""
    queue = WaitingQueue()
    queue.push(request(1, 2))
    assert [part.samples for part in queue.take(SliceBucket(samples=1, ids=99))[0]] == [1]


@pytest.mark.parametrize(
    ("before", "samples", "batches"),
    [
        ([31], [2], [31, 2]),
        ([31], [3], [32, 2]),
        ([30], [2], [32]),
        ([31], [1, 2], [32, 2]),
        ([31, 2], [2], [31, 4]),
    ],
    ids=["small", "large", "fits", "fits first", "the next batch"],
)
def test_a_batch_leaves_a_little_room_rather_than_cut_a_small_request(before, samples, batches):
    """Which would wait for two batches, and cost a slice of its own."""
    pipeline = Pipeline(BATCHES_OF_32, with_whole(BATCHES_OF_32))
    sizes, launched = before + samples, []
    waiting = [arrive(id, samples=size) for id, size in enumerate(sizes)]
    while waiting or not pipeline.idle:
        found = steps(pipeline.step(0, waiting))
        launched += found
        waiting = [StepDone(step_id=step.id) for step in found]
    assert [step.segment.samples for step in launched if step.segment] == batches
    assert [step.co_run for step in launched if step.slice] == [WHOLE] * len(batches)


def test_a_small_request_beside_a_segment_is_not_cut_for_the_rest_of_a_batch():
    pipeline = Pipeline(replace(BATCHES_OF_32, max_steps_in_flight=2, segments=3))
    pipeline.step(0, [arrive(1, samples=16)])
    done = StepDone(step_id=0)
    assert told(pipeline.step(1, [done, arrive(2, samples=31), arrive(3, samples=2)])) == [
        "slice 1: r2[0:31] | segment 0.1"
    ]
    assert told(pipeline.step(2, [StepDone(step_id=1)])) == ["segment 0.2"]


@pytest.mark.parametrize(
    ("ids", "bucket_samples"), [([1], 2), ([1, 1], 2), ([21], 4), ([1, 1, 1], 4)]
)
def test_a_slice_takes_the_smallest_bucket_that_holds_its_samples_and_ids(ids, bucket_samples):
    first = steps(Pipeline(SMALL).step(0, [arrive(1, ids=ids)]))[0].slice
    assert first is not None and first.bucket.samples == bucket_samples


def test_the_padding_of_a_slice_stays_inside_the_batch():
    config = replace(SMALL, batch_buckets=(7,))
    actions = Pipeline(config).step(0, [arrive(1, samples=9)])
    gathered = [step.slice for step in steps(actions) if step.slice]
    assert [(s.batch_id, s.row, s.samples, s.bucket.samples) for s in gathered] == [
        (0, 0, 4, 4),
        (0, 4, 2, 2),
        (1, 0, 3, 4),  # row 6 is left: not even the smallest slice fits there, padded
    ]


def test_a_batch_is_closed_by_a_sample_that_fits_only_a_larger_slice_than_is_left_room_for():
    config = replace(SMALL, batch_buckets=(6,))
    actions = Pipeline(config).step(0, [arrive(1, ids=[1, 1, 1, 1, 30, 1])])
    assert told(actions)[:2] == ["slice 0: r1[0:4]", "slice 1: r1[4:6] | segment 0.0"]


def test_segments_take_the_smallest_batch_bucket():
    for samples, bucket in [(1, 4), (4, 4), (5, 8)]:
        last = steps(Pipeline(SMALL).step(0, [arrive(1, samples=samples)]))[-1].segment
        assert last is not None and (last.samples, last.shape.batch) == (samples, bucket)


# --- cancellation and deadlines -------------------------------------------------------------------


def test_cancelling_drops_what_waits_and_lets_run_what_was_launched():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    pipeline.step(0, [arrive(1, samples=6), arrive(2, samples=3)])
    pipeline.step(1, [Cancel(request_id=2), Cancel(request_id=1)])
    assert pipeline.queued_samples == 0
    story = [steps(pipeline.step(2 + id, [StepDone(step_id=id)]))[0] for id in range(3)]
    assert [step.slice for step in story] == [None] * 3
    assert story[-1].segment and story[-1].segment.parts == (
        (0, Part(request_id=1, start=0, stop=4)),
    )


def test_cancelling_the_unknown_and_the_finished_is_ignored():
    pipeline = Pipeline(SMALL)
    ended = [StepDone(step_id=step.id) for step in steps(pipeline.step(0, [arrive(1)]))]
    assert pipeline.step(1, [*ended, Cancel(request_id=1), Cancel(request_id=99)]) == []
    assert pipeline.idle


def test_a_request_expires_at_its_deadline_if_none_of_it_was_launched():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    late = [arrive(2, deadline_us=30), arrive(3, deadline_us=20), arrive(4)]
    pipeline.step(0, [arrive(1, samples=6, deadline_us=10), *late])
    assert pipeline.next_deadline_us == 20  # request 1 has begun: it goes on, however late
    assert told(pipeline.step(19)) == []
    assert told(pipeline.step(20)) == ["expire 3"]
    assert told(pipeline.step(40)) == ["expire 2"]
    assert pipeline.next_deadline_us is None
    assert told(pipeline.step(41, [StepDone(step_id=0)])) == ["slice 0: r1[4:6],r4[0:1]"]


def test_a_request_that_arrives_too_late_costs_nothing():
    pipeline = Pipeline(SMALL)
    assert told(pipeline.step(10, [arrive(1, deadline_us=10)])) == ["expire 1"]
    assert pipeline.idle


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([arrive(2, ids=[1, 41, 40])], "request 2: sample 1 has 41 ids.*holds, 40"),
        ([arrive(1)], "request 1: .* waiting already"),
        ([arrive(2), arrive(2)], "request 2: .* waiting already"),
        ([StepDone(step_id=1)], "step 1 cannot end now, 0 is next"),
        ([StepDone(step_id=0), StepDone(step_id=0)], "step 0 cannot end now, 1 is next"),
        ([StepDone(step_id=0), StepDone(step_id=1)], "step 1 cannot end now, 1 is next"),
    ],
)
def test_a_bad_event_is_refused_and_nothing_has_happened(events, message):
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    pipeline.step(0, [arrive(0), arrive(1, samples=4)])
    before = (pipeline.queued_samples, pipeline.steps_in_flight)
    with pytest.raises(ValueError, match=message):
        pipeline.step(1, [arrive(8), Cancel(request_id=1), *events])
    assert (pipeline.queued_samples, pipeline.steps_in_flight) == before


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (np.array([0]), "request 3: samples is 0"),
        (np.array([0, 1], np.int32), "request 3: id_offsets is int32"),
        (np.array([[0, 1]]), r"request 3: id_offsets is int64\[1, 2\], not int64\[2\]"),
        (np.array([1, 2]), "request 3: id_offsets starts at 1"),
        (np.array([0, 2, 1, 4]), "request 3: id_offsets falls at sample 1"),
    ],
)
def test_a_request_that_is_none_is_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        Request(id=3, samples=offsets.shape[-1] - 1, id_offsets=offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": 0}, "segments is 0"),
        ({"max_steps_in_flight": 0}, "max_steps_in_flight is 0"),
        ({"batch_buckets": ()}, "batch_buckets starts at"),
        ({"batch_buckets": (0, 8)}, "batch_buckets starts at"),
        ({"batch_buckets": (8, 8)}, "batch_buckets does not ascend"),
        ({"slice_buckets": ()}, "slice_buckets starts at"),
        ({"slice_buckets": SMALL.slice_buckets[::-1]}, "slice_buckets does not ascend"),
        ({"batch_buckets": (2, 3)}, "a slice of 4 samples does not fit the largest batch, 3"),
    ],
)
def test_sizes_that_make_no_pipeline_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


# --- cost -----------------------------------------------------------------------------------------


def _fastest_arrival_us(waiting: int) -> float:
    """One step() with one arrival, one end and one launch, with so many requests waiting."""
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    pipeline.step(0, [arrive(id, deadline_us=10**6) for id in range(waiting)])
    arrivals = [arrive(waiting + k, deadline_us=10**6) for k in range(200)]
    times_us = []
    for k, arrival in enumerate(arrivals):
        started = time.perf_counter()
        pipeline.step(1, [arrival, StepDone(step_id=k)])
        times_us.append(1e6 * (time.perf_counter() - started))
    return float(np.median(times_us))


def test_smaller_batches_take_no_larger_slices():
    sizes = SMALL.of_batches((3,))
    assert (sizes.batch_buckets, sizes.slice_buckets) == ((3,), SMALL.slice_buckets[:1])
    assert SMALL.of_batches(SMALL.batch_buckets) == SMALL


def test_a_step_costs_the_same_however_many_requests_wait():
    few, many = _fastest_arrival_us(waiting=1000), _fastest_arrival_us(waiting=50_000)
    assert many < 4 * few  # fifty times, if anything ran over all that wait


def test_requests_that_are_gone_are_let_go():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    pipeline.step(0, [arrive(-1, samples=100, priority=-1)])
    offsets = []
    for id in range(1000):
        gone = request(id, deadline_us=10**6)
        offsets.append(weakref.ref(gone.id_offsets))
        pipeline.step(1, [Arrive(request=gone)])
        pipeline.step(1, [Cancel(request_id=id)])
    assert sum(ref() is not None for ref in offsets) < 100


# --- anything may happen --------------------------------------------------------------------------


class Device:
    """Runs steps in order, as a GPU stream would, on rows that are (request, sample) pairs.

    Two buffers, used in turn. A slice writes its rows and its padding; the first segment reads the
    batch's rows, and the last finds the same ones there.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.stream: deque[Step] = deque()
        self.buffers = np.full((2, config.largest_batch, 2), -1)
        self.read = np.empty(0)
        self.answers: list[tuple[int, int]] = []

    def finish_step(self) -> StepDone:
        step = self.stream.popleft()
        if step.slice:
            self._gather(step.slice)
        if step.segment:
            self._compute(step.segment)
        return StepDone(step_id=step.id)

    def _gather(self, slice_: Slice) -> None:
        rows = [(p.request_id, sample) for p in slice_.parts for sample in range(p.start, p.stop)]
        padded = np.full((slice_.bucket.samples, 2), -1)
        padded[: len(rows)] = rows
        buffer = self.buffers[slice_.batch_id % 2]
        assert slice_.row + len(padded) <= len(buffer), "padded rows overrun the buffer"
        buffer[slice_.row : slice_.row + len(padded)] = padded

    def _compute(self, segment: Segment) -> None:
        assert segment.samples <= segment.shape.batch <= self.config.largest_batch
        rows = self.buffers[segment.batch_id % 2][: segment.samples].copy()
        assert (rows >= 0).all(), "a segment ran before its slices, or on padding"
        self.read = rows if segment.shape.index == 0 else self.read
        assert np.array_equal(self.read, rows), "another batch's rows were written over these"
        for row, part in segment.parts:
            self.answers += [(r, s) for r, s in rows[row : row + part.samples].tolist()]
            assert self.answers[-part.samples :] == [
                (part.request_id, sample) for sample in range(part.start, part.stop)
            ], "answers of other samples"


@dataclass
class Asked:
    """What a naive model remembers of a request."""

    request: Request
    launched: int = 0
    end: str | None = None

    @property
    def waits(self) -> bool:
        return self.end is None and self.launched < self.request.samples

    def ids(self, start: int, stop: int) -> int:
        return int(self.request.id_offsets[stop] - self.request.id_offsets[start])


@dataclass
class Gathered:
    """What a naive model remembers of a batch. cut: how many segments it has."""

    cut: int
    rows: int = 0
    parts: list[tuple[int, Part]] = field(default_factory=list)
    segments: int = 0
    waiting_at_first: int = 0


class Audit:
    """Feeds a pipeline and a device, and holds every step against the naive model."""

    def __init__(self, config: PipelineConfig, plans: SerialPlans | None = None) -> None:
        self.config = config
        self.pipeline = Pipeline(config, plans)
        self.has_whole = plans is not None and bool(plans.whole)
        self.rides = plans is None or plans.rides
        self.may_be_small = isinstance(plans, SmallBehind)
        self.is_late = False
        self.device = Device(config)
        self.asked: dict[int, Asked] = {}
        self.batches: list[Gathered] = [Gathered(config.segments)]
        self.steps = 0

    def step(self, now_us: int, moments: Sequence[Event | None]) -> None:
        """None stands for the end of the oldest step in flight, if there is one."""
        events = [self._happen(m) for m in moments if m is not None or self.device.stream]
        arrived = [event.request.arrived_us for event in events if isinstance(event, Arrive)]
        self.is_late = any(now_us - at_us >= pipeline_module.LATE_US for at_us in arrived)
        actions = self.pipeline.step(now_us, events)
        expired = [action.request_id for action in actions if isinstance(action, Expire)]
        assert sorted(expired) == self._expire(now_us)
        for step in steps(actions):
            self._launch(step)
        self._check_state()

    def drain(self, now_us: int) -> None:
        """End all that is in flight until nothing is: no new event is needed for progress."""
        while not self.pipeline.idle:
            assert self.device.stream, "work is left, and nothing in flight that could end"
            self.step(now_us, [None])
        answers = by_request(self.device.answers)
        for id, asked in self.asked.items():
            assert answers.pop(id, []) == list(range(asked.launched)), "lost, twice or disordered"
            assert asked.end is not None or asked.launched == asked.request.samples
            assert asked.end != "expired" or asked.launched == 0
        assert not answers

    def waiting(self) -> list[Asked]:
        """In the order in which they are to run; dicts keep the order of arrival."""
        waiting = [asked for asked in self.asked.values() if asked.waits]
        return sorted(waiting, key=lambda asked: asked.request.priority)

    def queued_samples(self) -> int:
        return sum(asked.request.samples - asked.launched for asked in self.waiting())

    def _happen(self, moment: Event | None) -> Event:
        if moment is None:
            return self.device.finish_step()
        if isinstance(moment, Arrive):
            self.asked[moment.request.id] = Asked(moment.request)
        elif isinstance(moment, Cancel):
            asked = self.asked.get(moment.request_id)
            if asked and asked.waits:
                asked.end = "cancelled"
        return moment

    def _expire(self, now_us: int) -> list[int]:
        late = [a for a in self.waiting() if not a.launched and _deadline_us(a) <= now_us]
        for asked in late:
            asked.end = "expired"
        return sorted(asked.request.id for asked in late)

    def _launch(self, step: Step) -> None:
        assert step.id == self.steps and (step.slice or step.segment)
        self.steps += 1
        self.device.stream.append(step)
        assert len(self.device.stream) <= self.config.max_steps_in_flight
        if step.co_run == WHOLE:
            return self._check_whole(step)
        if step.segment:
            self._check_segment(step.segment)
        self._check_slice(step.slice, beside=step.segment)

    def _check_whole(self, step: Step) -> None:
        """One slice and one segment are the batch, of the same size."""
        assert step.slice and step.segment and step.segment.shape.segments == 1
        assert step.slice.row == 0 and step.slice.batch_id == step.segment.batch_id
        assert step.slice.bucket.samples == step.segment.shape.batch
        self.batches[-1].cut = 1
        self._check_slice(step.slice, beside=None)
        self._check_segment(step.segment)

    def _check_segment(self, segment: Segment) -> None:
        batch = self.batches[segment.batch_id]
        before = self.batches[: segment.batch_id]
        assert batch.rows and all(b.segments == b.cut for b in before)
        assert segment.shape.index == batch.segments and segment.samples == batch.rows
        assert segment.shape.batch == min(b for b in self.config.batch_buckets if b >= batch.rows)
        batch.segments += 1
        assert segment.shape.last == (batch.segments == batch.cut)
        assert segment.parts == (tuple(batch.parts) if segment.shape.last else ())
        if segment.shape.index == 0:
            gathered_all = batch.rows >= batch.waiting_at_first
            assert gathered_all or self._takes_as_much_as_fits(batch.rows, 0, 0)
            self.batches.append(Gathered(self.config.segments))

    def _check_slice(self, slice_: Slice | None, beside: Segment | None) -> None:
        batch = self.batches[-1]
        if slice_ is None:
            is_crowd = self.queued_samples() >= self.config.largest_batch
            waits_for_a_whole = self.has_whole and not (self.rides and is_crowd)
            assert waits_for_a_whole or self._takes_as_much_as_fits(batch.rows, 0, 0)
            return
        assert slice_.batch_id == len(self.batches) - 1 and batch.segments == 0
        assert beside is None or beside.batch_id == slice_.batch_id - 1
        if beside is None:
            self._check_unaccompanied(batch)
        assert slice_.row == batch.rows
        for part in slice_.parts:
            self._check_part(part)
            batch.parts.append((batch.rows, part))
            batch.rows += part.samples
        self._check_bucket(slice_)

    def _check_unaccompanied(self, batch: Gathered) -> None:
        """Only what waits when an idle engine wakes may hold back the segments of its batch."""
        if batch.rows == 0:
            batch.waiting_at_first = self.queued_samples()
        assert batch.rows < batch.waiting_at_first

    def _check_part(self, part: Part) -> None:
        first = self.waiting()[0]
        assert part.request_id == first.request.id, "not by priority, then by arrival"
        assert part.start == first.launched < part.stop <= first.request.samples
        first.launched = part.stop

    def _check_bucket(self, slice_: Slice) -> None:
        ids = sum(self.asked[p.request_id].ids(p.start, p.stop) for p in slice_.parts)
        samples = sum(part.samples for part in slice_.parts)
        assert (slice_.samples, slice_.ids) == (samples, ids)
        fitting = [b for b in self.config.slice_buckets if b.samples >= samples and b.ids >= ids]
        assert slice_.bucket == fitting[0]
        assert self._takes_as_much_as_fits(slice_.row, samples, ids)

    def _takes_as_much_as_fits(self, row: int, samples: int, ids: int) -> bool:
        """Whether no bucket that fits the batch at this row has room for one more sample, or for
        all of a request that is not cut, unless it is as small as the plans say.
        """
        if self.may_be_small or not (waiting := self.waiting()):
            return True
        first, room = waiting[0], self.config.largest_batch - row
        stop = first.request.samples if self._is_most(first) else first.launched + 1
        samples += stop - first.launched
        ids += first.ids(first.launched, stop)
        buckets = [b for b in self.config.slice_buckets if b.samples <= room]
        return not any(b.samples >= samples and b.ids >= ids for b in buckets)

    def _is_most(self, asked: Asked) -> bool:
        """Of a slice by itself, which it fits."""
        request, slice_ = asked.request, self.config.largest_slice
        if asked.launched or request.samples > slice_.samples or request.ids > slice_.ids:
            return False
        return 2 * request.samples > slice_.samples or 2 * request.ids > slice_.ids

    def _check_state(self) -> None:
        pipeline, waiting = self.pipeline, self.waiting()
        deadlines = [_deadline_us(a) for a in waiting if not a.launched]
        begun = any(b.rows and b.segments < b.cut for b in self.batches)
        unfinished = begun or bool(waiting)
        assert pipeline.queued_samples == self.queued_samples()
        assert (pipeline.next_deadline_us or FOREVER_US) == min(deadlines, default=FOREVER_US)
        assert pipeline.steps_in_flight == len(self.device.stream)
        assert pipeline.idle == (not unfinished and not self.device.stream)
        credit = pipeline.steps_in_flight < self.config.max_steps_in_flight
        small = self.has_whole and 2 * self.queued_samples() < self.config.largest_batch
        ahead = pipeline.steps_in_flight >= max(self.config.max_steps_in_flight - 1, 1)
        waits_for_more = self.is_late and small and ahead and not begun
        assert waits_for_more or not (unfinished and credit), "a step could have been launched"


FOREVER_US = 10**9
MOST_IDS = 6


def _deadline_us(asked: Asked) -> int:
    deadline_us = asked.request.deadline_us
    return FOREVER_US if deadline_us is None else deadline_us


def by_request(answers: list[tuple[int, int]]) -> dict[int, list[int]]:
    samples: dict[int, list[int]] = {}
    for id, sample in answers:
        samples.setdefault(id, []).append(sample)
    return samples


@st.composite
def configs(draw: st.DrawFn) -> PipelineConfig:
    ladders = st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted)
    batches, samples = draw(ladders), draw(ladders)
    more = draw(st.lists(st.integers(1, 9), min_size=len(samples), max_size=len(samples)))
    ids = np.maximum(np.cumsum(more), [*[1] * (len(more) - 1), MOST_IDS]).tolist()
    return PipelineConfig(
        batch_buckets=tuple(sorted({*batches, max(batches[-1], samples[-1])})),
        slice_buckets=tuple(
            SliceBucket(samples=s, ids=i) for s, i in zip(samples, ids, strict=True)
        ),
        segments=draw(st.integers(1, 4)),
        max_steps_in_flight=draw(st.integers(1, 5)),
    )


ARRIVALS = st.builds(
    dict,
    ids=st.lists(st.integers(0, MOST_IDS), min_size=1, max_size=15),
    priority=st.integers(-1, 1),
    deadline_us=st.none() | st.integers(0, 30),
)
CANCELS = st.integers(0, 12).map(lambda id: Cancel(request_id=id))
MOMENTS = st.tuples(st.integers(0, 4), st.lists(ARRIVALS | CANCELS | st.none(), max_size=6))


@settings(max_examples=400, deadline=None)
@given(config=configs(), moments=st.lists(MOMENTS, max_size=12), data=st.data())
def test_every_request_is_answered_once_in_order_whatever_happens(config, moments, data):
    small = data.draw(st.sampled_from(config.batch_buckets))
    plans = data.draw(st.sampled_from([None, with_whole(config), with_small(config, small)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting_module, "SWEEP_AT_LEAST", 2)  # so that so few requests are swept
        patch.setattr(pipeline_module, "LATE_US", data.draw(st.sampled_from([4, LATE_US])))
        _attack(Audit(config, plans), moments)


def _attack(audit: Audit, moments: list[tuple[int, list[Any]]]) -> None:
    now_us, id = 0, 0
    for waited_us, drawn in moments:
        now_us += waited_us
        events: list[Event | None] = []
        for event in drawn:
            events.append(arrive(id, **event) if isinstance(event, dict) else event)
            id += isinstance(event, dict)
        audit.step(now_us, events)
    audit.drain(now_us)
