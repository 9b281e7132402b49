"""Serial batching: when a batch starts, what is in it, and that nothing overlaps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_device import FREE, FlatTimes, Watched, config, request
from scheduling import (
    Arrive,
    Cancel,
    Collecting,
    Expire,
    HostCosts,
    Launch,
    Request,
    SerialBatching,
    SimulatedRun,
    StepDone,
    simulate,
)

TIMES = FlatTimes(slice_us=10, segment_us=20)


def collecting(wait_us: int, max_samples: int | None = None, in_flight: int = 1) -> Collecting:
    return Collecting(wait_ms=wait_us / 1000, max_samples=max_samples, in_flight=in_flight)


def run(
    *requests: Request,
    wait_us: int = 50,
    max_samples: int | None = None,
    in_flight: int = 1,
    host: HostCosts = FREE,
) -> SimulatedRun:
    policy = SerialBatching(config(), collecting(wait_us, max_samples, in_flight))
    return simulate(policy, requests, times=TIMES, host=host)


def test_a_batch_starts_when_its_oldest_has_waited():
    done = run(request(0, 0), request(1, 30), request(2, 60))
    # One slice and two segments from 50 to 100; the third waits until 110, alone.
    assert done.answered_us.tolist() == [100, 100, 160]
    assert done.batch_samples.tolist() == [2, 1]


def test_a_full_batch_starts_at_once():
    done = run(request(0, 0), request(1, 3), request(2, 4), max_samples=2)
    assert done.answered_us.tolist() == [53, 53, 104]


def test_who_waited_while_a_batch_ran_starts_when_it_ends():
    done = run(request(0, 0), request(1, 51), request(2, 99), wait_us=40)
    # The first from 40 to 90; the second is due at 91, before the third comes.
    assert done.answered_us.tolist() == [90, 141, 191]


def test_a_batch_takes_whole_requests():
    done = run(request(0, samples=2), request(1, samples=2), request(2, samples=2), max_samples=5)
    assert done.batch_samples.tolist() == [4, 2]
    # Two are too few to be full: 50 after the arrival is when the first batch ends as well.
    assert done.answered_us.tolist() == [50, 50, 100]


def test_a_batch_of_any_requests_fits_the_buffer_with_the_padding_of_its_slices():
    done = run(*(request(id, samples=samples) for id, samples in enumerate((3, 1, 1, 1, 1, 1))))
    # 8 rows less what a slice of 2 may pad; 7 samples in slices of 4, 2 (one row) and 2.
    assert done.batch_samples.tolist() == [7, 1]


def test_a_request_larger_than_a_batch_runs_as_several():
    done = run(request(0, samples=11), wait_us=0)
    assert done.batch_samples.tolist() == [8, 3]


def test_a_request_expires_while_it_is_collected():
    policy = SerialBatching(config(), collecting(50))
    policy.step(0, [Arrive(request=request(0, 0, deadline_us=40)), Arrive(request=request(1, 0))])
    assert policy.next_deadline_us == 40
    assert policy.step(40) == [Expire(request_id=0)]
    assert policy.next_deadline_us == 50
    assert len(policy.step(50)) == 3 and not policy.idle


def test_a_request_expires_behind_a_batch_that_runs():
    policy = SerialBatching(config(), collecting(0))
    assert len(policy.step(0, [Arrive(request=request(0))])) == 3 and not policy.can_launch
    late = Arrive(request=request(1, 1, deadline_us=9))
    assert policy.step(1, [late, Arrive(request=request(2, 1))]) == []
    assert policy.next_deadline_us == 9
    assert policy.step(9) == [Expire(request_id=1)]
    assert policy.next_deadline_us is None


def test_a_second_batch_is_launched_behind_the_first():
    host = HostCosts(launch_us=0, sample_us=0, id_us=0, byte_us=0, answer_us=7)
    requests = [request(id, samples=2) for id in range(3)]
    one = run(*requests, wait_us=0, max_samples=2, host=host)
    assert one.answered_us.tolist() == [57, 114, 171]
    two = run(*requests, wait_us=0, max_samples=2, in_flight=2, host=host)
    # The device goes on at 50; that the first has ended is known at 57, the third starts at 100.
    assert two.answered_us.tolist() == [57, 107, 157]
    assert two.launched_us.tolist() == [0, 0, 57]


def test_a_batch_has_ended_with_its_last_step():
    policy = SerialBatching(config(), collecting(0, max_samples=1))
    events = [Arrive(request=request(0)), Arrive(request=request(1))]
    steps = [action.step.id for action in policy.step(0, events) if isinstance(action, Launch)]
    assert steps == [0, 1, 2]
    assert policy.step(1, [StepDone(step_id=0), StepDone(step_id=1)]) == []
    assert len(policy.step(2, [StepDone(step_id=2)])) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wait_ms": -1}, "wait_ms is -1"),
        ({"wait_ms": float("nan")}, "wait_ms is nan"),
        ({"wait_ms": 0, "max_samples": 0}, "max_samples is 0"),
        ({"wait_ms": 0, "in_flight": 1.5}, "in_flight is 1.5"),
    ],
)
def test_bad_collecting_is_named(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Collecting(**values)


def test_a_cancelled_request_is_forgotten():
    policy = SerialBatching(config(), collecting(50, 3))
    policy.step(0, [Arrive(request=request(0, samples=2))])
    policy.step(1, [Cancel(request_id=0)])
    assert policy.idle and policy.next_deadline_us is None
    assert policy.step(2, [Arrive(request=request(1, 2, samples=2))]) == []


@given(
    gaps=st.lists(st.integers(0, 90), min_size=1, max_size=30),
    samples=st.integers(1, 7),
    wait_us=st.integers(0, 100),
    in_flight=st.integers(1, 3),
)
def test_no_slice_is_beside_a_segment(gaps: list[int], samples: int, wait_us: int, in_flight: int):
    times_us = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    watched = Watched(SerialBatching(config(segments=3), collecting(wait_us, in_flight=in_flight)))
    requests = [request(id, time_us, samples) for id, time_us in enumerate(times_us)]
    done = simulate(watched, requests, times=TIMES, host=FREE)
    assert not any(step.slice and step.segment for step in watched.steps)
    embedded = [step.slice.batch_id for step in watched.steps if step.slice]
    assert embedded == sorted(embedded)
    assert done.batch_samples.max() <= 7
