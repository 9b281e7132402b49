"""Copies of many arrays that leave the interpreter to others: once, for all of them.

numpy would leave it for each array, and wait for it as often: beside a thread that computes, each
time for Python's switch interval. The kernel copies all in one call, process_vm_readv(2), of which
the process to read from is this one. Where there is no such call, or it is forbidden, numpy joins.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_ARRAYS = 1024  # UIO_MAXIOV of Linux: of one call


def join(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """`np.concatenate(arrays, out=out)`, of one dimension, the same dtype, each in one piece."""
    end = 0
    for first in range(0, len(arrays), MOST_ARRAYS):
        some = arrays[first : first + MOST_ARRAYS]
        start, end = end, end + sum([len(array) for array in some])
        if len(some) == 1 or not _read(some, out[start:end]):
            np.concatenate(some, out=out[start:end])


def _read(arrays: Sequence[np.ndarray], out: np.ndarray) -> bool:
    """Whether all was copied; if not, `out` may be written to in part."""
    if _READV is None:
        return False
    sources = np.array([_place(array) for array in arrays], np.uintp)
    target = np.array([_place(out)], np.uintp)
    lists = (_place(target)[0], len(target), _place(sources)[0], len(sources))
    return _READV(os.getpid(), *lists, 0) == out.nbytes


def _place(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes: a struct iovec."""
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
