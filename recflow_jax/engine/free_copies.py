"""Copies of many arrays that leave the interpreter to others: once, for all of them.

numpy would leave it for each array, and wait for it as often: beside a thread that computes, each
time for Python's switch interval. The kernel copies all in one call, process_vm_readv(2), of which
the process to read from is this one. Where there is no such call, or it is forbidden, the copies
keep the interpreter; where there is one array only, numpy's copy is faster.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recflow_jax.engine import held_copies

MOST_ARRAYS = 1024  # UIO_MAXIOV of Linux: of one call


def join(*joins: tuple[Sequence[np.ndarray], np.ndarray]) -> None:
    """`np.concatenate(arrays, out=out)` of each (arrays, out), of one dimension and the same dtype,
    each in one piece.
    """
    sources = [array for arrays, _ in joins for array in arrays]
    if len(sources) > len(joins) and _read(sources, [out for _, out in joins]):
        return
    for arrays, out in joins:
        held_copies.join(arrays, out)


def _read(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> bool:
    """Whether all bytes were copied, in order; if not, some may be."""
    if _READV is None or len(sources) > MOST_ARRAYS:
        return False
    vectors = [_places(targets), _places(sources)]
    (into, intos), (of, ofs) = ((_place(vector)[0], len(vector)) for vector in vectors)
    return _READV(os.getpid(), into, intos, of, ofs, 0) == sum([one.nbytes for one in targets])


def _places(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Of each a struct iovec."""
    return np.array([_place(array) for array in arrays], np.uintp)


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
