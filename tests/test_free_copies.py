"""Copies are right, with and without the kernel's help, and leave the interpreter to others."""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import pytest

from computing import PATIENCE_S, computing
from recflow_jax.engine import free_copies
from recflow_jax.engine.copy_threads import copy_by
from recflow_jax.engine.free_copies import MOST_ARRAYS, join, join_if_same

LONG = 2**20


def numbers(length: int, dtype: str = "int32") -> np.ndarray:
    array = np.random.default_rng(length).integers(0, 1000, length).astype(dtype)
    array.setflags(write=False)
    return array


@pytest.fixture(params=["threads", "kernel", "no such call", "refused", "cut short"])
def help_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who copies, or what becomes of the call."""
    copy = copy_by(2) if request.param == "threads" else None
    monkeypatch.setattr(free_copies.copy_threads, "copy", lambda: copy)
    outcomes = {"refused": lambda *_: -1, "cut short": lambda *_: 4, "no such call": None}
    if request.param in outcomes:
        monkeypatch.setattr(free_copies, "_READV", outcomes[request.param])
    elif free_copies._READV is None and copy is None:
        pytest.skip("process_vm_readv is Linux's")
    return request.param


@pytest.mark.usefixtures("help_of")
@pytest.mark.parametrize(
    "lengths", [[0], [3], [LONG, 0, 1, LONG], [5] * (MOST_ARRAYS // 2), [5] * MOST_ARRAYS]
)
def test_arrays_are_joined(lengths: Sequence[int]):
    """Each kind in its place, and nothing around it."""
    kinds = {
        dtype: [numbers(length, dtype) for length in lengths] for dtype in ("int32", "float32")
    }
    around = {dtype: np.full(sum(lengths) + 2, -1, dtype) for dtype in kinds}
    join(*[(arrays, around[dtype][1:-1]) for dtype, arrays in kinds.items()])
    for dtype, arrays in kinds.items():
        np.testing.assert_array_equal(around[dtype], np.concatenate([[-1], *arrays, [-1]]))


@pytest.mark.usefixtures("help_of")
@pytest.mark.parametrize("length", [0, 1, 7, LONG])
def test_arrays_are_joined_if_others_are_the_same(length: int):
    known, source, out = numbers(length, "int64"), numbers(5), np.zeros(5, np.int32)
    assert join_if_same(known.copy(), known, ([source], out))
    np.testing.assert_array_equal(out, source)
    for place in {0, length // 2, length - 1} if length else ():
        found = known.copy()
        found[place] += 1 << 40
        assert not join_if_same(found, known, ([source], out))


@pytest.mark.parametrize("help_of", ["threads", "kernel"], indirect=True)
@pytest.mark.usefixtures("help_of")
def test_others_help_where_they_can(monkeypatch: pytest.MonkeyPatch):
    arrays, out = [numbers(LONG), numbers(LONG)], np.zeros(2 * LONG, np.int32)
    monkeypatch.setattr(free_copies.held_copies, "join", pytest.fail)
    join((arrays, out))


@pytest.mark.parametrize("help_of", ["threads", "kernel"], indirect=True)
@pytest.mark.usefixtures("help_of")
def test_another_thread_gets_its_turn_and_gives_it_back_once():
    """numpy would wait for it once for each array, numba once for each operation on arrays."""
    arrays, out = [numbers(LONG)] * 8, np.zeros(8 * LONG, np.int32)
    tooks_s, turns = [], 0
    with computing() as count:
        for _ in range(5):
            before, started_s = count(), time.perf_counter()
            join((arrays, out))
            tooks_s.append(time.perf_counter() - started_s)
            turns += count() > before
    assert turns  # not each time, where no core is to spare
    assert max(tooks_s) < len(arrays) / 2 * PATIENCE_S
    assert statistics.median(tooks_s) < 2.5 * PATIENCE_S
