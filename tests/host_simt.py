"""Executes one GPU thread of a tile function on the host, strictly.

Loads and stores outside an operand, reads of shared memory while a copy is on its way there, and
copies that overwrite unread data in flight are errors, as they would be races on a GPU. Shared
memory that no copy wrote reads as NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


class Memory:
    """Global memory: arrays at made-up addresses, far apart."""

    def __init__(self) -> None:
        self._places: list[tuple[int, np.ndarray]] = []

    def place(self, array: np.ndarray) -> int:
        """The address of a byte view of `array` (kept, not copied)."""
        base = (len(self._places) + 1) << 40
        self._places.append((base, array.reshape(-1).view(np.uint8)))
        return base

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        base, data = self._places[(address >> 40) - 1]
        start = address - base
        assert 0 <= start and start + size <= len(data), f"byte {start} of {len(data)}"
        assert address % size == 0, f"address {address} is not aligned to {size}"
        return data[start : start + size]


class HostSimt:
    """The Simt protocol on plain Python numbers. claims: what the warp's first lane, which runs
    first, has counted; the other lanes read it there.
    """

    def __init__(self, memory: Memory, claims: list[int] | None = None):
        self.memory = memory
        self.claims = [] if claims is None else claims
        self.claims_read = 0
        self.shared: dict[int, np.ndarray] = {}
        self.open: list[tuple[int, np.ndarray]] = []
        self.groups: list[list[tuple[int, np.ndarray]]] = []

    def constant(self, value: int) -> int:
        return value

    def equal(self, a: int, b: int) -> bool:
        return a == b

    def wide(self, value: int) -> int:
        assert -(2**31) <= value < 2**31, f"{value} overflowed 32 bits"
        return value

    def to_float(self, value: int) -> np.float32:
        return np.float32(value)

    def float_constant(self, value: float) -> np.float32:
        return np.float32(value)

    def select(self, where: bool, yes: Any, no: Any) -> Any:
        return yes if where else no

    def while_(
        self, condition: Callable[..., bool], body: Callable[..., Sequence[Any]], carry: Sequence
    ) -> list[Any]:
        carry = list(carry)
        while condition(*carry):
            carry = list(body(*carry))
        return carry

    def load_word(self, address: int) -> int:
        return int(self.memory.bytes_at(address, 4).view(np.int32)[0])

    def load_shared(self, address: int, words: int) -> list[int]:
        return [int(word) for word in self._landed(address, words * 4).view(np.int32)]

    def load_shared_float(self, address: int) -> np.float32:
        return self._landed(address, 4).view(np.float32)[0]

    def fma(self, a: np.float32, b: np.float32, c: np.float32) -> np.float32:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    def _landed(self, address: int, size: int) -> np.ndarray:
        flying = {target for group in [self.open, *self.groups] for target, _ in group}
        assert address not in flying, "read before the copy was waited for"
        data = self.shared.pop(address, None)
        if data is None:
            return np.full(size // 4, np.nan, np.float32).view(np.uint8)
        assert len(data) == size, "read of another size than what was written"
        return data

    def store(self, address: int, words: Sequence[Any], where: bool) -> None:
        if where:
            raw = np.concatenate([self._bits(word).reshape(1).view(np.uint8) for word in words])
            self.memory.bytes_at(address, len(raw))[:] = raw

    def _bits(self, word: Any) -> np.ndarray:
        return np.asarray(word, np.int32 if isinstance(word, int) else None)

    def count_up(self, address: int, where: bool) -> int:
        if not where:
            return -1
        counter = self.memory.bytes_at(address, 4).view(np.int32)
        self.claims.append(int(counter[0]))
        counter += 1
        return self.claims[-1]

    def of_first_lane(self, value: int) -> int:
        self.claims_read += 1
        return self.claims[self.claims_read - 1]

    def copy_async(self, target: int, source: int, size: int, where: bool) -> None:
        if where:
            assert target not in self.shared, "copy over a row that was not read yet"
            self.open.append((target, self.memory.bytes_at(source, size).copy()))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            self.shared.update(self.groups.pop(0))

    def unpack(self, word: int, dtype: str) -> list[np.float32]:
        return list(np.array([word], np.int32).view(jnp.dtype(dtype)).astype(np.float32))

    def pack(self, values: Sequence[np.float32], dtype: str) -> np.ndarray:
        return np.array(values, np.float32).astype(jnp.dtype(dtype)).view(np.int32)
