"""Copies are right, and keep the interpreter: a thread that computes does not come in between."""

import time
from collections.abc import Sequence

import numpy as np
import pytest

from computing import computing
from recflow_jax.engine.held_copies import UNSEEN, copy, join, side_by_side

LONG = 4 * UNSEEN
SLOW = 2**20  # elements that take so long to copy that others would wake up
TRIES = 5


def numbers(*shape: int, dtype: str = "int32") -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 1000, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize("length", [0, 1, LONG])
def test_a_copy(length: int, dtype: str):
    array, out = numbers(2 * length, dtype=dtype)[::2], np.zeros(length, dtype)
    array.setflags(write=False)
    copy(array, out)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("lengths", [[0], [3], [LONG], [LONG, 0, 1, LONG], [1] * 50, [0, 0]])
def test_arrays_are_joined(lengths: Sequence[int]):
    arrays = [numbers(length) for length in lengths]
    out = np.full(sum(lengths), -1, np.int32)
    join(arrays, out)
    np.testing.assert_array_equal(out, np.concatenate(arrays))


@pytest.mark.parametrize("rows", [0, 1, 3, UNSEEN - 1, UNSEEN, UNSEEN + 1, 2 * UNSEEN + 7])
@pytest.mark.parametrize("widths", [[1], [1, 1], [3, 1, 100, 2]])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_columns_are_put_side_by_side(rows: int, widths: Sequence[int], dtype: str):
    columns = [numbers(rows, width, dtype=dtype) for width in widths]
    out = side_by_side(columns)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, np.concatenate(columns, axis=1))
    assert not any(np.shares_memory(out, column) for column in columns)


def test_columns_of_other_forms_are_put_side_by_side():
    plain, empty = numbers(LONG, 3), numbers(LONG, 0)
    others = [np.asfortranarray(plain), numbers(LONG, 6)[:, ::2], numbers(LONG, 3, dtype="int64")]
    for other in [empty, *others]:
        expected = np.concatenate([plain, other, plain], axis=1)
        found = side_by_side([plain, other, plain])
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["copy", "join", "side by side"])
def test_no_other_thread_gets_its_turn(kind: str):
    columns = [numbers(UNSEEN, SLOW // UNSEEN) for _ in range(3)]
    arrays = [column.reshape(-1) for column in columns]
    whole, out = np.concatenate(arrays), np.zeros(3 * arrays[0].size, np.int32)
    acts = {
        "copy": lambda: copy(whole, out),
        "join": lambda: join(arrays, out),
        "side by side": lambda: side_by_side(columns),
    }
    others = []
    with computing() as turns:
        for _ in range(TRIES):
            time.sleep(0)
            before = turns()
            acts[kind]()
            others.append(turns() - before)
    assert np.count_nonzero(others) <= 1  # a machine may have stood still for so long
