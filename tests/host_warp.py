"""Executes a tile function for the lanes of one or more warps in step, on the host, strictly.

A value is an array with one element per lane. Lanes may leave a loop one by one. Loads and stores
outside an operand, an operation of a whole warp that some of its lanes do not come to, and shared
memory that is read before its writer was waited for are errors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from host_simt import Memory

LANES = 32


class HostWarp:
    """The WarpSimt protocol on numpy arrays [lanes]. `shared_bytes`: what the block has."""

    def __init__(self, memory: Memory, shared_bytes: int, lanes: int = LANES):
        self.memory = memory
        self.lanes = lanes
        self.active = np.ones(lanes, bool)
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.readable = np.zeros(shared_bytes, bool)

    def constant(self, value: int) -> np.ndarray:
        return np.full(self.lanes, value, np.int64)

    def equal(self, a: np.ndarray, b: Any) -> np.ndarray:
        return a == b

    def wide(self, value: np.ndarray) -> np.ndarray:
        fits = (-(2**31) <= value) & (value < 2**31)
        assert fits[self.active].all(), f"{value} overflowed 32 bits"
        return value

    def to_float(self, value: np.ndarray) -> np.ndarray:
        return value.astype(np.float32)

    def float_constant(self, value: float) -> np.ndarray:
        return np.full(self.lanes, value, np.float32)

    def select(self, where: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
        return np.where(where, yes, no)

    def while_(
        self, condition: Callable[..., Any], body: Callable[..., Sequence[Any]], carry: Sequence
    ) -> list[Any]:
        carry, before = list(carry), self.active
        while (going := before & self.active & condition(*carry)).any():
            self.active = going
            after = body(*carry)
            carry = [np.where(going, new, old) for new, old in zip(after, carry, strict=True)]
        self.active = before
        return carry

    def _together(self) -> None:
        warps = self.active.reshape(-1, LANES)
        assert (warps.all(1) | ~warps.any(1)).all(), "lanes of a warp are missing"

    def load_word(self, address: np.ndarray) -> np.ndarray:
        return self.load_words(address, 1)[0]

    def load_words(self, address: np.ndarray, words: int) -> list[np.ndarray]:
        return self.load_words_if(address, words, self.active)

    def load_words_if(self, address: np.ndarray, words: int, where: np.ndarray) -> list[np.ndarray]:
        loaded = np.zeros((self.lanes, words), np.int32)
        for lane in np.flatnonzero(where & self.active):
            loaded[lane] = self._words(self.memory.bytes_at(int(address[lane]), 4 * words))
        return list(loaded.T)

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return exact.astype(np.float32)

    def unpack(self, word: np.ndarray, dtype: str) -> list[np.ndarray]:
        items = word.astype(np.int32).view(jnp.dtype(dtype)).astype(np.float32)
        return list(items.reshape(self.lanes, -1).T)

    def pack(self, values: Sequence[np.ndarray], dtype: str) -> np.ndarray:
        items = np.stack([value.astype(jnp.dtype(dtype)) for value in values], axis=1)
        return np.ascontiguousarray(items).view(np.int32).reshape(self.lanes)

    def _words(self, raw: np.ndarray) -> np.ndarray:
        return raw.copy().view(np.int32)

    def load_shared(self, address: np.ndarray, words: int) -> list[np.ndarray]:
        places = [self._place(a, 4 * words) for a in address]
        assert self.active.all(), "lanes that do not load are not told apart"
        assert all(self.readable[place].all() for place in places), "read before a sync"
        return list(np.stack([self._words(self.shared[place]) for place in places]).T)

    def _place(self, address: Any, size: int) -> slice:
        start = int(address)
        assert 0 <= start and start + size <= len(self.shared), f"shared byte {start}"
        assert start % size == 0, f"shared address {start} is not aligned to {size}"
        return slice(start, start + size)

    def store(self, address: np.ndarray, words: Sequence[np.ndarray], where: np.ndarray) -> None:
        for lane in np.flatnonzero(where & self.active):
            raw = self._raw(words, lane)
            self.memory.bytes_at(int(address[lane]), len(raw))[:] = raw

    def store_shared(
        self, address: np.ndarray, words: Sequence[np.ndarray], where: np.ndarray
    ) -> None:
        for lane in np.flatnonzero(where & self.active):
            self._put(address[lane], self._raw(words, lane))

    def _raw(self, words: Sequence[np.ndarray], lane: Any) -> np.ndarray:
        parts = [word[lane : lane + 1] for word in words]
        bits = [part if part.dtype == np.float32 else part.astype(np.int32) for part in parts]
        return np.concatenate([part.view(np.uint8) for part in bits])

    def store_shared_half(
        self, address: np.ndarray, value: np.ndarray, dtype: str, where: np.ndarray
    ) -> None:
        halves = value.astype(jnp.dtype(dtype))
        for lane in np.flatnonzero(where & self.active):
            self._put(address[lane], halves[lane : lane + 1].view(np.uint8))

    def _put(self, address: Any, raw: np.ndarray) -> None:
        place = self._place(address, len(raw))
        self.shared[place] = raw
        self.readable[place] = False

    def sync_warp(self) -> None:
        self._together()
        self.readable[:] = True

    def sync_warpgroup(self) -> None:
        assert self.active.all() and self.lanes == 4 * LANES, "a barrier that hangs"
        self.readable[:] = True

    def shuffle_xor(self, value: np.ndarray, lanes: int) -> np.ndarray:
        self._together()
        return value.reshape(-1, LANES)[:, np.arange(LANES) ^ lanes].reshape(-1)

    def count_up(self, address: np.ndarray, where: np.ndarray) -> np.ndarray:
        before = np.full(self.lanes, -1, np.int64)
        for lane in np.flatnonzero(where & self.active):
            counter = self.memory.bytes_at(int(address[lane]), 4).view(np.int32)
            before[lane] = counter[0]
            counter += 1
        return before

    def of_first_lane(self, value: np.ndarray) -> np.ndarray:
        self._together()
        return np.repeat(value.reshape(-1, LANES)[:, 0], LANES)

    def mma(
        self,
        left: Sequence[np.ndarray],
        right: Sequence[np.ndarray],
        sums: Sequence[np.ndarray],
        dtype: str,
    ) -> list[np.ndarray]:
        """PTX ISA, matrix fragments for mma.m16n8k16: lane 4 * g + t."""
        self._together()
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
