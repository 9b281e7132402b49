"""Requests of other processes are answered as the engine's own are, together, and each once."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_segments import OPTIONS, FakeSegments, samples, scores
from front_end_callers import ask, ask_for_ever
from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed, QueueFull, StepFailed
from recflow_jax.remote.arena import SLOTS
from recflow_jax.remote.front_end import FrontEnd, FrontEndStats
from recflow_jax.remote.front_ends import FrontEnds
from small_models import CONCAT, FIXED, compiled

SOON_S = 60
LARGEST = OPTIONS.max_slice


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def engine(device: FakeSegments) -> Iterator[Engine]:
    with Engine.from_segments(device) as engine:
        yield engine
        device.go_on()


@pytest.fixture
def path(engine: Engine, tmp_path: Path) -> Iterator[Path]:
    with FrontEnds(engine, tmp_path / "engine") as front_ends:
        yield front_ends.path


@pytest.fixture
def front_end(path: Path, device: FakeSegments) -> Iterator[FrontEnd]:
    front_end = FrontEnd(path)
    yield front_end
    device.go_on()
    front_end.close()


def result(answer: Future[Any]) -> list[list[float]]:
    return answer.result(timeout=SOON_S).tolist()


def eventually(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.001)


def fill_the_slots(
    front_end: FrontEnd, engine: Engine, device: FakeSegments, *, before: int = 0
) -> list[Future[Any]]:
    """Bundles of one request each that are held by the device."""
    device.hold()
    held = []
    for i in range(SLOTS):
        held.append(front_end.submit(samples(i)))
        eventually(lambda: engine.stats().requests_accepted == before + len(held))
    return held


# --- answers


def test_answers_are_the_engines(front_end: FrontEnd):
    assert result(front_end.submit(samples(1, 2))) == scores(1, 2)
    assert result(front_end.submit(samples(1, ids=2))) == scores(1, ids=2)
    assert front_end.predict(samples(3).frozen()).tolist() == scores(3)
    by_name = front_end.predict(np.array([[4.0]], np.float32), {"f": [[1, 1]]})
    assert by_name.tolist() == scores(4, ids=2)
    assert front_end.predict(samples()).shape == (0, 1)


@pytest.mark.parametrize("config", [CONCAT, FIXED], ids=lambda c: c.name)
def test_models_of_every_kind(config: Any, tmp_path: Path):
    batches = [generate(config, n, seed=n) for n in (1, 3, 2, 4)]
    with (
        Engine.from_segments(compiled(config)) as engine,
        FrontEnds(engine, tmp_path / "engine") as front_ends,
        FrontEnd(front_ends.path) as front_end,
    ):
        answers = [front_end.submit(batch) for batch in batches]
        for answer, batch in zip(answers, batches, strict=True):
            np.testing.assert_allclose(
                answer.result(SOON_S), engine.predict(batch), rtol=1e-4, atol=1e-5
            )


def test_what_comes_meanwhile_goes_together(
    front_end: FrontEnd, engine: Engine, device: FakeSegments
):
    """As many samples as a slice holds, with fixed bags and jagged ones."""
    held = fill_the_slots(front_end, engine, device)
    later = [front_end.submit(samples(i, ids=1 + i % 2)) for i in range(2 * LARGEST)]
    device.go_on()
    assert [result(answer) for answer in held] == [scores(i) for i in range(SLOTS)]
    assert [result(a) for a in later] == [scores(i, ids=1 + i % 2) for i in range(2 * LARGEST)]
    assert engine.stats().requests_accepted == SLOTS + 2


def test_what_the_caller_does_later_changes_nothing(
    front_end: FrontEnd, engine: Engine, device: FakeSegments
):
    fill_the_slots(front_end, engine, device)
    batch = samples(5, ids=2)
    answer = front_end.submit(batch)
    for array in (batch.dense, batch.values, batch.offsets):
        array[:] = 0
    device.go_on()
    found = answer.result(SOON_S)
    assert found.tolist() == scores(5, ids=2)
    found[:] = 0


def test_many_callers(front_end: FrontEnd, engine: Engine):
    wrong: list[tuple[int, int]] = []

    def call(first: int) -> None:
        for i in range(first, first + 50):
            if result(front_end.submit(samples(i, ids=1 + i % 2))) != scores(i, ids=1 + i % 2):
                wrong.append((first, i))

    callers = [threading.Thread(target=call, args=(100 * i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(SOON_S)
    assert not wrong and engine.stats().samples_answered == 300


def test_urgent_requests_overtake(front_end: FrontEnd, engine: Engine, device: FakeSegments):
    held, order = fill_the_slots(front_end, engine, device), []
    for name, priority in (("later", 1), ("plain", 0), ("urgent", -1)):
        answer = front_end.submit(samples(1), priority=priority)
        answer.add_done_callback(lambda _, name=name: order.append(name))
        held.append(answer)
    device.go_on()
    wait(held, timeout=SOON_S)
    assert order == ["urgent", "plain", "later"]


# --- what goes wrong


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (replace(samples(1), values=np.array([1000])), "feature 'f', sample 0"),
        (replace(samples(1), dense=np.array([[np.nan]], np.float32)), "not finite"),
        (replace(samples(1), dense=np.zeros(3, np.float32)), "shape"),
        (samples(*range(LARGEST + 1)), "more than a front end passes on"),
    ],
    ids=["id", "float", "shape", "size"],
)
def test_bad_samples_are_named_and_go_nowhere(
    front_end: FrontEnd, engine: Engine, batch: JaggedBatch, message: str
):
    with pytest.raises(InputError, match=message):
        front_end.submit(batch)
    assert result(front_end.submit(samples(1))) == scores(1)
    assert engine.stats().requests_accepted == 1


def test_bad_samples_that_the_device_finds_harm_no_others(
    front_end: FrontEnd, engine: Engine, device: FakeSegments
):
    held = fill_the_slots(front_end, engine, device)
    bad_id = replace(samples(2, ids=2), values=np.array([5, 1000], np.int32))
    bad_float = replace(samples(2, ids=2), dense=np.array([[np.inf]], np.float32))
    answers = [
        front_end.submit(batch)
        for batch in (samples(1, ids=2), bad_id, samples(3, ids=2).frozen(), bad_float)
    ]
    device.go_on()
    assert [result(answer) for answer in held] == [scores(i) for i in range(SLOTS)]
    with pytest.raises(InputError, match="feature 'f', sample 0: id 1000"):
        result(answers[1])
    with pytest.raises(InputError, match="not finite"):
        result(answers[3])
    assert [result(answers[i]) for i in (0, 2)] == [scores(1, ids=2), scores(3, ids=2)]
    assert engine.stats().requests_accepted == SLOTS + 2
    front_end.close()
    assert front_end._admission.samples == 0


def test_a_bundle_that_is_refused_for_nothing_is_not_sent_again(
    front_end: FrontEnd, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("the samples changed")

    monkeypatch.setattr(engine, "submit_in_place", refuse)
    with pytest.raises(InputError, match="the samples changed"):
        result(front_end.submit(samples(1, ids=2)))


def test_one_bundle_at_a_time_goes_to_a_crowded_engine(
    front_end: FrontEnd, engine: Engine, device: FakeSegments, monkeypatch: pytest.MonkeyPatch
):
    crowded = [True]
    monkeypatch.setattr(Engine, "is_crowded", property(lambda _: crowded[0]))
    front_end.predict(samples(1))
    device.hold()
    answers = [front_end.submit(samples(0))]
    eventually(lambda: engine.stats().requests_accepted == 2)
    answers += [front_end.submit(samples(i)) for i in (1, 2)]
    time.sleep(0.05)
    assert front_end.stats().bundles == engine.stats().requests_accepted == 2
    answers.append(front_end.submit(samples(3), priority=-1))
    eventually(lambda: engine.stats().requests_accepted == 3)
    answers.append(front_end.submit(samples(4), priority=-1))
    time.sleep(0.05)
    assert engine.stats().requests_accepted == 3
    crowded[0] = False
    device.go_on()
    assert [result(answer) for answer in answers] == [scores(i) for i in range(5)]
    assert front_end.stats().bundles == 5
    fill_the_slots(front_end, engine, device, before=5)


def test_everything_is_counted(front_end: FrontEnd, engine: Engine, device: FakeSegments):
    held = fill_the_slots(front_end, engine, device)
    waiting = [front_end.submit(samples(1, 2)), front_end.submit(samples(3))]
    assert waiting[1].cancel()
    assert front_end.stats() == FrontEndStats(
        requests_accepted=SLOTS + 2,
        samples_accepted=SLOTS + 3,
        bundles=SLOTS,
        queued_samples=SLOTS + 3,
    )
    device.break_next("embed")
    waiting.append(front_end.submit(samples(5)))
    device.go_on()
    wait([*held, *waiting], timeout=SOON_S)
    front_end.close()
    found = front_end.stats()
    assert found.requests_answered + found.failed == SLOTS + 2 and found.failed > 0
    assert (found.cancelled, found.queued_samples) == (1, 0)
    assert found.samples_answered >= found.requests_answered


def test_a_full_queue(front_end: FrontEnd, engine: Engine, device: FakeSegments):
    held = fill_the_slots(front_end, engine, device)
    most = OPTIONS.max_queued_samples
    held += [front_end.submit(samples(1)) for _ in range(most - SLOTS)]
    with pytest.raises(QueueFull, match=f"{most} of at most {most} samples wait, 1 more"):
        front_end.submit(samples(1))
    device.go_on()
    wait(held, timeout=SOON_S)
    assert result(front_end.submit(samples(1))) == scores(1)


def test_a_broken_step_fails_its_bundle_alone(
    front_end: FrontEnd, engine: Engine, device: FakeSegments
):
    device.lose_next("whole" if OPTIONS.segments is None else "embed")
    with pytest.raises(StepFailed, match="the card fell out"):
        result(front_end.submit(samples(1)))
    assert front_end._admission.samples == 0
    assert result(front_end.submit(samples(2))) == scores(2)
    assert front_end._admission.samples == 0


def test_deadlines(front_end: FrontEnd, engine: Engine, device: FakeSegments):
    with pytest.raises(DeadlineExceeded):
        front_end.submit(samples(1), deadline_ms=-1)
    fill_the_slots(front_end, engine, device)
    unsent = front_end.submit(samples(1), deadline_ms=20)
    timely = front_end.submit(samples(2), deadline_ms=1000 * SOON_S)
    time.sleep(0.03)
    device.go_on()
    with pytest.raises(DeadlineExceeded, match="before the request was sent"):
        result(unsent)
    assert result(timely) == scores(2)
    device.hold()
    late = front_end.submit(samples(1), deadline_ms=50)
    time.sleep(0.1)
    device.go_on()
    with pytest.raises(DeadlineExceeded, match="the answer came too late"):
        result(late)


def test_a_cancelled_request_is_not_sent(front_end: FrontEnd, engine: Engine, device: FakeSegments):
    held = fill_the_slots(front_end, engine, device)
    given_up, kept = front_end.submit(samples(1)), front_end.submit(samples(2))
    assert given_up.cancel() and not held[0].cancel()
    device.go_on()
    assert result(kept) == scores(2)
    with pytest.raises(CancelledError):
        given_up.result()
    assert engine.stats().samples_accepted == SLOTS + 1


# --- ends


def test_closing_waits_for_answers(path: Path, engine: Engine, device: FakeSegments):
    front_end = FrontEnd(path)
    answers = [*fill_the_slots(front_end, engine, device), front_end.submit(samples(7))]
    threading.Timer(0.05, device.go_on).start()
    front_end.close()
    front_end.close()
    assert [a.result(0).tolist() for a in answers] == [scores(0), scores(1), scores(2), scores(7)]
    with pytest.raises(EngineClosed, match="the front end is closed"):
        front_end.submit(samples(1))


def test_closing_without_answers(path: Path, engine: Engine, device: FakeSegments):
    front_end = FrontEnd(path)
    lost = [*fill_the_slots(front_end, engine, device), front_end.submit(samples(1))]
    assert not front_end.is_gone
    front_end.close(drain=False)
    assert front_end.is_gone
    for answer in lost:
        with pytest.raises(EngineClosed, match="the front end is closed"):
            result(answer)
    device.go_on()
    eventually(lambda: engine.stats().queued_samples == 0)


def test_an_engine_that_is_closed_says_so(front_end: FrontEnd, engine: Engine):
    assert result(front_end.submit(samples(1))) == scores(1)
    engine.close()
    with pytest.raises(EngineClosed):
        result(front_end.submit(samples(1)))


def test_front_ends_that_are_sent_home_lose_what_they_asked_for(
    engine: Engine, device: FakeSegments, tmp_path: Path
):
    front_ends = FrontEnds(engine, tmp_path / "engine")
    front_end = FrontEnd(front_ends.path)
    lost = [*fill_the_slots(front_end, engine, device), front_end.submit(samples(1))]
    front_ends.close()
    for answer in lost:
        with pytest.raises(EngineClosed, match="sends no more answers"):
            result(answer)
    with pytest.raises(EngineClosed, match="sends no more answers"):
        front_end.submit(samples(1))
    front_end.close()
    device.go_on()
    assert engine.predict(samples(2)).tolist() == scores(2)


def test_nobody_listens(tmp_path: Path):
    with pytest.raises(OSError):
        FrontEnd(tmp_path / "engine")


def test_processes_come_and_go(path: Path, engine: Engine):
    """One is killed while it asks, which harms no other."""
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=ask_for_ever, args=(path, samples(1)))
    killed.start()
    eventually(lambda: engine.stats().requests_answered > 3)
    found = context.Queue()
    others = [
        context.Process(target=ask, args=(path, [samples(v) for v in range(i, i + 9)], found))
        for i in (0, 100)
    ]
    for other in others:
        other.start()
    killed.kill()
    answers = sorted(found.get(timeout=2 * SOON_S) for _ in others)
    assert answers == [[scores(v) for v in range(i, i + 9)] for i in (0, 100)]
    for process in (killed, *others):
        process.join(SOON_S)
    eventually(lambda: engine.stats().queued_samples == 0)
