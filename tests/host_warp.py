"""Executes a tile function for the 32 lanes of a warp in step, on the host, strictly.

A value is an array with one element per lane. Loads and stores outside an operand, lanes that part
ways at a loop, and shared memory that is read before its writer was waited for are errors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from host_simt import Memory

LANES = 32


class HostWarp:
    """The WarpSimt protocol on numpy arrays [lanes]. `shared_bytes`: what the block has."""

    def __init__(self, memory: Memory, shared_bytes: int):
        self.memory = memory
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.readable = np.zeros(shared_bytes, bool)

    def constant(self, value: int) -> np.ndarray:
        return np.full(LANES, value, np.int64)

    def wide(self, value: np.ndarray) -> np.ndarray:
        assert np.all((-(2**31) <= value) & (value < 2**31)), f"{value} overflowed 32 bits"
        return value

    def float_constant(self, value: float) -> np.ndarray:
        return np.full(LANES, value, np.float32)

    def select(self, where: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
        return np.where(where, yes, no)

    def while_(
        self, condition: Callable[..., Any], body: Callable[..., Sequence[Any]], carry: Sequence
    ) -> list[Any]:
        carry = list(carry)
        while self._together(condition(*carry)):
            carry = list(body(*carry))
        return carry

    def _together(self, condition: np.ndarray) -> bool:
        assert condition.all() or not condition.any(), "lanes part ways"
        return bool(condition[0])

    def load_words(self, address: np.ndarray, words: int) -> list[np.ndarray]:
        loaded = np.stack([self._words(self.memory.bytes_at(int(a), 4 * words)) for a in address])
        return list(loaded.T)

    def _words(self, raw: np.ndarray) -> np.ndarray:
        return raw.copy().view(np.int32)

    def load_shared(self, address: np.ndarray, words: int) -> list[np.ndarray]:
        places = [self._place(a, 4 * words) for a in address]
        assert all(self.readable[place].all() for place in places), "read before a sync"
        return list(np.stack([self._words(self.shared[place]) for place in places]).T)

    def _place(self, address: Any, size: int) -> slice:
        start = int(address)
        assert 0 <= start and start + size <= len(self.shared), f"shared byte {start}"
        assert start % size == 0, f"shared address {start} is not aligned to {size}"
        return slice(start, start + size)

    def store(self, address: np.ndarray, words: Sequence[np.ndarray], where: np.ndarray) -> None:
        for lane in np.flatnonzero(where):
            raw = self._raw(words, lane)
            self.memory.bytes_at(int(address[lane]), len(raw))[:] = raw

    def store_shared(
        self, address: np.ndarray, words: Sequence[np.ndarray], where: np.ndarray
    ) -> None:
        for lane in np.flatnonzero(where):
            self._put(address[lane], self._raw(words, lane))

    def _raw(self, words: Sequence[np.ndarray], lane: Any) -> np.ndarray:
        return np.array([word[lane] for word in words], np.int32).view(np.uint8)

    def store_shared_half(
        self, address: np.ndarray, value: np.ndarray, dtype: str, where: np.ndarray
    ) -> None:
        halves = value.astype(jnp.dtype(dtype))
        for lane in np.flatnonzero(where):
            self._put(address[lane], halves[lane : lane + 1].view(np.uint8))

    def _put(self, address: Any, raw: np.ndarray) -> None:
        place = self._place(address, len(raw))
        self.shared[place] = raw
        self.readable[place] = False

    def sync_warp(self) -> None:
        self.readable[:] = True

    def mma(
        self,
        left: Sequence[np.ndarray],
        right: Sequence[np.ndarray],
        sums: Sequence[np.ndarray],
        dtype: str,
    ) -> list[np.ndarray]:
        """PTX ISA, matrix fragments for mma.m16n8k16: lane 4 * g + t."""
        g, t = np.divmod(np.arange(LANES), 4)
        a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for index, word in enumerate(left):
            for half, value in enumerate(self._halves(word, dtype)):
                a[g + index % 2 * 8, 2 * t + half + index // 2 * 8] = value
        for index, word in enumerate(right):
            for half, value in enumerate(self._halves(word, dtype)):
                b[2 * t + half + index * 8, g] = value
        product = a @ b
        places = [(g + index // 2 * 8, 2 * t + index % 2) for index in range(4)]
        return [total + product[place] for total, place in zip(sums, places, strict=True)]

    def _halves(self, word: np.ndarray, dtype: str) -> np.ndarray:
        return word.astype(np.int32).view(jnp.dtype(dtype)).astype(np.float32).reshape(-1, 2).T
