"""Memory that a front end shares with its engine's process: a few slots, a bundle in each.

A front end writes samples there and reads scores; the engine's process reads samples and writes
scores. Where bags are fixed, the ids of a bundle lie in a berth of the engine's, from which the
device reads them: nobody copies them once more. The engine checks what it reads. A front end is
trusted to leave a slot alone from when it asks until it is answered, and that is all: of its own
scores it would spoil what it likes, but in a berth lies also what the engine put around its ids.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.engine import free_copies
from recflow_jax.engine.berths import AROUND, Berth
from recflow_jax.engine.fixed_bags import bag_offsets
from recflow_jax.engine.pinned import pin
from recflow_jax.remote.wire import Ask, Greeting, ProtocolError

SLOTS = 3  # one runs, one waits behind it, one is filled
ALIGNED = 4096


@dataclass(frozen=True, kw_only=True)
class Samples:
    """`n` samples of which a front end has a copy, checked. dense: float32 [n, dense_width].
    values: int32 [ids]. offsets: int64 [n * features + 1], or None where all bags are as
    `DLRMConfig.fixed_bags` says. weights: float32 [ids], or None where no feature is weighted.
    """

    dense: np.ndarray
    values: np.ndarray
    offsets: np.ndarray | None
    weights: np.ndarray | None

    @property
    def count(self) -> int:
        """n."""
        return len(self.dense)


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """Room for `samples` samples of a model with `ids` ids in all, of which a slice has a buffer of
    `length` int32 elements.
    """

    config: DLRMConfig
    samples: int
    ids: int
    length: int

    @classmethod
    def of(cls, config: DLRMConfig, greeting: Greeting) -> Self:
        """Of the bundles that an engine takes, as it greets."""
        room = {"samples": greeting.samples, "ids": greeting.ids, "length": greeting.length}
        return cls(config=config, **room)

    @cached_property
    def places(self) -> dict[str, slice]:
        """The bytes of a slot that each field takes."""
        config = self.config
        sizes = {
            "berth": 4 * (AROUND + self.length + AROUND),
            "dense": 4 * self.samples * config.dense_width,
            "weights": 4 * self.ids if config.weighted else 0,
            "offsets": 8 * (self.samples * len(config.features) + 1),
            "scores": 4 * self.samples * config.outputs,
        }
        rooms = {name: -(-size // ALIGNED) * ALIGNED for name, size in sizes.items()}
        ends = accumulate(rooms.values())
        places = {
            name: slice(end - rooms[name], end) for name, end in zip(rooms, ends, strict=True)
        }
        return places | {"values": slice(4 * AROUND, 4 * (AROUND + self.ids))}

    @property
    def slot_bytes(self) -> int:
        """Of a slot."""
        return self.places["scores"].stop

    @cached_property
    def fixed_offsets(self) -> np.ndarray:
        """int64: of as many samples with fixed bags; not to be written to."""
        offsets = bag_offsets(self.config.fixed_bags or (), self.samples)
        offsets.setflags(write=False)
        return offsets


class Arena:
    """The slots of one front end, in memory that a handle stands for."""

    def __init__(self, shape: BundleShape, handle: int) -> None:
        """Raises ProtocolError for a handle of too little memory, or of memory that could become
        less, which would end a process that reads it; takes no hold of the handle.
        """
        size = SLOTS * shape.slot_bytes
        if os.fstat(handle).st_size < size:
            raise ProtocolError(f"an arena of {os.fstat(handle).st_size} bytes, not {size}")
        if not _is_sealed(handle):
            raise ProtocolError("an arena that could become smaller")
        self._shape = shape
        self._memory = np.frombuffer(mmap.mmap(handle, size), np.uint8)

    @classmethod
    def new(cls, shape: BundleShape) -> tuple[Self, int]:
        """An arena of zeros and its handle, which is the caller's to close."""
        handle = os.memfd_create("recflow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(handle, SLOTS * shape.slot_bytes)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return cls(shape, handle), handle
        except BaseException:
            os.close(handle)
            raise

    def pin(self) -> None:
        """In the engine's process, whose device may read from it."""
        pin(self._memory)

    def berth(self, slot: int) -> Berth:
        """That of the next bundle there."""
        return Berth(self._field(slot, "berth", np.int32))

    def write(self, slot: int, bundle: Sequence[Samples]) -> tuple[int, int, bool]:
        """The samples, one after the other: how many, of how many ids, and whether all bags are
        fixed.
        """
        fields = [
            ("dense", [s.dense.reshape(-1) for s in bundle]),
            ("values", [s.values for s in bundle]),
            ("weights", [s.weights for s in bundle if s.weights is not None]),
        ]
        are_fixed = all(s.offsets is None for s in bundle)
        if not are_fixed:
            fields.append(("offsets", [self._offsets(bundle)]))
        joins = [
            (arrays, self._field(slot, name, arrays[0].dtype)[: sum(map(len, arrays))])
            for name, arrays in fields
            if arrays
        ]
        free_copies.join(*joins)
        return sum(s.count for s in bundle), sum(len(s.values) for s in bundle), are_fixed

    def floats(self, ask: Ask) -> tuple[np.ndarray, np.ndarray | None]:
        """Dense features and weights of the samples that somebody asks about, not to be written to.
        Raises ProtocolError.
        """
        shape, config = self._shape, self._shape.config
        if ask.slot >= SLOTS or not 0 < ask.samples <= shape.samples or ask.ids > shape.ids:
            raise ProtocolError(f"no slot holds this: {ask}")
        fixed = config.fixed_bags
        if ask.are_fixed and (fixed is None or ask.ids != ask.samples * sum(fixed)):
            raise ProtocolError(f"not the ids of fixed bags: {ask}")
        dense = self._field(ask.slot, "dense", np.float32)[: ask.samples * config.dense_width]
        weights = self._field(ask.slot, "weights", np.float32)[: ask.ids]
        for array in (dense, weights):
            array.setflags(write=False)
        dense = dense.reshape(ask.samples, config.dense_width)
        return dense, weights if config.weighted else None

    def read(self, ask: Ask) -> JaggedBatch:
        """Jagged samples that somebody asks about, as they are now. Raises ProtocolError."""
        dense, weights = self.floats(ask)
        bags = ask.samples * len(self._shape.config.features)
        return JaggedBatch(
            dense=dense,
            values=self._field(ask.slot, "values", np.int32)[: ask.ids],
            offsets=self._field(ask.slot, "offsets", np.int64)[: bags + 1],
            weights=weights,
        ).frozen()

    def scores(self, slot: int, samples: int) -> np.ndarray:
        """float32 [samples, outputs]."""
        outputs = self._shape.config.outputs
        return self._field(slot, "scores", np.float32)[: samples * outputs].reshape(-1, outputs)

    def _offsets(self, bundle: Sequence[Samples]) -> np.ndarray:
        offsets, ids = [np.zeros(1, np.int64)], 0
        features = len(self._shape.config.features)
        for samples in bundle:
            own = samples.offsets
            if own is None:
                own = self._shape.fixed_offsets[: samples.count * features + 1]
            offsets.append(own[1:] + ids)
            ids += len(samples.values)
        return np.concatenate(offsets)

    def _field(self, slot: int, name: str, dtype: np.typing.DTypeLike) -> np.ndarray:
        start, place = slot * self._shape.slot_bytes, self._shape.places[name]
        return self._memory[start + place.start : start + place.stop].view(dtype)


def _is_sealed(handle: int) -> bool:
    try:
        return bool(fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # a file, which can be cut
        return False
