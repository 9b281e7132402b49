"""The engine on a virtual clock: cases by hand, what holds for all cases, and queueing theory."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_device import FREE, FlatTimes, Watched, config, request
from scheduling import (
    Collecting,
    HostCosts,
    Pipeline,
    PipelineConfig,
    Policy,
    Request,
    SerialBatching,
    SimulatedRun,
    SliceBucket,
    host_costs,
    simulate,
    simulator,
)

TIMES = FlatTimes(slice_us=10, segment_us=20)


def run(
    *requests: Request, policy: Policy | None = None, host: HostCosts = FREE, **sizes: object
) -> SimulatedRun:
    policy = policy or Pipeline(config(**sizes))
    return simulate(policy, requests, times=TIMES, host=host)


def are_large(ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many ids on."""
    for module in (simulator, host_costs):
        monkeypatch.setattr(module, "LARGE_IDS", ids)


# --- by hand --------------------------------------------------------------------------------------


def test_a_request_alone_takes_a_slice_and_its_segments():
    alone = run(request(0, 100))
    assert alone.latencies_us.tolist() == [10 + 20 + 20]
    assert alone.waits_us.tolist() == [0]
    assert (alone.steps, alone.device_busy_us, alone.span_us) == (3, 50, 50)
    assert alone.device_busy_share == 1
    assert (alone.batch_samples.tolist(), alone.batch_buckets.tolist()) == ([1], [4])


def test_the_host_costs_come_on_top():
    host = HostCosts(
        launch_us=3,
        sample_us=1,
        id_us=0.5,
        byte_us=0.25,
        bytes_per_sample=2,
        bytes_per_id=1,
        answer_us=7,
    )
    alone = run(request(0, 100, samples=1, ids=2), host=host)
    # Launched at 100 + 3 + 1 + 1, copied in (2 x 2 + 20) / 4, then 10 + 20 + 20, then the answer.
    assert alone.waits_us.tolist() == [5]
    assert alone.latencies_us.tolist() == [5 + 6 + 50 + 7]
    assert alone.launcher_busy_us == 5 + 3 + 3
    assert alone.launcher_busy_share == 11 / 61


def test_requests_are_let_in_one_after_the_other():
    host = replace(FREE, submit_us=10, submit_sample_us=5)
    three = run(request(0, 0), request(1, 0, samples=2), request(2, 100), host=host, segments=1)
    # Known of at 15, 35 and 115; callers keep the interpreter until 35.
    assert three.launched_us.tolist() == [35, 35, 115]
    assert three.answered_us.tolist() == [65, 65, 145]


def test_callers_who_go_on_are_cut_short_after_the_switch_interval():
    host = replace(FREE, submit_us=150, switch_us=200)
    three = run(*[request(i, 0) for i in range(3)], host=host, segments=1)
    # The launcher asks for the interpreter at 150 and has it at 350; the third is known of at 450.
    assert three.launched_us.tolist() == [350, 350, 450]


def test_a_caller_that_sleeps_wakes_late():
    host = replace(FREE, wake_us=10, submit_us=30)
    three = run(request(0, 100), request(1, 120), request(2, 300), host=host, segments=1)
    # The second is due while the first is let in: nobody sleeps before it.
    assert three.launched_us.tolist() == [170, 170, 340]
    assert three.latencies_us.tolist() == [70 + 30, 50 + 30, 40 + 30]


def test_one_thread_answers():
    host = replace(FREE, answer_us=5, resolve_us=4)
    both = run(request(0, 0), request(1, 0), request(2, 1), host=host, segments=1)
    # Two are answered from 35 on, until 43; the third's step ends at 60.
    assert both.answered_us.tolist() == [43, 43, 69]
    slow = run(request(0, 0), request(1, 1), host=replace(FREE, resolve_us=50), segments=1)
    assert slow.answered_us.tolist() == [80, 130]


def test_each_step_costs_the_launcher_and_who_answers():
    host = replace(FREE, step_us=7, end_us=5, resolve_us=4)
    both = run(request(0, 100), request(1, 200), host=host, segments=1, max_steps_in_flight=1)
    # A slice from 107 to 117, known of at 122; a segment from 129 to 149, known of at 154.
    assert both.launched_us.tolist() == [107, 207]
    assert both.answered_us.tolist() == [158, 258]


def test_who_answers_and_the_launcher_share_the_interpreter():
    host = replace(FREE, request_us=40, resolve_us=100)
    both = run(request(0, 0), request(1, 75), host=host, segments=1)
    # The first is launched at 40 and answered from 70 to 170, the second let in and handled then.
    assert both.answered_us.tolist() == [170, 210 + 30 + 100]


def test_a_device_waits_for_a_slow_launcher():
    slow = run(request(0, 100), host=replace(FREE, launch_us=100))
    assert slow.latencies_us.tolist() == [3 * 100 + 20]
    assert slow.device_busy_us == 50 and slow.span_us == 320


def test_a_busy_launcher_leaves_twice_the_time_that_it_takes_to_the_callers():
    host = replace(FREE, sample_us=300)
    crowd = [request(i, 50 * i) for i in range(20)]
    policy = Pipeline(config(segments=1, batch_buckets=(16,), max_steps_in_flight=9))
    busy = run(*crowd, policy=policy, host=host)
    # The first is packed until 300; what has come by 900 is seen then, and a slice of 4 packed.
    assert (busy.launched_us[0], busy.launched_us[1]) == (300, 900 + 4 * 300)


def test_a_launcher_that_slept_before_goes_on_at_once():
    host = replace(FREE, request_us=250)
    both = run(request(0, 600), request(1, 610), host=host, segments=1)
    # The first is launched from 600, after a sleep of 600, to 850; the second is seen to wait since
    # 810, and is let in then.
    assert both.launched_us.tolist() == [850, 850 + 250]


def test_a_launcher_rests_no_longer_than_something_comes():
    host = replace(FREE, request_us=1000)
    both = run(request(0, 0), request(1, 30), host=host, segments=1)
    # The first is launched at 1000. The second has come, the end of the first is seen by 1100, and
    # nothing more by 1200.
    assert both.launched_us.tolist() == [1000, 1200 + 1000]


def test_a_launcher_does_not_rest_where_it_is_crowded():
    host = replace(FREE, sample_us=100)
    crowd = [request(i, 10 * i) for i in range(40)]
    policy = Pipeline(config(segments=1, batch_buckets=(4,), max_steps_in_flight=1))
    busy = run(*crowd, policy=policy, host=host)
    # The first is packed until 100, and its slice ends at 110; then 4 are packed, and end in 30 us.
    # As many wait again and more: the next are packed at once.
    assert busy.launched_us[:9].tolist() == [100, *[110 + 400] * 4, *[510 + 30 + 400] * 4]


def test_a_launcher_rests_while_a_request_is_let_in():
    host = replace(FREE, request_us=1000, submit_us=450)
    three = run(request(0, 0), request(1, 460), request(2, 1940), host=host, segments=1)
    # The first is launched from 450 to 1450, the second let in until 1900, when the launcher, which
    # looked at 1550 and 1750, has the interpreter again; the third until 2390, when it has looked
    # at 2000, 2200 and 2300 and looks; nothing more has come at 2490.
    assert three.launched_us.tolist() == [1450, *[2490 + 2 * 1000] * 2]


@pytest.mark.parametrize("arrived_us", [451, 600, 1249])
def test_callers_begin_with_no_request_while_the_launcher_launches(arrived_us: int):
    host = replace(FREE, request_us=1000, submit_us=450)
    both = run(request(0, 0), request(1, arrived_us), host=host, segments=1)
    # The first is launched from 450 to 1450, the second let in until 1900 and seen then, as the
    # launcher waits for the interpreter; nothing more has come at 2000.
    assert both.launched_us.tolist() == [1450, 2000 + 1000]


def test_a_large_request_is_let_in_while_the_launcher_launches(monkeypatch: pytest.MonkeyPatch):
    are_large(5, monkeypatch)
    host = replace(FREE, request_us=1000, submit_us=50, submit_sample_us=400)
    both = run(request(0, 0), request(1, 600, ids=5), host=host, segments=1)
    # The first is launched from 450 on; the second asks at 600, computes from 800 to 850, is copied
    # until 1250 and seen at 1500, when the first is launched.
    assert both.launched_us.tolist() == [1500, 1500 + 1000]


def test_a_launcher_does_not_rest_while_a_large_request_is_let_in(monkeypatch: pytest.MonkeyPatch):
    are_large(5, monkeypatch)
    host = replace(FREE, request_us=1000, submit_us=50, submit_sample_us=400)
    both = run(request(0, 0), request(1, 1440, ids=5), host=host, segments=1)
    # It computes from 1450, when the first is launched, to 1500, and is copied until 1900.
    assert both.launched_us.tolist() == [1450, 1900 + 1000]


def test_callers_begin_while_the_launcher_packs_what_is_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_costs, "LARGE_IDS", 5)
    host = replace(FREE, request_us=200, submit_us=50, id_us=100)
    three = run(request(0, 0, ids=5), request(1, 150), request(2, 560), host=host, segments=1)
    # The first is handled from 50 to 250 and packed until 750. The second, which would begin amid
    # the first, is let in from 250 to 300, the third from 560 to 610. Nothing is rested: 2 x 200 -
    # 550. Both are handled until 1150, and packed with the interpreter.
    assert three.launched_us.tolist() == [750, *[750 + 2 * 200 + 2 * 100] * 2]


def test_callers_begin_while_the_launcher_calls_executables():
    host = replace(FREE, launch_us=500, submit_us=450)
    both = run(request(0, 0), request(1, 600), host=host, segments=1)
    # The first is called from 450 to 950, and its segment from 1050, as the second is let in until
    # then. Nothing is rested.
    assert both.launched_us.tolist() == [1050, 1550 + 500]


def test_callers_wait_for_all_of_a_launch_where_it_is_crowded():
    host = replace(FREE, launch_us=100, submit_us=1)
    crowd = [*(request(i, 0) for i in range(40)), request(40, 390)]
    policy = Watched(Pipeline(config(segments=1, batch_buckets=(4,), max_steps_in_flight=1)))
    run(*crowd, policy=policy, host=host)
    # A segment and a slice are called from 380 to 580, and the last is let in then.
    assert policy.asked_us[2:4] == [380, 581]


def test_copies_go_one_after_the_other_while_the_launcher_goes_on():
    host = replace(FREE, byte_us=1, bytes_per_id=0, bytes_per_sample=100)
    both = run(request(0, samples=4), request(1, samples=4), host=host, segments=1)
    # 400 us a slice: at 400 and 800, then the segment of both.
    assert both.latencies_us.tolist() == [800 + 10 + 20] * 2
    assert both.waits_us.tolist() == [0, 0]


def test_no_more_steps_are_launched_than_may_be_in_flight():
    one_at_a_time = run(request(0), host=replace(FREE, answer_us=7), max_steps_in_flight=1)
    assert one_at_a_time.latencies_us.tolist() == [17 + 27 + 27]


def test_a_later_request_rides_beside_the_segments_of_an_earlier_one():
    both = run(request(0, 0), request(1, 5), max_steps_in_flight=1)
    # Slice 0 to 10, both to 40, segment to 60; the second's segments to 100.
    assert both.answered_us.tolist() == [60, 100]
    assert both.waits_us.tolist() == [0, 5]
    assert both.batch_samples.tolist() == [1, 1]


def test_what_comes_while_the_launcher_is_busy_is_seen_when_it_is_done():
    host = replace(FREE, request_us=100)
    late = run(request(0, 0), request(1, 60), host=host, segments=1, max_steps_in_flight=9)
    # The first is launched at 100. The second is let in then, and launched before there is an
    # interpreter for the first's answer.
    assert late.launched_us.tolist() == [100, 200]
    assert late.answered_us.tolist() == [200, 230]


@pytest.mark.parametrize(
    ("deadline_us", "launched", "answered"),
    [(10, False, False), (11, True, False), (99, True, False), (100, True, True)],
)
def test_a_deadline_is_missed_before_the_launch_or_by_the_answer(
    deadline_us: int, launched: bool, answered: bool
):
    requests = (request(0, 0), request(1, 5, deadline_us=deadline_us))
    both = run(*requests, max_steps_in_flight=1)
    # The second would be launched at 10 and answered at 100.
    assert np.isfinite(both.launched_us).tolist() == [True, launched]
    assert np.isfinite(both.latencies_us).tolist() == [True, answered]
    assert both.steps == (5 if launched else 3)


@pytest.mark.parametrize(("deadline_us", "answered"), [(229, False), (230, True)])
def test_a_split_request_counts_from_its_first_launch_to_its_last_answer(
    deadline_us: int, answered: bool
):
    asked = request(0, 100, samples=11, deadline_us=deadline_us)
    split = run(asked, host=replace(FREE, launch_us=10))
    # Slices to 120 and 130, a third beside the first of four segments from 140 to 170, 60 more.
    assert split.batch_samples.tolist() == [8, 3]
    assert split.waits_us.tolist() == [10]
    assert np.isfinite(split.latencies_us).tolist() == [answered]


def test_a_deadline_wakes_the_launcher():
    policy = Watched(Pipeline(config(max_steps_in_flight=1)))
    requests = (request(0, 0), request(1, 5, deadline_us=8))
    simulate(policy, requests, times=TIMES, host=FREE)
    assert policy.asked_us[:4] == [0, 5, 8, 10]


def test_bad_arrivals_are_refused():
    with pytest.raises(ValueError, match="request 1 arrives twice"):
        run(request(1, 0), request(1, 1))
    with pytest.raises(ValueError, match="request 2 arrives before request 1"):
        run(request(1, 5), request(2, 4))


def test_nothing_arrives():
    empty = run()
    assert (empty.steps, empty.span_us, empty.device_busy_share) == (0, 0, 0)


# --- always ---------------------------------------------------------------------------------------

ARRIVALS = st.lists(
    st.tuples(st.integers(0, 120), st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=25
)
COSTS = st.builds(
    HostCosts,
    launch_us=st.integers(0, 30),
    sample_us=st.integers(0, 3),
    id_us=st.integers(0, 1),
    byte_us=st.integers(0, 1),
    bytes_per_sample=st.integers(0, 3),
    bytes_per_id=st.integers(0, 2),
    answer_us=st.integers(0, 40),
)
CONFIGS = st.builds(config, segments=st.integers(1, 4), max_steps_in_flight=st.integers(1, 4))
PER_ROW = FlatTimes(slice_us=5, segment_us=10, per_row_us=2)


def policies(sizes: PipelineConfig) -> list[Policy]:
    return [Pipeline(sizes), SerialBatching(sizes, Collecting(wait_ms=0.07))]


def drawn(arrivals: list[tuple[int, int, int]]) -> list[Request]:
    times_us = np.cumsum([gap for gap, _, _ in arrivals]).tolist()
    return [
        request(id, time_us, samples, ids)
        for id, (time_us, (_, samples, ids)) in enumerate(zip(times_us, arrivals, strict=True))
    ]


@given(arrivals=ARRIVALS, host=COSTS, sizes=CONFIGS)
def test_each_request_is_answered_once_after_its_launch(arrivals, host, sizes):
    requests = drawn(arrivals)
    for policy in policies(sizes):
        watched = Watched(policy)
        done = simulate(watched, requests, times=PER_ROW, host=host)
        answered = Counter(
            (part.request_id, sample)
            for step in watched.steps
            if step.segment
            for _, part in step.segment.parts
            for sample in range(part.start, part.stop)
        )
        assert answered == Counter((r.id, sample) for r in requests for sample in range(r.samples))
        assert (done.arrived_us <= done.launched_us).all()
        assert (done.launched_us + 5 + 10 + host.answer_us <= done.answered_us).all()
        assert (np.diff(done.answered_us) >= 0).all()
        assert done.batch_samples.sum() == done.samples.sum()
        assert done.steps == len(watched.steps)


@given(arrivals=ARRIVALS, sizes=CONFIGS)
def test_no_request_is_faster_than_alone(arrivals, sizes):
    requests = drawn(arrivals)
    for policy in policies(sizes):
        together = simulate(policy, requests, times=PER_ROW, host=FREE)
        alone = [
            simulate(Pipeline(sizes), [one], times=PER_ROW, host=FREE).latencies_us[0]
            for one in requests
        ]
        assert (together.latencies_us >= alone).all()


@given(arrivals=ARRIVALS, host=COSTS, sizes=CONFIGS)
def test_the_device_works_whenever_there_is_work(arrivals, host, sizes):
    """With a free host it is busy exactly while a request is unanswered; else never longer."""
    requests = drawn(arrivals)
    done = simulate(Pipeline(sizes), requests, times=PER_ROW, host=FREE)
    assert done.device_busy_us == sum(stop - start for start, stop in spans(done))
    costly = simulate(Pipeline(sizes), requests, times=PER_ROW, host=host)
    assert costly.device_busy_us <= sum(stop - start for start, stop in spans(costly))


def spans(done: SimulatedRun) -> Iterator[tuple[float, float]]:
    """The times in which at least one request was open."""
    until = -1.0
    for arrived, answered in zip(done.arrived_us, done.answered_us, strict=True):
        if answered > until:
            yield max(arrived, until), answered
            until = answered


@given(arrivals=ARRIVALS, host=COSTS, sizes=CONFIGS)
@settings(max_examples=20)
def test_the_same_arrivals_take_the_same_times(arrivals, host, sizes):
    for one, other in zip(policies(sizes), policies(sizes), strict=True):
        first = simulate(one, drawn(arrivals), times=PER_ROW, host=host)
        second = simulate(other, iter(drawn(arrivals)), times=PER_ROW, host=host)
        for field in fields(SimulatedRun):
            values = getattr(first, field.name), getattr(second, field.name)
            np.testing.assert_array_equal(*values)


# --- theory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "segments"), [(0.5, 1), (0.8, 1), (0.8, 4)])
def test_single_samples_wait_as_in_an_m_d_1_queue(load: float, segments: int):
    """Poisson arrivals, a constant service time D: the mean wait is D load / (2 (1 - load))."""
    service_us = 1000
    sizes = config(
        batch_buckets=(1,), slice_buckets=(SliceBucket(samples=1, ids=1),), segments=segments
    )
    gaps = np.random.default_rng(7).exponential(service_us / load, 40_000)
    arrivals = (request(id, int(t)) for id, t in enumerate(np.cumsum(gaps)))
    times = FlatTimes(slice_us=0, segment_us=service_us / segments)
    done = simulate(Pipeline(sizes), arrivals, times=times, host=FREE)
    expected_us = service_us * load / (2 * (1 - load))
    assert done.latencies_us.mean() - service_us == pytest.approx(expected_us, rel=0.04)
    assert done.device_busy_share == pytest.approx(load, rel=0.01)
