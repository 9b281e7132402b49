"""Who gets which answer, and when: an engine on a device whose arithmetic is done by hand."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from threading import Event as Signal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_segments import OPTIONS, DeviceBroke, FakeSegments, samples, scores
from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.engine import free_copies, launcher, messages, staging
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    QueueFull,
    StepFailed,
)
from recflow_jax.engine.launcher import BEFORE_HELD
from recflow_jax.engine.ledger import Ledger
from recflow_jax.engine.messages import Inbox, Submitted
from recflow_jax.engine.prepared import Prepared, Preparer
from recflow_jax.engine.staging import Buffer, Staging
from scheduling.pipeline import Action, Cancel, Event, Pipeline
from scheduling.request import WHOLE
from scheduling.serial_batching import Collecting

SOON_S = 30


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def engine(device: FakeSegments) -> Iterator[Engine]:
    with Engine.from_segments(device) as engine:
        yield engine
        device.go_on()


def result(answer: Answer) -> list[list[float]]:
    return answer.result(timeout=SOON_S).tolist()


def eventually(condition) -> None:
    """Waits for another thread; fails after a while."""
    limit = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.001)


def fill_the_device(engine: Engine, device: FakeSegments) -> Answer:
    """A request that is launched and held, as far ahead as steps may be in flight."""
    device.hold()
    answer = engine.submit(samples(*range(16)))
    eventually(lambda: engine.stats().steps == OPTIONS.max_steps_in_flight)
    return answer


# --- answers


def test_a_request_gets_its_scores(engine: Engine):
    answer = engine.submit(samples(1, 2, 3))
    assert result(answer) == scores(1, 2, 3)
    assert answer.result().dtype == np.float32


def test_answers_belong_to_the_caller(engine: Engine):
    found = engine.predict(samples(1))
    found[:] = 0
    assert engine.predict(samples(1)).tolist() == scores(1)


@given(
    requests=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=20),
    threads=st.integers(1, 4),
)
@settings(max_examples=25)
def test_everyone_gets_their_own_answers_in_their_own_order(requests, threads):
    """Requests of any size from several threads: larger than slices, batches, or empty."""
    options = replace(OPTIONS, max_queued_samples=1000)
    with Engine.from_segments(FakeSegments(options)) as engine:
        wrong: list[object] = []

        def client(offset: int) -> None:
            asked = [
                (range(1000 * offset + 30 * i, 1000 * offset + 30 * i + n), ids)
                for i, (n, ids) in enumerate(requests)
            ]
            answers = [engine.submit(samples(*values, ids=ids)) for values, ids in asked]
            for (values, ids), answer in zip(asked, answers, strict=True):
                if result(answer) != scores(*values, ids=ids):
                    wrong.append((values, ids))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(threads)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not wrong
        stats = engine.stats()
        asked = [n for n, _ in requests if n] * threads
        assert (stats.requests_answered, stats.samples_answered) == (len(asked), sum(asked))
        assert stats.queued_samples == 0


def test_requests_that_arrive_meanwhile_share_the_next_batch(engine: Engine, device: FakeSegments):
    first = engine.submit(samples(1))
    result(first)
    device.hold()
    engine.submit(samples(2))
    eventually(lambda: engine.stats().steps >= 5)
    later = [engine.submit(samples(value)) for value in (3, 4, 5)]
    device.go_on()
    assert [result(answer) for answer in later] == [scores(3), scores(4), scores(5)]
    assert len(device.batches_seen) < 5


def test_a_launcher_leaves_the_interpreter_to_the_callers_after_it_launched(
    monkeypatch: pytest.MonkeyPatch,
):
    """Each look at the clock takes 50 us here: one while it slept, several while it launched. Its
    calls take nothing.
    """
    rests_us: list[int] = []
    monkeypatch.setattr(Inbox, "rest", lambda _, us: rests_us.append(us))
    monkeypatch.setattr(messages, "now_us", lambda: 0)
    monkeypatch.setattr(launcher, "now_us", partial(next, count(0, 50)))
    with Engine.from_segments(FakeSegments()) as engine:
        result(engine.submit(samples(1)))
    launches = [us for us in rests_us if us > 0]
    assert launches
    assert all(us % 50 == 0 for us in rests_us)


def test_ids_that_are_copied_stay_where_they_are(
    engine: Engine, device: FakeSegments, monkeypatch: pytest.MonkeyPatch
):
    """Of all that have bags as expected and come meanwhile, even if others lie before them."""
    buffers: list[Buffer] = []
    pack = Staging.pack

    def watched(self: Staging, *slice_: Any, **options: Any) -> Buffer:
        buffers.append(pack(self, *slice_, **options))
        return buffers[-1]

    monkeypatch.setattr(Staging, "pack", watched)
    held = fill_the_device(engine, device)
    buffers.clear()
    answers = [engine.submit(samples(1, ids=2).frozen())]
    answers += [engine.submit(samples(value, ids=2)) for value in (2, 3, 4)]
    device.go_on()
    assert [result(answer) for answer in answers] == [scores(v, ids=2) for v in (1, 2, 3, 4)]
    result(held)
    assert any(buffer.berth is not None for buffer in buffers)


@pytest.mark.parametrize("segments", [2, None])
def test_callers_go_on_while_a_large_slice_is_packed(
    monkeypatch: pytest.MonkeyPatch, segments: int | None
):
    """And what the launcher is aside for counts as rest."""
    monkeypatch.setattr(staging, "LARGE_IDS", 3)
    packing, packed, join = Signal(), Signal(), free_copies.join

    def slowly(*joins: tuple[list[np.ndarray], np.ndarray]) -> None:
        packing.set()
        assert packed.wait(SOON_S)
        join(*joins)

    rests_us: list[int] = []
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    options = replace(OPTIONS, segments=segments, max_slice=8, smallest_slice=2)
    with Engine.from_segments(FakeSegments(options)) as engine:
        result(engine.submit(samples(1, 2, 3)))
        monkeypatch.setattr(Inbox, "rest", lambda _, us: rests_us.append(us))
        monkeypatch.setattr(free_copies, "join", slowly)
        large = engine.submit(samples(1, 2, 3))
        assert packing.wait(SOON_S)
        time.sleep(0.05)
        started_s = time.perf_counter()
        small = engine.submit(samples(4))
        took_s = time.perf_counter() - started_s
        packed.set()
        assert (result(large), result(small)) == (scores(1, 2, 3), scores(4))
    assert took_s < SOON_S / 2
    assert rests_us[0] < 0


@pytest.mark.parametrize("segments", [2, None])
def test_callers_go_on_while_an_executable_is_called(
    monkeypatch: pytest.MonkeyPatch, segments: int | None
):
    calling, called = Signal(), Signal()
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    options = replace(OPTIONS, segments=segments, max_slice=8, smallest_slice=2)

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*of: Any) -> Any:
            calling.set()
            assert called.wait(SOON_S)
            return call(*of)

        return slowly

    for name in ("embed", "run_whole"):
        monkeypatch.setattr(FakeSegments, name, slow(getattr(FakeSegments, name)))
    with Engine.from_segments(FakeSegments(options)) as engine:
        first = engine.submit(samples(1))
        assert calling.wait(SOON_S)
        started_s = time.perf_counter()
        second = engine.submit(samples(2))
        took_s = time.perf_counter() - started_s
        called.set()
        assert (result(first), result(second)) == (scores(1), scores(2))
    assert took_s < SOON_S / 2


@pytest.mark.parametrize("batching", ["incremental", Collecting(wait_ms=0.0)])
def test_a_launcher_says_whether_it_is_crowded(batching: Any):
    """Eight samples make a batch."""
    device = FakeSegments(replace(OPTIONS, batching=batching))
    with Engine.from_segments(device) as engine, ExitStack() as leaving:
        leaving.callback(device.go_on)
        device.hold()
        answers = [engine.submit(samples(*range(4)), deadline_ms=1e6) for _ in range(12)]
        eventually(lambda: engine._inbox.is_crowded)
        device.go_on()
        wait(answers, timeout=SOON_S)
        eventually(lambda: not engine._inbox.is_crowded)


def test_requests_leave_a_launcher_that_can_launch_nothing_asleep(
    engine: Engine, device: FakeSegments, monkeypatch: pytest.MonkeyPatch
):
    """It hears of them together, with what it has to know at once: here that one is given up."""
    held, step = fill_the_device(engine, device), Pipeline.step
    heard: list[list[type]] = []

    def listening(pipeline: Pipeline, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        heard.append([type(event) for event in events])
        return step(pipeline, now_us, events)

    monkeypatch.setattr(Pipeline, "step", listening)
    answers = []
    for value in range(5):
        answers.append(engine.submit(samples(value)))
        time.sleep(0.001)  # in which it would hear of one alone
    assert answers.pop().cancel()
    eventually(lambda: heard)
    assert heard[0] == [Submitted] * 5 + [Cancel]
    device.go_on()
    assert [result(answer) for answer in (held, *answers)][1:] == [scores(i) for i in range(4)]


WHOLE_BATCHES = replace(OPTIONS, segments=None, smallest_batch=8, max_slice=8, smallest_slice=8)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, FakeSegments, list[str]]]:
    """An engine of which every batch is large, its device, and what it was told, in order."""
    told: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        method = getattr(FakeSegments, name)

        def note(*of: Any) -> Any:
            try:
                return method(*of)
            finally:
                told.append(name)

        return note

    monkeypatch.setattr(launcher, "LARGE_IDS", 0)
    for name in ("upload", "run_whole", "write_rows"):
        monkeypatch.setattr(FakeSegments, name, noted(name))
    device = FakeSegments(WHOLE_BATCHES)
    with Engine.from_segments(device) as engine:
        yield engine, device, told
        device.go_on()


def eight(value: int) -> JaggedBatch:
    """A whole batch."""
    return samples(*range(value, value + 8), ids=2)


def answers_of(engine: Engine, told: list[str], count: int) -> list[Answer]:
    """Of whole batches, submitted one by one to a device that is held."""
    answers = []
    for value in range(count):
        answers.append(engine.submit(eight(value)))
        eventually(lambda: told.count("upload") == min(len(answers), OPTIONS.max_steps_in_flight))
        eventually(lambda: told.count("run_whole") == min(len(answers), BEFORE_HELD))
    return answers


def test_a_large_batch_is_on_its_way_before_the_one_in_front_is_called(
    large: tuple[Engine, FakeSegments, list[str]],
):
    """Once two are under way: one that runs, and one behind it."""
    engine, device, told = large
    device.hold()
    answers = answers_of(engine, told, 5)
    assert told == ["upload", "run_whole", "upload", "run_whole", "upload"]
    device.go_on()
    assert [result(a) for a in answers] == [
        scores(*range(value, value + 8), ids=2) for value in range(5)
    ]
    assert told[5:7] == ["upload", "run_whole"]


def test_a_batch_that_nobody_comes_behind_is_called_when_its_turn_is_next(
    large: tuple[Engine, FakeSegments, list[str]],
):
    engine, device, told = large
    device.hold()
    answers = answers_of(engine, told, 3)
    assert told.count("run_whole") == 2
    device.go_on()
    assert [len(result(answer)) for answer in answers] == [8] * 3
    assert told.count("upload") == told.count("run_whole") == 3


@pytest.mark.parametrize("what", ["upload", "whole"])
def test_a_batch_that_cannot_leave_fails_alone(
    large: tuple[Engine, FakeSegments, list[str]], what: str
):
    engine, device, told = large
    device.hold()
    answers = answers_of(engine, told, 2)
    device.break_next(what)
    answers += [engine.submit(eight(value)) for value in (2, 3)]
    eventually(lambda: told.count("upload") == 3)
    device.go_on()
    for value in (0, 1, 3):
        assert result(answers[value]) == scores(*range(value, value + 8), ids=2)
    with pytest.raises(StepFailed, match=f"{what} broke"):
        result(answers[2])


def test_a_batch_that_waits_to_be_called_is_lost_with_the_device(
    large: tuple[Engine, FakeSegments, list[str]],
):
    """As what it would be built on may be; later ones are well again."""
    engine, device, told = large
    device.hold()
    device.lose_next("whole")
    answers = answers_of(engine, told, 3)
    device.go_on()
    for answer in (answers[0], answers[2]):
        with pytest.raises(StepFailed, match="fell out"):
            result(answer)
    assert result(engine.submit(eight(5))) == scores(*range(5, 13), ids=2)


def test_rows_are_written_behind_a_batch_that_waits_to_be_called(
    large: tuple[Engine, FakeSegments, list[str]],
):
    engine, device, told = large
    device.hold()
    answers = answers_of(engine, told, 3)
    written = engine.update_rows("t", [1], np.full((1, 4), 500.0))
    eventually(lambda: "write_rows" in told)
    assert told[-2:] == ["run_whole", "write_rows"]
    device.go_on()
    written.result(timeout=SOON_S)
    assert [result(answer) for answer in answers] == [
        scores(*range(value, value + 8), ids=2) for value in range(3)
    ]


@pytest.mark.parametrize("drain", [True, False])
def test_an_engine_can_be_closed_while_a_batch_waits_to_be_called(
    large: tuple[Engine, FakeSegments, list[str]], drain: bool
):
    engine, device, told = large
    device.hold()
    answers = answers_of(engine, told, 3)
    threading.Timer(0.1, device.go_on).start()
    engine.close(drain=drain)
    assert all(answer.done() for answer in answers)
    if drain:
        assert [len(result(answer)) for answer in answers] == [8] * 3
    else:
        with pytest.raises(EngineClosed):
            result(answers[-1])


def test_two_batch_buffers_serve_any_number_of_batches(engine: Engine, device: FakeSegments):
    for value in range(50):
        engine.submit(samples(*range(value, value + 12))).result(timeout=SOON_S)
    assert device.states_made <= 2


def test_urgent_requests_overtake(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    order: list[str] = []
    later = engine.submit(samples(*range(8)), priority=1)
    urgent = engine.submit(samples(*range(8)), priority=-1)
    later.add_done_callback(lambda _: order.append("later"))
    urgent.add_done_callback(lambda _: order.append("urgent"))
    device.go_on()
    wait([held, later, urgent], timeout=SOON_S)
    eventually(lambda: len(order) == 2)  # who waits may hear of an answer first
    assert order == ["urgent", "later"]


def test_awaiting_works_beside_other_tasks(engine: Engine):
    async def ask(value: float) -> list[list[float]]:
        return (await engine.submit(samples(value))).tolist()

    async def ask_all() -> list[list[list[float]]]:
        return await asyncio.gather(*(ask(value) for value in range(20)))

    assert asyncio.run(ask_all()) == [scores(value) for value in range(20)]


def test_what_the_caller_does_to_its_arrays_later_changes_nothing(
    engine: Engine, device: FakeSegments
):
    held = fill_the_device(engine, device)
    mine = samples(1, 2)
    answer = engine.submit(mine)
    mine.dense[:], mine.values[:], mine.offsets[:] = np.nan, 10**6, -1
    device.go_on()
    assert result(answer) == scores(1, 2)
    result(held)


# --- samples that are looked at while the device computes


def wrong_id(*dense: float) -> JaggedBatch:
    """Frozen, with bags of two of which the last id of all is in no table."""
    batch = samples(*dense, ids=2)
    batch.values[-1] = 1000
    return batch.frozen()


def test_who_is_looked_at_later_learns_it_from_the_answer(engine: Engine, device: FakeSegments):
    """And shares a batch with others, who do not learn of it."""
    held = fill_the_device(engine, device)
    before, after = engine.submit(samples(1, ids=2)), samples(2, 3, ids=2).frozen()
    wrong, after = engine.submit(wrong_id(7, 8)), engine.submit(after)
    infinite = engine.submit(samples(np.inf, ids=2).frozen())
    device.go_on()
    assert result(before) == scores(1, ids=2) and result(after) == scores(2, 3, ids=2)
    message = r"feature 'f', sample 1: id 1000 is not in \[0, 1000\)"
    with pytest.raises(InputError, match=message):
        wrong.result(timeout=SOON_S)
    with pytest.raises(InputError, match="dense feature 0, sample 0: inf is not finite"):
        infinite.result(timeout=SOON_S)
    result(held)
    stats = engine.stats()
    assert (stats.rejected, stats.failed, stats.queued_samples) == ({"input": 2}, 0, 0)
    assert (stats.requests_accepted, stats.requests_answered) == (5, 3)


@pytest.mark.parametrize("sample", [0, 23])
def test_one_wrong_id_is_enough_wherever_it_is(engine: Engine, device: FakeSegments, sample: int):
    """In a request of three batches: it is refused when those samples are on their way."""
    held = fill_the_device(engine, device)
    batch = samples(*range(24), ids=2)
    batch.values[2 * sample] = 1000
    wrong = engine.submit(batch.frozen())
    device.go_on()
    with pytest.raises(InputError, match=f"sample {sample}: id 1000"):
        wrong.result(timeout=SOON_S)
    result(held)
    assert result(engine.submit(samples(5))) == scores(5)
    assert engine.stats().queued_samples == 0


def test_bags_of_other_lengths_beside_hide_nothing(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    others = engine.submit(samples(1, ids=3)), engine.submit(samples(4, ids=2).frozen())
    wrong = engine.submit(wrong_id(7))
    device.go_on()
    with pytest.raises(InputError, match="sample 0: id 1000"):
        wrong.result(timeout=SOON_S)
    assert [result(one) for one in others] == [scores(1, ids=3), scores(4, ids=2)]
    result(held)


@pytest.mark.parametrize("segments", [2, None])
def test_what_the_device_found_well_nobody_looks_at_again(
    monkeypatch: pytest.MonkeyPatch, segments: int | None
):
    """In slices and in whole batches, and whatever wrong ids have left behind those of the next."""
    looked_at: list[int] = []
    check = Preparer.check

    def noting(self: Preparer, one: Prepared) -> None:
        looked_at.append(one.samples)
        check(self, one)

    monkeypatch.setattr(Preparer, "check", noting)
    options = replace(OPTIONS, segments=segments, max_slice=8, smallest_slice=2)
    with Engine.from_segments(FakeSegments(options)) as engine:
        assert result(engine.submit(samples(1, 2, ids=2).frozen())) == scores(1, 2, ids=2)
        assert looked_at == []
        with pytest.raises(InputError):
            result(engine.submit(wrong_id(1, 2)))
        assert looked_at == [2]
        assert result(engine.submit(samples(3, ids=2).frozen())) == scores(3, ids=2)
        assert looked_at == [2]
        stats = engine.stats()
    assert stats.co_runs == ({} if segments else {WHOLE: stats.steps})


def test_who_was_cancelled_is_refused_no_more(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    assert engine.submit(wrong_id(1)).cancel()
    device.go_on()
    result(held)
    assert result(engine.submit(samples(5))) == scores(5)
    assert (engine.stats().rejected, engine.stats().cancelled) == ({}, 1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_is_copied_is_looked_at_later_too(engine: Engine, dtype: type):
    """As it was when it was handed over."""
    batch = samples(1, 2, ids=2)
    batch = replace(batch, values=batch.values.astype(dtype))
    batch.values[0] = -1 if dtype is np.int32 else 1000
    with pytest.raises(InputError, match=f"sample 0: id {batch.values[0]}"):
        answer = engine.submit(batch)
        batch.values[:] = 0
        answer.result(timeout=SOON_S)
    with pytest.raises(InputError, match="sample 1: id 1000"):
        engine.predict(wrong_id(1, 2))


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**32])
def test_what_int32_does_not_hold_is_refused_at_once(engine: Engine, wrong: int):
    batch = samples(1, 2, ids=2)
    batch = replace(batch, values=batch.values.astype(np.int64))
    batch.values[0] = wrong
    with pytest.raises(InputError, match=f"sample 0: id {wrong}"):
        engine.submit(batch)


# --- the queue


def test_the_queue_is_exact(engine: Engine, device: FakeSegments):
    """64 samples, launched or not, are let in; not one more, until some are answered."""
    device.hold()
    answers = [engine.submit(samples(*range(n))) for n in (16, 40, 8)]
    with pytest.raises(QueueFull, match="64 of at most 64 samples wait, 1 more do not fit"):
        engine.submit(samples(1))
    device.go_on()
    for answer in answers:
        result(answer)
    assert result(engine.submit(samples(*range(64)))) == scores(*range(64))
    assert engine.stats().rejected == {"queue_full": 1}


def test_what_does_not_fit_is_not_looked_at(engine: Engine, device: FakeSegments):
    device.hold()
    held = engine.submit(samples(*range(63)))
    wrong = samples(1, 2)
    wrong.values[:] = -1
    full = pytest.raises(QueueFull, match="63 of at most 64 samples wait, 2 more do not fit")
    with full:
        engine.submit(wrong)
    with full:
        engine.submit(wrong.dense, {"f": wrong.values})
    with full:
        engine.submit(list(wrong.dense), {})
    with pytest.raises(InputError):
        engine.submit(wrong.part(0, 1))
    device.go_on()
    result(held)
    assert engine.stats().rejected == {"queue_full": 3, "input": 1}


def test_an_answer_leaves_the_queue_before_it_is_seen(engine: Engine):
    for _ in range(50):
        assert len(result(engine.submit(samples(*range(64))))) == 64


def test_a_request_larger_than_the_queue_is_told_so(engine: Engine):
    with pytest.raises(InputError, match="65 samples are more than the queue ever holds, 64"):
        engine.submit(samples(*range(65)))


@pytest.mark.parametrize("n", [0, 1, 64, 65, 500])
def test_predict_takes_any_number(engine: Engine, n: int):
    found = engine.predict(samples(*range(n)))
    assert found.shape == (n, 1) and found.dtype == np.float32
    assert found.tolist() == scores(*range(n))


def test_predict_of_many_goes_piece_by_piece_beside_others(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.predict, samples(*range(100)))
        eventually(lambda: engine.stats().rejected == {"queue_full": 1})
        assert engine.stats().queued_samples == 16 + 32
        device.go_on()
        assert found.result(timeout=SOON_S).tolist() == scores(*range(100))
    result(held)


def test_predict_of_many_waits_for_itself_and_not_for_others(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    others = engine.submit(samples(*range(48)))
    with pytest.raises(QueueFull):
        engine.predict(samples(*range(100)))
    device.go_on()
    assert len(result(held)) + len(result(others)) == 64


# --- deadlines


def test_an_unlaunched_request_expires_while_the_device_is_busy(
    engine: Engine, device: FakeSegments
):
    fill_the_device(engine, device)
    answer = engine.submit(samples(1), deadline_ms=20)
    with pytest.raises(DeadlineExceeded, match="before the request was launched"):
        answer.result(timeout=SOON_S)
    assert engine.stats().rejected == {"deadline": 1}
    assert engine.stats().queued_samples == 16


def test_an_answer_is_never_late(engine: Engine, device: FakeSegments):
    device.hold()
    answer = engine.submit(samples(1), deadline_ms=50)
    eventually(lambda: engine.stats().steps > 0)
    time.sleep(0.06)
    device.go_on()
    with pytest.raises(DeadlineExceeded, match="ms after the deadline"):
        answer.result(timeout=SOON_S)


def test_a_deadline_that_is_met_changes_nothing(engine: Engine):
    assert result(engine.submit(samples(1), deadline_ms=1e15)) == scores(1)


@pytest.mark.parametrize("deadline_ms", [0, -5])
def test_a_deadline_in_the_past_is_rejected_at_once(engine: Engine, deadline_ms: float):
    with pytest.raises(DeadlineExceeded, match=r"the deadline passed \d+\.\d+ ms ago"):
        engine.submit(samples(1), deadline_ms=deadline_ms)
    assert engine.stats().rejected == {"deadline": 1}


@pytest.mark.parametrize("deadline_ms", [float("nan"), float("inf")])
def test_a_deadline_is_a_number(engine: Engine, deadline_ms: float):
    with pytest.raises(ValueError, match="not a number of milliseconds"):
        engine.submit(samples(1), deadline_ms=deadline_ms)


# --- cancellation


def test_cancelled_while_it_waits(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    answers = [engine.submit(samples(value)) for value in (100, 200, 300)]
    assert answers[1].cancel() and answers[1].cancel()
    assert engine.stats().queued_samples == 16 + 2
    device.go_on()
    assert [result(answers[0]), result(answers[2])] == [scores(100), scores(300)]
    assert result(held) == scores(*range(16))
    seen = [value for batch in device.batches_seen for value in batch]
    assert 300 + 10 in seen and 200 + 10 not in seen
    assert (engine.stats().cancelled, engine.stats().requests_answered) == (1, 3)


def test_cancelled_when_partly_launched(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    assert held.cancel()
    answer = engine.submit(samples(7))
    device.go_on()
    assert result(answer) == scores(7)
    with pytest.raises(CancelledError):
        held.result(timeout=SOON_S)
    assert engine.stats().queued_samples == 0


def test_waiting_for_a_cancelled_answer_ends(engine: Engine, device: FakeSegments):
    held = fill_the_device(engine, device)
    held.cancel()
    assert wait([held], timeout=SOON_S).done == {held}


def test_an_answer_that_is_there_cannot_be_cancelled(engine: Engine):
    answer = engine.submit(samples(1))
    result(answer)
    assert not answer.cancel()
    assert engine.stats().cancelled == 0


def test_a_cancelled_task_cancels_its_request(engine: Engine, device: FakeSegments):
    device.hold()

    async def give_up() -> None:
        await asyncio.wait_for(engine.submit(samples(1)), timeout=0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert (engine.stats().cancelled, engine.stats().queued_samples) == (1, 0)


def test_cancelling_amid_completions_ends_each_request_once(device: FakeSegments):
    with Engine.from_segments(device) as engine:
        for _ in range(200):
            answers = [engine.submit(samples(value)) for value in range(4)]
            cancelled = [answer.cancel() for answer in answers]
            for value, (answer, gone) in enumerate(zip(answers, cancelled, strict=True)):
                if not gone:
                    assert result(answer) == scores(value)
        eventually(lambda: engine.stats().queued_samples == 0)
        stats = engine.stats()
    assert stats.cancelled + stats.requests_answered == stats.requests_accepted == 800


# --- the end


def test_draining_answers_all_that_was_accepted(device: FakeSegments):
    engine = Engine.from_segments(device)
    fill_the_device(engine, device)
    answers = [engine.submit(samples(value)) for value in range(20)]
    threading.Timer(0.05, device.go_on).start()
    engine.close()
    assert [answer.result(timeout=0).tolist() for answer in answers] == [
        scores(value) for value in range(20)
    ]


def test_closing_without_drain_fails_what_waits_at_once(device: FakeSegments):
    engine = Engine.from_segments(device)
    held = fill_the_device(engine, device)
    pending = engine.submit(samples(1))
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    for answer in (held, pending):
        with pytest.raises(EngineClosed, match="before it came to the request"):
            answer.result(timeout=SOON_S)
    device.go_on()
    closing.join(timeout=SOON_S)
    assert not closing.is_alive()
    assert engine.stats().failed == 2


def test_a_drain_can_be_cut_short(device: FakeSegments):
    engine = Engine.from_segments(device)
    held = fill_the_device(engine, device)
    draining = threading.Thread(target=engine.close)
    draining.start()
    cutting = threading.Thread(target=engine.close, kwargs={"drain": False})
    cutting.start()
    with pytest.raises(EngineClosed):
        held.result(timeout=SOON_S)
    device.go_on()
    draining.join(timeout=SOON_S)
    cutting.join(timeout=SOON_S)
    assert not draining.is_alive() and not cutting.is_alive()


def test_a_closed_engine_takes_nothing_and_closes_again(device: FakeSegments):
    engine = Engine.from_segments(device)
    engine.close()
    engine.close(drain=False)
    for ask in (engine.submit, engine.predict):
        with pytest.raises(EngineClosed, match="the engine is closed"):
            ask(samples(1))
    assert engine.stats().rejected == {"closed": 2}
    assert not any(thread.is_alive() for thread in engine._threads)


def test_submitting_while_it_closes_ends_in_an_answer_or_a_clear_no(device: FakeSegments):
    engine = Engine.from_segments(device)
    accepted: list[Answer] = []

    def client() -> None:
        try:
            while True:
                accepted.append(engine.submit(samples(1)))
        except QueueFull:
            client()
        except EngineClosed:
            pass

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    time.sleep(0.02)
    engine.close()
    for thread in clients:
        thread.join(timeout=SOON_S)
    assert all(answer.result(timeout=0).tolist() == scores(1) for answer in accepted)


def test_what_ended_is_answered_although_the_engine_closes(
    device: FakeSegments, monkeypatch: pytest.MonkeyPatch
):
    """However long after its step's end that takes."""
    add = Ledger.add

    def add_late(*args: Any) -> None:
        time.sleep(0.05)
        add(*args)

    monkeypatch.setattr(Ledger, "add", add_late)
    engine = Engine.from_segments(device)
    answer = engine.submit(samples(1))
    engine.close()
    assert answer.result(timeout=0).tolist() == scores(1)


def test_closing_in_a_callback_does_not_hang(device: FakeSegments):
    """It does not wait for what is still to be answered, but that is answered."""
    engine, closed = Engine.from_segments(device), threading.Event()

    def close(_: Future) -> None:
        engine.close()
        closed.set()

    held = fill_the_device(engine, device)
    held.add_done_callback(close)
    later = [engine.submit(samples(*range(16))) for _ in range(2)]
    device.go_on()
    assert [result(answer) for answer in later] == [scores(*range(16))] * 2
    assert closed.wait(SOON_S)
    eventually(lambda: not any(thread.is_alive() for thread in engine._threads))


def test_an_engine_that_is_forgotten_ends_its_threads(device: FakeSegments):
    engine = Engine.from_segments(device)
    engine.predict(samples(1))
    threads = engine._threads
    del engine
    gc.collect()
    eventually(lambda: not any(thread.is_alive() for thread in threads))


# --- faults


def test_a_callback_may_submit_but_not_wait(engine: Engine):
    seen: list[Answer] = []

    def ask_again(_: Future) -> None:
        with pytest.raises(EngineError, match="use submit in callbacks"):
            engine.predict(samples(3))
        seen.append(engine.submit(samples(2)))

    engine.submit(samples(1)).add_done_callback(ask_again)
    eventually(lambda: seen)
    assert result(seen[0]) == scores(2)


def test_a_callback_that_exits_takes_nobody_with_it(engine: Engine, device: FakeSegments):
    device.hold()
    answers = [engine.submit(samples(value)) for value in (1, 2)]
    answers[0].add_done_callback(lambda _: exec("raise SystemExit"))
    device.go_on()
    assert [result(answer) for answer in answers] == [scores(1), scores(2)]
    assert result(engine.submit(samples(3))) == scores(3)


@pytest.mark.parametrize("how", ["break_next", "lose_next"])
def test_a_whole_batch_that_fails_fails_alone(how: str):
    """Without `segments`, one launch takes each of these from ids to scores."""
    device = FakeSegments(replace(OPTIONS, segments=None, max_slice=8, smallest_slice=2))
    with Engine.from_segments(device) as engine:
        assert result(engine.submit(samples(1, 2, 3))) == scores(1, 2, 3)
        getattr(device, how)("whole")
        with pytest.raises(StepFailed):
            engine.submit(samples(1)).result(timeout=SOON_S)
        for value in range(5):
            assert result(engine.submit(samples(value))) == scores(value)
        stats = engine.stats()
    assert stats.co_runs == {WHOLE: stats.steps} and stats.steps == 7
    assert (stats.failed, stats.queued_samples) == (1, 0)


@pytest.mark.parametrize("what", ["embed", "start", "run"])
def test_a_launch_that_raises_fails_its_batch_alone(
    engine: Engine, device: FakeSegments, what: str
):
    device.break_next(what)
    with pytest.raises(StepFailed, match=f"DeviceBroke: {what} broke") as failure:
        engine.submit(samples(1)).result(timeout=SOON_S)
    assert isinstance(failure.value.__cause__, DeviceBroke)
    assert result(engine.submit(samples(2))) == scores(2)
    assert (engine.stats().failed, engine.stats().queued_samples) == (1, 0)


@pytest.mark.parametrize("what", ["embed", "start", "run"])
def test_a_step_that_fails_on_the_device_fails_those_concerned(
    engine: Engine, device: FakeSegments, what: str
):
    """The state that is lost with it is not used again."""
    device.lose_next(what)
    with pytest.raises(StepFailed, match="DeviceBroke: the card fell out"):
        engine.submit(samples(1)).result(timeout=SOON_S)
    for value in range(5):
        assert result(engine.submit(samples(value))) == scores(value)
    assert (engine.stats().failed, engine.stats().queued_samples) == (1, 0)


@pytest.mark.parametrize("how", ["break_next", "lose_next"])
@pytest.mark.parametrize("what", ["embed", "start", "run"])
def test_a_fault_under_load_fails_some_and_answers_the_rest(
    engine: Engine, device: FakeSegments, how: str, what: str
):
    """Requests in many parts among them: each ends, with its own scores or an error."""
    held = fill_the_device(engine, device)
    getattr(device, how)(what)
    values = [range(100, 130), range(200, 203), range(300, 310), range(400, 405)]
    answers = [held, *(engine.submit(samples(*v)) for v in values)]
    device.go_on()
    wait(answers, timeout=SOON_S)
    failed = [answer for answer in answers if answer.exception(timeout=0)]
    assert failed and all(isinstance(answer.exception(), StepFailed) for answer in failed)
    for asked, answer in zip([range(16), *values], answers, strict=True):
        assert answer in failed or result(answer) == scores(*asked)
    assert engine.predict(samples(1, 2)).tolist() == scores(1, 2)
    assert engine.stats().queued_samples == 0
    assert engine.stats().failed == len(failed)


@pytest.mark.parametrize("what", ["embed", "start", "run"])
def test_a_lost_state_does_not_go_round(what: str):
    """Of forty batches, one is lost, and those at most that were launched before that was known."""
    device = FakeSegments(replace(OPTIONS, max_queued_samples=1000))
    with Engine.from_segments(device) as engine:
        fill_the_device(engine, device)
        device.lose_next(what)
        answers = [engine.submit(samples(*range(8))) for _ in range(40)]
        device.go_on()
        wait(answers, timeout=SOON_S)
        assert 1 <= engine.stats().failed <= 4


def test_a_broken_launcher_fails_everyone_and_hangs_nobody(
    engine: Engine, device: FakeSegments, monkeypatch: pytest.MonkeyPatch
):
    held = fill_the_device(engine, device)

    def bug(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(Pipeline, "step", bug)
    device.go_on()
    with pytest.raises(EngineClosed, match="the engine stopped: AssertionError"):
        held.result(timeout=SOON_S)
    with pytest.raises(EngineClosed):
        engine.submit(samples(1))
    engine.close()


# --- bookkeeping


def test_counts_are_those_done_by_hand(engine: Engine):
    """Three samples of two ids: a slice of 4 with 640 ids, a batch of 4, three steps, twice."""
    for _ in range(2):
        engine.predict(samples(1, 2, 3, ids=2))
    with pytest.raises(InputError):
        engine.predict(samples(float("nan")))
    stats = engine.stats()
    assert (stats.requests_accepted, stats.samples_accepted) == (2, 6)
    assert (stats.requests_answered, stats.samples_answered) == (2, 6)
    assert (stats.batches, stats.slices, stats.steps) == (2, 2, 6)
    assert (stats.mean_batch, stats.mean_slice) == (3, 3)
    assert (stats.sample_padding, stats.id_padding) == (1 / 4, 1 - 6 / 640)
    assert stats.batch_buckets == stats.slice_buckets == {4: 2}
    assert sum(stats.step_times.values()) == 6 and stats.steps_us > 0
    assert stats.rejected == {"input": 1}
    assert 0 < stats.latency_p50_ms <= stats.latency_p95_ms <= stats.latency_p99_ms < 10_000
    assert (stats.backend, stats.backend_reason, stats.profile) == ("xla", "asked for", None)


def test_latencies_are_of_the_last_answers_only(device: FakeSegments):
    device.options = replace(OPTIONS, latency_window=2)
    with Engine.from_segments(device) as engine:
        assert np.isnan(engine.stats().latency_p99_ms)
        device.hold()
        slow = engine.submit(samples(1))
        time.sleep(0.2)
        device.go_on()
        result(slow)
        assert engine.stats().latency_p99_ms >= 200
        for _ in range(2):
            engine.predict(samples(1))
        assert engine.stats().latency_p99_ms < 200


@pytest.mark.usefixtures("unchecked")
def test_ten_thousand_requests_leave_nothing_behind(engine: Engine, device: FakeSegments):
    def ask(times: int) -> weakref.ref:
        for _ in range(times):
            answers = [engine.submit(samples(value)) for value in range(50)]
            wait(answers, timeout=SOON_S)
        device.batches_seen.clear()
        return weakref.ref(answers[0])

    ask(20)
    gc.collect()
    before = len(gc.get_objects())
    last = ask(200)
    gc.collect()
    assert last() is None
    assert len(gc.get_objects()) - before < 500
    assert not engine._ledger._open
