"""One slice of samples as one int32 buffer: packed on the host, unpacked on the device.

One copy to the device per slice, whatever the number of features. The buffer holds, in this order,
the ids, the weights' bits, the dense features' bits, the slots' offsets, the first row of the batch
that the slice lands at and, of a model with fixed bags, how many samples have such bags, if all
have. Then the offsets are not read, and the ids are rows of their tables, which need not be checked
before: none reads outside its table, and which samples have such rows, or floats that are none, the
device tells. Else the ids are rows of their groups already.
All sizes are the bucket's; what is behind the slice's own samples is padding: empty bags and dense
features of zero, or of anything in a berth.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from recflow_jax.config import DLRMConfig
from recflow_jax.engine import copy_threads, free_copies, held_copies
from recflow_jax.engine.berths import Berth
from recflow_jax.engine.fixed_bags import bag_offsets
from recflow_jax.engine.pinned import pinned_zeros
from recflow_jax.engine.prepared import Prepared
from recflow_jax.engine.stays import Run, Stay, stay
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch
from scheduling.host_costs import LARGE_IDS
from scheduling.request import SliceBucket


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """Where each field of a slice lies in its buffer of `length` int32.

    bases, limits: of each id of a sample with fixed bags, where its table starts in its group and
    how many rows it has; none where bags are jagged. starts: of each slot of such a sample, how
    many of its ids are before.
    """

    samples: int
    ids: int
    slots: int
    dense_width: int
    weighted: bool
    bases: tuple[int, ...]
    limits: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, config: DLRMConfig, layout: Layout, bucket: SliceBucket) -> "PackedShape":
        """The buffer of `bucket` for one model."""
        return cls(
            samples=bucket.samples,
            ids=bucket.ids,
            slots=len(layout.slots),
            dense_width=config.dense_width,
            weighted=config.weighted,
            bases=_per_id(config, layout.feature_bases),
            limits=_per_id(config, config.feature_rows),
            starts=tuple(layout.slots_of(bag_offsets(config.fixed_bags or (), 1))[:-1].tolist()),
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
            "fixed_samples": 1 if self.bases else 0,
        }
        ends = accumulate(sizes.values())
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    @property
    def length(self) -> int:
        """int32 elements of the buffer."""
        return self.places["fixed_samples"].stop

    def unpack(self, packed: Int32[Array, " length"]) -> tuple[Int32[Array, ""], DeviceBatch]:
        """The first row and the samples, under jit on the device."""
        fields = self._fields(packed)
        dense = lax.bitcast_convert_type(fields["dense"], jnp.float32)
        weights = lax.bitcast_convert_type(fields["weights"], jnp.float32)
        batch = DeviceBatch(
            dense=dense.reshape(self.samples, self.dense_width),
            rows=self._rows(fields),
            offsets=self._offsets(fields),
            weights=weights if self.weighted else None,
        )
        return fields["first_row"][0], batch

    def are_well(self, packed: Int32[Array, " length"]) -> Bool[Array, " samples"]:
        """Which samples have all their ids in their tables and all floats finite, under jit on the
        device, for as many as fit; none where some bags of a model with fixed ones are jagged, and
        all of a model without, whose samples are checked before.
        """
        if not self.bases:
            return jnp.ones(self.samples, bool)
        fields = self._fields(packed)
        return (fields["fixed_samples"] >= 0) & self._are_fixed_well(fields)

    def marked(
        self, scores: Float32[Array, "samples outputs"], packed: Int32[Array, " length"]
    ) -> Float32[Array, "samples outputs"]:
        """The scores of these samples, under jit on the device; NaN those of samples with fixed
        bags that are not well, where all bags are fixed.
        """
        if not self.bases:
            return scores
        fields = self._fields(packed)
        is_bad = (fields["fixed_samples"] >= 0) & ~self._are_fixed_well(fields)
        is_bad = jnp.pad(is_bad, (0, self.samples - len(is_bad)))
        return jnp.where(is_bad[:, None], jnp.nan, scores)

    def _are_fixed_well(self, fields: dict[str, Array]) -> Bool[Array, " samples"]:
        """Of as many samples with fixed bags as fit."""
        rows = self._by_sample(fields["rows"])
        are_well = (rows == self._nearest(rows)).all(axis=1)
        floats = [fields["dense"].reshape(self.samples, self.dense_width)[: len(rows)]]
        floats += [self._by_sample(fields["weights"])] if self.weighted else []
        for bits in floats:
            are_well &= jnp.isfinite(lax.bitcast_convert_type(bits, jnp.float32)).all(axis=1)
        return are_well

    def _rows(self, fields: dict[str, Array]) -> Int32[Array, " ids"]:
        """Each id as a row of its group; one that is outside its table as the nearest inside."""
        rows = fields["rows"]
        if not self.bases:
            return rows
        own = self._by_sample(rows)
        of_groups = jnp.array(self.bases, jnp.int32) + self._nearest(own)
        own = jnp.where(fields["fixed_samples"] >= 0, of_groups, own)
        return jnp.concatenate([own.reshape(-1), rows[own.size :]])

    def _offsets(self, fields: dict[str, Array]) -> Int32[Array, " offsets"]:
        """Those given, or those of so many samples with fixed bags and of empty ones behind."""
        if not self.bases:
            return fields["offsets"]
        per_sample, samples = len(self.bases), fields["fixed_samples"]
        firsts = per_sample * jnp.arange(self.samples, dtype=jnp.int32)
        starts = firsts[:, None] + jnp.array(self.starts, jnp.int32)
        starts = jnp.append(starts.reshape(-1), per_sample * self.samples)
        return jnp.where(samples < 0, fields["offsets"], jnp.minimum(starts, per_sample * samples))

    def _by_sample(self, of_ids: Array) -> Int32[Array, "samples ids"]:
        """Fixed bags' part of a field of ids, for as many samples as fit."""
        per_sample = len(self.bases)
        samples = min(self.samples, self.ids // per_sample)
        return of_ids[: samples * per_sample].reshape(samples, per_sample)

    def _nearest(self, rows: Int32[Array, "samples ids"]) -> Int32[Array, "samples ids"]:
        """The rows of tables that are nearest to these."""
        return jnp.clip(rows, 0, jnp.array(self.limits, jnp.int32) - 1)

    def _fields(self, packed: Int32[Array, " length"]) -> dict[str, Array]:
        return {name: packed[place] for name, place in self.places.items()}


def _per_id(config: DLRMConfig, of_features: Sequence[int]) -> tuple[int, ...]:
    """What each id of a sample with fixed bags has from its feature; nothing for other bags."""
    return tuple(np.repeat(of_features, config.fixed_bags or 0).tolist())


@dataclass(slots=True, kw_only=True, eq=False)
class Buffer:
    """The int32 buffer of a slice, its fields as views, and what they hold from the slice before.

    dense: float32 [room, dense_width], zero behind the first `samples` rows. fixed_samples: how
    many, if all have fixed bags; rows are those of tables then, also what is left behind the
    slice's own ids. Else -1, and rows of groups. berth: where the buffer lies, if in one; what is
    behind its samples and ids may be anything then.
    """

    array: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    dense: np.ndarray
    offsets: np.ndarray
    first_row: np.ndarray
    fixed_samples: np.ndarray
    berth: Berth | None = None
    samples: int = 0

    @classmethod
    def of(cls, shape: PackedShape) -> "Buffer":
        """A buffer of no samples."""
        return cls._on(shape, pinned_zeros(shape.length), None)

    @classmethod
    def in_berth(cls, shape: PackedShape, staying: Stay) -> "Buffer":
        """A buffer of no samples but for the ids that stay."""
        buffer = cls._on(shape, staying.buffer, staying.berth)
        buffer.fixed_samples[0] = 0
        return buffer

    @classmethod
    def _on(cls, shape: PackedShape, array: np.ndarray, berth: Berth | None) -> "Buffer":
        places = shape.places
        dense = array[places["dense"]].view(np.float32)
        return cls(
            array=array,
            rows=array[places["rows"]],
            weights=array[places["weights"]].view(np.float32),
            dense=dense.reshape(shape.samples, shape.dense_width),
            offsets=array[places["offsets"]],
            first_row=array[places["first_row"]],
            fixed_samples=array[places["fixed_samples"]],
            berth=berth,
        )


def _joins(
    buffer: Buffer, parts: Sequence[Prepared], ids: int, run: Run
) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Which arrays are to be joined, and where: of ids, those before and behind what stays, and
    dense features that are not there already.
    """
    rows = [part.rows for part in parts]
    before, behind = buffer.rows[: run.start], buffer.rows[run.stop : ids]
    joins = [(rows[: run.first], before), (rows[run.last :], behind)]
    stays = run.last if buffer.berth is not None and buffer.berth.has_dense else 0
    there = sum([part.samples for part in parts[:stays]])
    dense = [part.dense.reshape(-1) for part in parts[stays:]]
    joins.append((dense, buffer.dense[there : buffer.samples].reshape(-1)))
    if len(buffer.weights):
        weights = [part.weights for part in parts if part.weights is not None]
        joins.append((weights, buffer.weights[:ids]))
    return [(arrays, out) for arrays, out in joins if arrays]


class Staging:
    """The buffers that slices are packed into, kept for the next slice of the same bucket.

    The device may read a buffer until its step has ended: give it back then, not before.
    """

    def __init__(self, config: DLRMConfig, layout: Layout) -> None:
        self._config = config
        self._layout = layout
        self._shapes: dict[SliceBucket, PackedShape] = {}
        self._free: defaultdict[int, deque[Buffer]] = defaultdict(deque)
        self._fixed_slots = np.zeros(0, np.int32)
        self._bases = np.array(_per_id(config, layout.feature_bases), np.int32)
        self._last = np.array(_per_id(config, config.feature_rows), np.int32) - 1

    def shape(self, bucket: SliceBucket) -> PackedShape:
        """The layout of `bucket`'s buffers."""
        if bucket not in self._shapes:
            self._shapes[bucket] = PackedShape.of(self._config, self._layout, bucket)
        return self._shapes[bucket]

    def reserve(self, count: int) -> None:
        """Makes `count` buffers of each bucket so far: later it may take a request milliseconds.
        So does what copies large slices.
        """
        if any(shape.ids >= LARGE_IDS for shape in self._shapes.values()):
            copy_threads.copy()
        for shape in self._shapes.values():
            free = self._free[shape.length]
            free.extend([Buffer.of(shape) for _ in range(count - len(free))])

    def pack(
        self,
        bucket: SliceBucket,
        row: int,
        parts: Sequence[Prepared],
        *,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
        may_stay: bool = False,
    ) -> Buffer:
        """The samples of `parts`, in order, to land at `row`. They must fit the bucket.

        aside: what LARGE_IDS ids and more are copied in, which leaves Python's interpreter to
        others. may_stay: whether the buffer may be a berth, if there is one that fits.
        """
        shape = self.shape(bucket)
        samples = sum([part.samples for part in parts])
        ids = sum([len(part.rows) for part in parts])
        can_be_fixed = len(self._bases) > 0
        are_fixed = can_be_fixed and all([part.slot_offsets is None for part in parts])
        staying = None
        if may_stay and are_fixed:
            dense_at = shape.places["dense"].start
            staying = stay(parts, ids=shape.ids, length=shape.length, dense_at=dense_at)
        buffer = self._take(shape) if staying is None else Buffer.in_berth(shape, staying)
        buffer.first_row[0] = row
        buffer.dense[samples : buffer.samples] = 0
        buffer.samples = samples
        if can_be_fixed:
            self._note_bags(buffer, ids, samples if are_fixed else -1)
        if not are_fixed:
            self._write_offsets(buffer, parts)
        run = staying.run if staying else Run()
        joins = _joins(buffer, parts, ids, run)
        if ids - (run.stop - run.start) < LARGE_IDS:
            for arrays, out in joins:
                held_copies.join(arrays, out)
        else:
            with aside():
                free_copies.join(*joins)
        if can_be_fixed and not are_fixed:
            self._add_bases(buffer, parts)
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Let a later slice overwrite `buffer`; a berth goes with the last who has it."""
        if buffer.berth is None:
            self._free[len(buffer.array)].append(buffer)

    def _take(self, shape: PackedShape) -> Buffer:
        try:
            return self._free[shape.length].pop()
        except IndexError:
            return Buffer.of(shape)

    def _note_bags(self, buffer: Buffer, ids: int, fixed_samples: int) -> None:
        if (buffer.fixed_samples[0] < 0) != (fixed_samples < 0):
            buffer.rows[ids:] = 0
        buffer.fixed_samples[0] = fixed_samples

    def _add_bases(self, buffer: Buffer, parts: Sequence[Prepared]) -> None:
        """Rows of tables become those of groups here beside jagged bags, else on the device; what
        is outside its table the nearest inside.
        """
        end = 0
        for part in parts:
            start, end = end, end + len(part.rows)
            if part.slot_offsets is None:
                rows = buffer.rows[start:end].reshape(-1, len(self._bases))
                np.clip(rows, 0, self._last, out=rows)
                rows += self._bases

    def _write_offsets(self, buffer: Buffer, parts: Sequence[Prepared]) -> None:
        slot = ids = 0
        for part in parts:
            slots = part.slot_offsets
            if slots is None:
                slots = self._slots_of_fixed(part.samples)
            end = slot + len(slots) - 1
            np.add(slots[:-1], ids, out=buffer.offsets[slot:end])
            slot, ids = end, ids + len(part.rows)
        buffer.offsets[slot:] = ids

    def _slots_of_fixed(self, samples: int) -> np.ndarray:
        """The slots' offsets of so many samples with fixed bags."""
        length = samples * len(self._layout.slots) + 1
        if len(self._fixed_slots) < length:
            offsets = bag_offsets(self._config.fixed_bags or (), samples)
            self._fixed_slots = self._layout.slots_of(offsets)
        return self._fixed_slots[:length]
