"""The launcher's mail: all of it comes, in order, and wakes the launcher only where it has to."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count, cycle

import numpy as np
import pytest

from recflow_jax.engine import messages
from recflow_jax.engine.intake import new_request
from recflow_jax.engine.messages import (
    ARRIVALS_TO_WAKE,
    LONGEST_TURN_S,
    Dropped,
    Inbox,
    Message,
    Submitted,
)
from recflow_jax.engine.prepared import Prepared
from recflow_jax.engine.terms import Terms
from scheduling.host_costs import REST_STEP_US

LONG_S = 60
SOON_S = 30


def arrival(request_id: int, ids: int = 1) -> Submitted:
    samples = Prepared(
        dense=np.zeros((1, 1), np.float32),
        rows=np.zeros(ids, np.int32),
        id_offsets=np.array([0, ids]),
        slot_offsets=None,
        weights=None,
    )
    return new_request(request_id, samples, Terms(arrived_us=0))


def request_id(message: Message) -> int:
    assert isinstance(message, Submitted | Dropped)
    return message.request.id if isinstance(message, Submitted) else message.request_id


def test_messages_come_in_their_order():
    inbox, sent = Inbox(), [arrival(0), Dropped(0), arrival(1)]
    inbox.put_arrival(sent[0])
    inbox.put(sent[1])
    inbox.put_arrival(sent[2])
    assert inbox.wait(None) == sent
    assert inbox.wait(0) == []


@pytest.mark.parametrize("can_launch", [True, False])
def test_an_urgent_message_wakes_and_keeps_awake(can_launch: bool):
    inbox = Inbox()
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(inbox.wait, LONG_S, can_launch=can_launch)
        inbox.put(Dropped(7))
        assert woken.result(SOON_S) == [Dropped(7)]
        inbox.put(Dropped(8))
        awake = pool.submit(inbox.wait, LONG_S, can_launch=can_launch)
        assert awake.result(SOON_S) == [Dropped(8)]


def test_an_arrival_wakes_who_can_launch():
    inbox, request = Inbox(), arrival(0)
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(inbox.wait, LONG_S)
        inbox.put_arrival(request)
        assert woken.result(SOON_S) == [request]


def test_arrivals_wake_who_cannot_launch_only_together():
    inbox, requests = Inbox(), [arrival(i) for i in range(ARRIVALS_TO_WAKE)]
    for request in requests[:-1]:
        inbox.put_arrival(request)
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(inbox.wait, LONG_S, can_launch=False)
        assert not woken.done()
        inbox.put_arrival(requests[-1])
        assert woken.result(SOON_S) == requests


def test_arrivals_that_did_not_wake_are_there_afterwards():
    inbox, request = Inbox(), arrival(0)
    inbox.put_arrival(request)
    assert inbox.wait(0, can_launch=False) == [request]


@pytest.mark.parametrize(
    ("comings", "rests"), [((0, 1), 0), ((2, 1, 0, 1), 2), ((1, 0, 1), 1), ((1,) * 99, 10)]
)
def test_it_rests_for_so_long_but_only_while_messages_come(
    monkeypatch: pytest.MonkeyPatch, comings: tuple[int, ...], rests: int
):
    inbox, slept_us = Inbox(), []

    def come() -> None:
        for _ in range(comings[len(slept_us)]):
            inbox.put(Dropped(len(slept_us)))

    def sleep(seconds: float) -> None:
        slept_us.append(round(1e6 * seconds))
        come()

    come()
    monkeypatch.setattr(messages.time, "sleep", sleep)
    monkeypatch.setattr(messages, "now_us", lambda: sum(slept_us))
    inbox.rest(10 * REST_STEP_US)
    assert slept_us == [REST_STEP_US] * rests


def test_it_rests_while_a_caller_makes_a_request(monkeypatch: pytest.MonkeyPatch):
    inbox, slept_us, caller = Inbox(), [], ExitStack()

    def sleep(seconds: float) -> None:
        slept_us.append(round(1e6 * seconds))
        if len(slept_us) == 3:
            caller.close()

    monkeypatch.setattr(messages.time, "sleep", sleep)
    monkeypatch.setattr(messages, "now_us", lambda: sum(slept_us))
    inbox.caller_enters()
    caller.callback(inbox.caller_leaves)
    inbox.rest(10 * REST_STEP_US)
    assert slept_us == [REST_STEP_US] * 3


def test_it_rests_no_longer_than_until_a_large_request_is_there(monkeypatch: pytest.MonkeyPatch):
    inbox, slept_us = Inbox(), []
    monkeypatch.setattr(messages, "LARGE_IDS", 5)

    def sleep(seconds: float) -> None:
        slept_us.append(round(1e6 * seconds))
        inbox.put_arrival(arrival(len(slept_us), ids=4 + len(slept_us) // 2))

    monkeypatch.setattr(messages.time, "sleep", sleep)
    monkeypatch.setattr(messages, "now_us", lambda: sum(slept_us))
    inbox.put(Dropped(0))
    inbox.rest(10 * REST_STEP_US)
    assert slept_us == [REST_STEP_US] * 2
    inbox.rest(10 * REST_STEP_US)
    assert len(inbox.read()) == 3
    inbox.put(Dropped(0))
    inbox.rest(REST_STEP_US)
    assert slept_us == [REST_STEP_US] * 3


def test_a_caller_waits_for_what_is_being_launched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    inbox, launching = Inbox(), ExitStack()
    launching.enter_context(inbox.launching())
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(_call, inbox)
        time.sleep(0.01)
        assert not called.done()
        launching.close()
        assert called.result(SOON_S) < SOON_S


def test_a_launcher_waits_for_who_berths_and_callers_for_the_launch(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    inbox, launched = Inbox(), threading.Event()

    def launch() -> bool:
        with inbox.launching():
            launched.set()
            with inbox.aside():
                assert not inbox.has_berths
            return inbox.has_berths

    with ThreadPoolExecutor(1) as pool:
        inbox.caller_enters()
        assert inbox.may_berth()
        launch_ = pool.submit(launch)
        assert not launched.wait(0.02)
        inbox.leave_berths()
        assert launch_.result(SOON_S)
        assert not inbox.has_berths
        assert inbox.may_berth()


def test_nobody_waits_long_for_who_berths_and_hangs():
    inbox = Inbox()
    assert inbox.may_berth()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(inbox.may_berth).result(SOON_S)

        def launch() -> list[bool]:
            with inbox.launching():
                before = inbox.has_berths
                with inbox.aside():
                    pass
                return [before, inbox.has_berths]

        assert pool.submit(launch).result(SOON_S) == [False, False]
        inbox.leave_berths()
        assert pool.submit(launch).result(SOON_S) == [True, True]


def test_callers_go_on_while_a_launch_is_aside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    monkeypatch.setattr(messages, "now_us", partial(next, count(0, 7)))
    inbox = Inbox()
    with ThreadPoolExecutor(1) as pool, inbox.launching():
        with inbox.aside():
            assert pool.submit(_call, inbox).result(SOON_S) < SOON_S / 2
        with pytest.raises(ZeroDivisionError), inbox.aside():
            _ = 1 / 0
        called = pool.submit(_call, inbox)
        time.sleep(0.01)
        assert not called.done()
    assert called.result(SOON_S) < SOON_S
    assert (inbox.take_aside_us(), inbox.take_aside_us()) == (14, 0)


def test_callers_wait_for_all_of_a_launch_where_it_is_crowded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    inbox = Inbox()
    inbox.is_crowded = True
    with ThreadPoolExecutor(1) as pool:
        with inbox.launching():
            with inbox.aside():
                called = pool.submit(_call, inbox)
                time.sleep(0.01)
                assert not called.done()
        assert called.result(SOON_S) < SOON_S
    assert inbox.take_aside_us() == 0


def test_it_does_not_rest_where_it_is_crowded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages.time, "sleep", pytest.fail)
    inbox = Inbox()
    inbox.is_crowded = True
    inbox.put(Dropped(0))
    inbox.rest(10 * REST_STEP_US)


def test_a_caller_does_not_wait_for_a_launch_that_hangs():
    inbox = Inbox()
    with inbox.launching(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(_call, inbox).result(SOON_S) >= LONGEST_TURN_S
        assert pool.submit(_call, inbox).result(SOON_S) >= LONGEST_TURN_S


def test_who_launches_may_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "LONGEST_TURN_S", SOON_S)
    inbox = Inbox()
    with inbox.launching():
        assert _call(inbox) < SOON_S


def _call(inbox: Inbox) -> float:
    """How long that takes, in seconds."""
    started = time.perf_counter()
    try:
        inbox.caller_enters()
        return time.perf_counter() - started
    finally:
        inbox.caller_leaves()


def test_it_does_not_rest_where_no_rest_is_due(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages.time, "sleep", pytest.fail)
    inbox = Inbox()
    inbox.put(Dropped(0))
    inbox.rest(0)
    inbox.rest(-1000)


def test_nothing_is_lost_or_doubled_between_many_threads():
    """The taker sleeps between messages, now waiting for arrivals too, now not."""
    inbox, threads, each = Inbox(), 4, 500

    def send(first: int) -> None:
        for i in range(first, first + each):
            inbox.put(Dropped(i)) if i % 7 == 0 else inbox.put_arrival(arrival(i))

    senders = [threading.Thread(target=send, args=(each * i,)) for i in range(threads)]
    for sender in senders:
        sender.start()
    seen: list[int] = []
    started = time.monotonic()
    for can_launch in cycle((True, False)):
        last = inbox.wait(LONG_S if can_launch else 0.001, can_launch=can_launch)
        seen += [request_id(message) for message in last]
        if len(seen) == threads * each:
            break
    assert time.monotonic() - started < SOON_S
    for sender in senders:
        sender.join()
    assert sorted(seen) == [*range(threads * each)]
    assert all(
        [i for i in seen if i // each == sender] == sorted(i for i in seen if i // each == sender)
        for sender in range(threads)
    )
