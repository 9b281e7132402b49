"""Copies of many arrays that leave the interpreter to others: once, for all of them.

numpy would leave it for each array, and wait for it as often: beside a thread that computes, each
time for Python's switch interval. The kernel copies all in one call, process_vm_readv(2), of which
the process to read from is this one; of much, each of several threads calls it for its share. Where
there is no such call, or it is forbidden, the copies keep the interpreter; where there is one array
only and one thread, numpy's copy is faster.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recflow_jax.engine import held_copies
from recflow_jax.engine.copiers import in_shares, shares_of

MOST_ARRAYS = 1024  # UIO_MAXIOV of Linux: of one call


def join(*joins: tuple[Sequence[np.ndarray], np.ndarray]) -> None:
    """`np.concatenate(arrays, out=out)` of each (arrays, out), of one dimension and the same dtype,
    each in one piece.
    """
    sources = [array for arrays, _ in joins for array in arrays]
    targets = [out for _, out in joins]
    nbytes = sum([out.nbytes for out in targets])
    if len(sources) > len(joins) or shares_of(nbytes) > 1:
        if _read(sources, targets, nbytes):
            return
    for arrays, out in joins:
        held_copies.join(arrays, out)


def _read(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], nbytes: int) -> bool:
    """Whether all bytes were copied, in order; if not, some may be."""
    if _READV is None or len(sources) > MOST_ARRAYS:
        return False
    pid = os.getpid()

    def read(start: int, stop: int) -> bool:
        into, of = (_cut(arrays, start, stop) for arrays in (targets, sources))
        if len(into) == len(of) == 1:
            np.copyto(into[0], of[0])
            return True
        vectors = [_places(into), _places(of)]
        places = [place for vector in vectors for place in (_place(vector)[0], len(vector))]
        return _READV(pid, *places, 0) == stop - start

    return all(in_shares(read, nbytes, nbytes=nbytes))


def _cut(arrays: Iterable[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    """Bytes [start, stop) of all of these, one behind the other."""
    found, end = [], 0
    for array in arrays:
        first, end = end, end + array.nbytes
        if first < stop and start < end:
            found.append(array.view(np.uint8)[max(start - first, 0) : stop - first])
    return found


def _places(arrays: Sequence[np.ndarray]) -> np.ndarray:
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
