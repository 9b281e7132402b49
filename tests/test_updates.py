"""Rows that change while they are read: checked on entry, whole to every batch, in their order."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import versioned
from fake_segments import FakeSegments, samples, scores
from recflow_jax.batch import InputError
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import EngineClosed, EngineError, StepFailed
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.updates import new_rows
from recflow_jax.layout import Layout
from small_models import CONCAT, FP16, INT8
from test_launcher import eventually, result

SOON_S = 30


def checked(ids: Any, values: Any, *, table: str = "items", config: Any = CONCAT) -> Any:
    return new_rows(config, Layout.of(config), table, ids, values, sizes=(4, 16))


# --- what is taken, and what is not


def test_rows_are_padded_and_of_ids_that_come_twice_the_last_counts():
    new = checked([7, 3, 7], np.arange(24).reshape(3, 8))
    base = 50  # behind the users, which share the group
    assert (new.group, new.count, len(new.rows)) == (0, 2, 4)
    assert np.asarray(new.rows).tolist() == [base + 3, base + 7, -3, -4]
    assert np.asarray(new.values)[:2].tolist() == [[*range(8, 16)], [*range(16, 24)]]


def test_the_smallest_size_that_holds_them_is_taken():
    assert [len(checked(range(n), np.zeros((n, 8))).rows) for n in (0, 4, 5, 16)] == [4, 4, 16, 16]
    assert checked([], []).count == 0


ONE = np.zeros((1, 8))
BAD = {
    "no table": ({"table": "item"}, [0], ONE, r"no table 'item' \(it has users, items, words\)"),
    "below": ({}, [0, -1], np.zeros((2, 8)), r"table 'items': id -1 is not in \[0, 31\)"),
    "above": ({}, np.array([31], np.uint64), ONE, r"id 31 is not in \[0, 31\)"),
    "no integers": ({}, [0.0], ONE, r"ids are float64\[1\], not integers \[k\]"),
    "ids of two axes": ({}, [[0]], ONE, r"ids are int64\[1, 1\]"),
    "another dim": ({}, [0], np.zeros((1, 4)), r"values are float64\[1, 4\], not floats \[k, 8\]"),
    "one axis": ({}, [0], np.zeros(8), r"values are float64\[8\]"),
    "no numbers": ({}, [0], [["x"] * 8], r"values are <U1\[1, 8\]"),
    "fewer values": ({}, [0, 1], ONE, "2 ids, 1 rows of values"),
    "too many": ({}, range(17), np.zeros((17, 8)), "17 rows, an update may have 16"),
    "not finite": ({}, [0], ONE + np.nan, r"value nan at \[0, 0\] is not a finite float32"),
    "too large": ({"config": FP16}, [0], ONE + 1e5, r"value 100000.0 .* not a finite float16"),
    "not finite, int8": ({"config": INT8}, [0], ONE + np.inf, "not a finite float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str):
    how, ids, values, message = BAD[case]
    with pytest.raises(InputError, match=message):
        checked(ids, values, **how)


def test_rows_do_not_change_unless_the_engine_was_told():
    with pytest.raises(ValueError, match="max_update_rows is 0, not a whole number above 0"):
        EngineOptions(max_update_rows=0)
    with Engine.from_segments(FakeSegments(EngineOptions(freeze_heap=False))) as engine:
        with pytest.raises(EngineError, match="max_update_rows is not set"):
            engine.update_rows("t", [1], [[0] * 4])


# --- on a device that can be held: row 1 of the fake's table, which `samples` read, is changed


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def engine(device: FakeSegments) -> Iterator[Engine]:
    with Engine.from_segments(device) as engine:
        yield engine
        device.go_on()


def update(engine: Engine, value: float) -> Future[None]:
    return engine.update_rows("t", [1], [[value] * 4])


def updated(value: float, *dense: float) -> list[list[float]]:
    """Scores of samples with one id."""
    return [[2 * (one + 10 * value)] for one in dense]


def test_what_is_submitted_after_an_update_sees_it(engine: Engine):
    for value in range(20):
        done = update(engine, value)
        assert result(engine.submit(samples(5))) == updated(value, 5)
        assert done.result(SOON_S) is None
    assert (engine.stats().updates, engine.stats().rows_updated) == (20, 20)


def test_a_batch_that_is_partly_embedded_is_read_to_its_end(engine: Engine, device: FakeSegments):
    """The second batch has a slice of old rows; what comes later is in the third, of new ones."""
    device.hold()
    first = engine.submit(samples(1))
    eventually(lambda: engine.stats().steps == 3)
    second = engine.submit(samples(2, 3))
    device.go_on()
    assert result(first) == scores(1) and result(second) == scores(2, 3)
    done = update(engine, 7)
    assert result(engine.submit(samples(4))) == updated(7, 4)
    done.result(SOON_S)


def test_a_fault_fails_its_update_alone(engine: Engine, device: FakeSegments):
    device.break_next("write")
    with pytest.raises(StepFailed, match="rows could not be written: DeviceBroke: write broke"):
        update(engine, 7).result(SOON_S)
    assert result(engine.submit(samples(1))) == scores(1)
    device.lose_next("write")
    with pytest.raises(StepFailed, match="the card fell out"):
        update(engine, 7).result(SOON_S)
    update(engine, 8).result(SOON_S)
    assert result(engine.submit(samples(1))) == updated(8, 1)
    assert engine.stats().updates == 1 and engine.stats().failed == 0


def test_a_callback_that_raises_harms_nobody(engine: Engine):
    done = update(engine, 7)
    done.add_done_callback(lambda _: exit(3))
    assert not done.cancel()
    assert result(engine.submit(samples(1))) == updated(7, 1)


def test_a_drain_writes_what_was_accepted(engine: Engine, device: FakeSegments):
    device.hold()
    answers = [engine.submit(samples(1)) for _ in range(3)]
    done = [update(engine, value) for value in range(3)]
    device.go_on()
    engine.close()
    assert all(one.result(SOON_S) is None for one in done)
    assert all(answer.done() for answer in answers)
    with pytest.raises(EngineClosed):
        update(engine, 1)


def test_an_engine_closed_at_once_ends_every_update(engine: Engine, device: FakeSegments):
    """Those that wait for a batch, those in its mail, and those in flight: none hangs."""
    device.hold()
    engine.submit(samples(*range(16)))
    done = [update(engine, value) for value in range(50)]
    threading.Timer(0.05, device.go_on).start()
    engine.close(drain=False)
    outcomes = {type(one.exception(SOON_S)) for one in done}
    assert outcomes <= {EngineClosed, type(None)}


# --- on a real device


def test_no_read_is_torn_and_versions_ascend():
    """Thousands of requests on several threads, while all rows change again and again."""
    with versioned.engine() as engine, ThreadPoolExecutor(4) as pool:
        written, stop = [0], threading.Event()

        def ask(seed: int) -> list[int]:
            seen = []
            while not stop.is_set():
                least = written[0]
                found = versioned.version_in(engine.predict(versioned.batch(1 + seed, seed)))
                assert found >= least
                seen.append(found)
            return seen

        asking = [pool.submit(ask, seed) for seed in range(4)]
        for version in range(1, 301):
            engine.update_rows("t", **versioned.all_rows(version))
            assert versioned.version_in(engine.predict(versioned.batch(3))) == version
            written[0] = version
        stop.set()
        found = [future.result(SOON_S) for future in asking]
    for seen in found:
        assert all(a <= b for a, b in pairwise(seen)) and len({*seen}) > 20
    assert engine.stats().failed == 0 and engine.stats().updates == 300


def test_a_request_of_many_slices_is_of_one_version():
    """Sixteen samples are four slices, forty are three batches, and the updates come between."""
    with versioned.engine() as engine:
        asked = []
        for version in range(1, 200):
            asked.append(engine.submit(versioned.batch(16 if version % 4 else 40, version)))
            engine.update_rows("t", **versioned.all_rows(version))
        found = [versioned.version_in(answer.result(SOON_S)) for answer in asked]
    assert all(version >= before for before, version in enumerate(found))
