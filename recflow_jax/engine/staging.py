"""One slice of samples as one int32 buffer: packed on the host, unpacked on the device.

One copy to the device per slice, whatever the number of features. The buffer holds, in this order,
the rows of the tables, the weights' bits, the dense features' bits, the slots' offsets and the
first row of the batch that the slice lands at. All sizes are the bucket's; what is behind the
slice's own samples is padding: empty bags and zero dense features.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch
from scheduling.request import SliceBucket


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """Where each field of a slice lies in its buffer of `length` int32."""

    samples: int
    ids: int
    slots: int
    dense_width: int
    weighted: bool

    @classmethod
    def of(cls, config: DLRMConfig, layout: Layout, bucket: SliceBucket) -> "PackedShape":
        """The buffer of `bucket` for one model."""
        return cls(
            samples=bucket.samples,
            ids=bucket.ids,
            slots=len(layout.slots),
            dense_width=config.dense_width,
            weighted=config.weighted,
        )

    @cached_property
    def places(self) -> dict[str, slice]:
        """The run of the buffer that each field takes."""
        sizes = {
            "rows": self.ids,
            "weights": self.ids if self.weighted else 0,
            "dense": self.samples * self.dense_width,
            "offsets": self.samples * self.slots + 1,
            "first_row": 1,
        }
        ends = accumulate(sizes.values())
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    @property
    def length(self) -> int:
        """int32 elements of the buffer."""
        return self.places["first_row"].stop

    def unpack(self, packed: Int32[Array, " length"]) -> tuple[Int32[Array, ""], DeviceBatch]:
        """The first row and the samples, under jit on the device."""
        fields = {name: packed[place] for name, place in self.places.items()}
        dense = lax.bitcast_convert_type(fields["dense"], jnp.float32)
        weights = lax.bitcast_convert_type(fields["weights"], jnp.float32)
        batch = DeviceBatch(
            dense=dense.reshape(self.samples, self.dense_width),
            rows=fields["rows"],
            offsets=fields["offsets"],
            weights=weights if self.weighted else None,
        )
        return fields["first_row"][0], batch


class Staging:
    """The buffers that slices are packed into, kept for the next slice of the same bucket.

    The device may read a buffer until its step has ended: give it back then, not before.
    """

    def __init__(self, config: DLRMConfig, layout: Layout) -> None:
        self._config = config
        self._layout = layout
        self._shapes: dict[SliceBucket, PackedShape] = {}
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(deque)

    def shape(self, bucket: SliceBucket) -> PackedShape:
        """The layout of `bucket`'s buffers."""
        if bucket not in self._shapes:
            self._shapes[bucket] = PackedShape.of(self._config, self._layout, bucket)
        return self._shapes[bucket]

    def pack(self, bucket: SliceBucket, row: int, parts: Sequence[JaggedBatch]) -> np.ndarray:
        """The samples of `parts`, in order, to land at `row`: int32 [shape(bucket).length].

        `parts` must have been checked and fit the bucket.
        """
        shape = self.shape(bucket)
        buffer = self._take(shape.length)
        fields = {name: buffer[place] for name, place in shape.places.items()}
        joined = _join(shape, fields, parts)
        fields["rows"][: len(joined.values)] = self._layout.rows(joined)
        offsets = self._layout.slot_offsets(joined)
        fields["offsets"][: len(offsets)] = offsets
        fields["offsets"][len(offsets) :] = offsets[-1]
        fields["first_row"][0] = row
        return buffer

    def give_back(self, buffer: np.ndarray) -> None:
        """Let a later slice overwrite `buffer`."""
        self._free[len(buffer)].append(buffer)

    def _take(self, length: int) -> np.ndarray:
        try:
            return self._free[length].pop()
        except IndexError:
            return np.zeros(length, np.int32)


def _join(
    shape: PackedShape, fields: dict[str, np.ndarray], parts: Sequence[JaggedBatch]
) -> JaggedBatch:
    """The parts as one batch; dense features and weights are views of the buffer."""
    offsets = _joined_offsets(parts)
    samples, ids = sum(len(part.dense) for part in parts), offsets[-1]
    dense = fields["dense"].view(np.float32).reshape(shape.samples, shape.dense_width)
    np.concatenate([part.dense for part in parts], out=dense[:samples])
    dense[samples:] = 0
    if shape.weighted:
        weights = fields["weights"].view(np.float32)[:ids]
        np.concatenate([p.weights for p in parts if p.weights is not None], out=weights)
    values = fields["rows"][:ids]
    np.concatenate([part.values for part in parts], out=values, casting="unsafe")
    return JaggedBatch(dense=dense[:samples], values=values, offsets=offsets)


def _joined_offsets(parts: Sequence[JaggedBatch]) -> np.ndarray:
    """int64 [bags + 1] of all parts' bags, over their ids end to end."""
    shifts = np.array([0, *accumulate(len(part.values) for part in parts)])
    bags = [len(part.offsets) - 1 for part in parts]
    starts = np.concatenate([part.offsets[:-1] for part in parts])
    return np.append(starts + np.repeat(shifts[:-1], bags), shifts[-1])
