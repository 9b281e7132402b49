"""Copies of arrays that keep the interpreter for themselves.

numpy leaves it to other threads while it copies more than `UNSEEN` elements, and gets it back when
these let go: beside a thread that computes, after Python's switch interval. That is far longer than
what is copied for a request takes, and comes once for each array.
"""

from collections.abc import Sequence

import numpy as np

UNSEEN = 500  # NPY_BEGIN_THREADS_THRESHOLDED of numpy's sources


def copy(array: np.ndarray, out: np.ndarray) -> None:
    """`out[:] = array`, of one dimension, of the same dtype and length."""
    memoryview(out)[:] = memoryview(array)


def kept(array: np.ndarray) -> np.ndarray:
    """A copy, unless it is in one piece and nobody writes to it."""
    if not array.flags.writeable and array.flags.c_contiguous:
        return array
    kept = np.empty(array.shape, array.dtype)
    copy(array.reshape(-1), kept.reshape(-1))
    return kept


def join(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """`np.concatenate(arrays, out=out)`, of one dimension and the same dtype."""
    if len(out) <= UNSEEN * len(arrays):
        np.concatenate(arrays, out=out)
        return
    target, end = memoryview(out), 0
    for array in arrays:
        start, end = end, end + len(array)
        target[start:end] = memoryview(array)


def side_by_side(columns: Sequence[np.ndarray]) -> np.ndarray:
    """`np.concatenate(columns, axis=1)`, of two dimensions: a row of each at a time, which numpy
    takes for one element.
    """
    rows, dtypes = len(columns[0]), {column.dtype for column in columns}
    widest = max(column.shape[1] for column in columns)
    are_rows = all(column.flags.c_contiguous and column.shape[1] for column in columns)
    if rows * widest <= UNSEEN or len(dtypes) > 1 or not are_rows:
        return np.concatenate(columns, axis=1)
    (dtype,), end = dtypes, 0
    out = np.empty((rows, sum(column.shape[1] for column in columns)), dtype)
    for column in columns:
        start, end = end, end + column.shape[1]
        whole = np.dtype((np.void, column.shape[1] * dtype.itemsize))
        source = column.view(whole)[:, 0]
        target = np.ndarray(rows, whole, out, start * dtype.itemsize, out.strides[:1])
        for first in range(0, rows, UNSEEN):
            target[first : first + UNSEEN] = source[first : first + UNSEEN]
    return out
