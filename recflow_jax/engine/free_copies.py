"""Copies of many arrays that leave the interpreter to others: once, for all of them.

numpy would leave it for each array, and wait for it as often: beside a thread that computes, each
time for Python's switch interval. Threads of `copy_threads` copy all at once. Where there are none,
the kernel does in one call, process_vm_readv(2), of which the process to read from is this one;
but of one array numpy's copy is faster. Where there is no such call, or it is forbidden, the copies
keep the interpreter.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recflow_jax.engine import copy_threads, held_copies

MOST_ARRAYS = 1024  # UIO_MAXIOV of Linux: of one call

Join = tuple[Sequence[np.ndarray], np.ndarray]


def join(*joins: Join) -> None:
    """`np.concatenate(arrays, out=out)` of each (arrays, out), of one dimension and the same dtype,
    each in one piece.
    """
    sources, targets = _sides(joins)
    copy = copy_threads.copy()
    if copy is not None:
        copy(_places(targets), _places(sources), copy_threads.NOTHING)
    elif len(sources) == len(joins):
        for arrays, out in joins:
            np.concatenate(arrays, out=out)
    elif not _read(_places(targets), _places(sources)):
        for arrays, out in joins:
            held_copies.join(arrays, out)


def join_if_same(found: np.ndarray, known: np.ndarray, *joins: Join) -> bool:
    """`join`, if two arrays of the same type and length, each in one piece, have the same items,
    and whether they have; if not, anything may have been written where these were to be joined.
    """
    copy = copy_threads.copy()
    if copy is not None:
        sources, targets = _sides(joins)
        compared = (_place(found)[0], *_place(known))
        return copy(_places(targets), _places(sources), compared)
    is_same = np.array_equal(found, known)
    if is_same:
        join(*joins)
    return is_same


def _sides(joins: Sequence[Join]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What is read, and what is written."""
    return [array for arrays, _ in joins for array in arrays], [out for _, out in joins]


def _read(targets: np.ndarray, sources: np.ndarray) -> bool:
    """Whether all bytes were copied, in order; if not, some may be."""
    if _READV is None or len(sources) > MOST_ARRAYS:
        return False
    into, of = _place(targets)[0], _place(sources)[0]
    copied = _READV(os.getpid(), into, len(targets), of, len(sources), 0)
    return copied == int(targets[:, 1].sum())


def _places(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [arrays, 2]: of each a struct iovec."""
    return np.array([_place(array) for array in arrays], np.int64).reshape(-1, 2)


def _place(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes."""
    return array.__array_interface__["data"][0], array.nbytes


def _readv() -> Any:
    """process_vm_readv; None where the C library has none."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if call is not None:
        vector = (ctypes.c_void_p, ctypes.c_ulong)
        call.argtypes = (ctypes.c_int, *vector, *vector, ctypes.c_ulong)
        call.restype = ctypes.c_ssize_t
    return call


_READV = _readv()
