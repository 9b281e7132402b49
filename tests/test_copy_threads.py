"""Copies by several threads are byte for byte those of one, wherever the cuts are."""

import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow_jax.engine import copy_threads
from recflow_jax.engine.copy_threads import MOST_THREADS, NOTHING, SAFE_LAYERS, copy_by, threads

lengths = st.lists(st.integers(0, 200), max_size=6)


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """What is compiled is kept for the process: not what a test made of it."""
    request.addfinalizer(copy_by.cache_clear)
    numba = pytest.importorskip("numba", reason="numba is an extra")
    copy_by(2)
    if numba.threading_layer() not in SAFE_LAYERS:
        pytest.skip(f"numba's layer here is {numba.threading_layer()}")


def places(arrays: Sequence[np.ndarray]) -> np.ndarray:
    found = [(array.ctypes.data, array.nbytes) for array in arrays]
    return np.array(found, np.int64).reshape(-1, 2)


@given(st.data(), lengths, st.integers(2, 5))
def test_bytes_arrive_in_order(data: st.DataObject, lengths: list[int], count: int):
    """More threads than bytes, empty arrays, and cuts inside each other's included."""
    copy = copy_by(count)
    assert copy is not None
    random = np.random.default_rng(sum(lengths))
    sources = [random.integers(0, 255, length).astype(np.uint8) for length in lengths]
    total = sum(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=3)))
    out = np.full(total + 2, 255, np.uint8)
    targets = [out[1 + start : 1 + stop] for start, stop in pairwise([0, *cuts, total])]
    copy(places(targets), places(sources), NOTHING)
    np.testing.assert_array_equal(out, np.concatenate([[255], *sources, [255]]))


def test_the_caller_keeps_its_number_of_threads():
    import numba

    copy, before = copy_by(2), numba.get_num_threads()
    assert copy is not None
    try:
        numba.set_num_threads(1)
        copy(places([]), places([]), NOTHING)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, 1), (4, 1), (7, 1), (8, 2), (16, 4), (128, MOST_THREADS)]
)
def test_few_cores_are_left_to_the_callers(
    cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(copy_threads, "available_cores", lambda: cores)
    assert threads() == expected


def test_nobody_copies_where_there_is_no_help(monkeypatch: pytest.MonkeyPatch):
    import numba

    assert copy_by(1) is None
    copy_by.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        assert copy_by(2) is None
    copy_by.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("numba.config.NUMBA_NUM_THREADS", 1)
        assert copy_by(2) is None
    copy_by.cache_clear()
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    assert copy_by(2) is None
