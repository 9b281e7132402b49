"""Pooled gather over all tables of a model in one launch, for Hopper GPUs.

    out[s, column:column + dim] = scale * sum_i w_i * group[row_i]     over the ids i of a bag

A row of a quantised group is its values times its own float32 scale, dequantised in registers.

Work is cut into *units*: the bags of one sample in a *span* of consecutive slots that read one
group. A unit's ids are contiguous. A *stream* of 1 to 32 lanes, one per 16 bytes of a row, takes
every k-th unit and walks its ids; the streams of a warp need not agree.

Memory: groups, ids, offsets, weights, spans and the output lie in GMEM. Each lane owns `ring_rows`
slots of 16 bytes in SMEM and fills them with cp.async that many rows ahead; it reads back only its
own bytes, so waiting for its own copies suffices and no barrier is needed. Beside a row slot lie
slots of 4 bytes for its *factors*: the id's weight, the row's scale. Ids are loaded `ids_ahead`
rows before their row is asked for. Sums are float32 in registers.

Per id: row bytes + 4 read (4 more for a weight, 4 for a scale: a sector of 32), 2 * dim FLOP; per
sample: 4 bytes per bag read and the output's width written. Bound by memory everywhere.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.simt import MosaicSimt, Simt, Value, minimum
from pallas_kernels.slots import Run, Slot, runs, width
from pallas_kernels.tables import LIMITS, QuantisedTable, Table

WARP = 32
WARPGROUP = 128
VECTOR_BYTES = 16
FACTOR_BYTES = 4
SHARED_BYTES = 227 * 1024
DTYPES = ("float32", "bfloat16", "float16")
BAG_COST = 2.0  # what writing a bag costs, in ids


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """How the gather is laid over the GPU.

    blocks: thread blocks launched, one per SM. warpgroups: 128-thread groups per block.
    ring_rows: rows in flight per stream. ids_ahead: how many rows before its use an id is loaded.
    slots_per_unit: the longest span; None cuts samples so that every stream has a unit.
    """

    blocks: int = 132
    warpgroups: int = 8
    ring_rows: int = 8
    ids_ahead: int = 8
    slots_per_unit: int | None = None

    def __post_init__(self) -> None:
        least = {"blocks": 1, "warpgroups": 1, "ring_rows": 2, "ids_ahead": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"gather config: {name} is {getattr(self, name)}, below {limit}")
        self.check_ring(factors=1)

    def check_ring(self, *, factors: int) -> None:
        """Raises ValueError if a ring with that many factors does not fit."""
        size = self.ring_bytes(factors)
        if size > SHARED_BYTES:
            raise ValueError(f"gather config: a ring of {size} bytes is more than {SHARED_BYTES}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warpgroups * WARPGROUP

    @property
    def ring_slots(self) -> int:
        """Row slots of a block."""
        return self.threads * self.ring_rows

    def ring_bytes(self, factors: int) -> int:
        """Shared memory of a block: row slots and, behind them, the slots of each factor."""
        return self.ring_slots * (VECTOR_BYTES + factors * FACTOR_BYTES)

    @property
    def warps(self) -> int:
        """Warps of the whole launch."""
        return self.blocks * self.threads // WARP

    def units_per_sample(self, samples: int, lanes: int) -> int:
        """Into how many units a sample is cut: as many as give each stream one, none a second."""
        streams = self.warps * WARP // lanes
        return max(1, streams // samples)


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """How one group's rows are spread over lanes.

    `pieces` vectors of `vector_bytes` make a row; `lanes` (a power of two) share a row, each
    holding `vectors` of them.
    """

    dim: int
    dtype: str

    @property
    def item_bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        return self.dim * self.item_bytes

    @property
    def quantised(self) -> bool:
        return self.dtype in LIMITS

    @property
    def vector_bytes(self) -> int:
        return math.gcd(self.row_bytes, VECTOR_BYTES)

    @property
    def pieces(self) -> int:
        return self.row_bytes // self.vector_bytes

    @property
    def lanes(self) -> int:
        return min(WARP, 1 << (self.pieces - 1).bit_length())

    @property
    def vectors(self) -> int:
        return -(-self.pieces // self.lanes)

    @property
    def items_per_vector(self) -> int:
        return self.vector_bytes // self.item_bytes


@dataclass(frozen=True, kw_only=True)
class GatherShape:
    """All that is static about one launch."""

    samples: int
    slots: tuple[Slot, ...]
    rows: tuple[RowShape, ...]
    out_dtype: str
    weighted: bool
    config: GatherConfig
    left: int = 0
    any_mean: bool = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "any_mean", any(slot.mean for slot in self.slots))
        object.__setattr__(self, "width", self.left + width(self.slots))
        self.config.check_ring(factors=self.factors)

    @property
    def factors(self) -> int:
        """Rings of factors: the one that every launch has, and where both are needed another."""
        return 2 if self.weighted and any(row.quantised for row in self.rows) else 1

    def _cuts(self, run: Run) -> list[int]:
        """Where a run is cut so that its pieces have about the same ids; ends included."""
        members = self.slots[run.first : run.first + run.count]
        cost = np.cumsum([0.0, *(slot.expected_ids + BAG_COST for slot in members)])
        pieces = self._pieces(run)
        ideal = cost[-1] * np.arange(1, pieces) / pieces
        inner = np.searchsorted((cost[:-1] + cost[1:]) / 2, ideal)
        return [run.first + int(cut) for cut in np.unique([0, *inner, run.count])]

    def _pieces(self, run: Run) -> int:
        """Spans that a run is cut into: its share of its group's, as groups take turns."""
        if self.config.slots_per_unit is not None:
            return -(-run.count // self.config.slots_per_unit)
        units = self.config.units_per_sample(self.samples, self.rows[run.group].lanes)
        in_group = sum(slot.group == run.group for slot in self.slots)
        return max(1, min(run.count, units * run.count // in_group))

    def spans(self) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
        """int32 [spans, 4] of (first slot, slots, first column, 0), and each group's part of it."""
        by_group: list[list[tuple[int, int, int, int]]] = [[] for _ in self.rows]
        for run in runs(self.slots):
            for first, last in pairwise(self._cuts(run)):
                column = self.left + self.slots[first].column
                by_group[run.group].append((first, last - first, column, 0))
        ends = np.cumsum([len(spans) for spans in by_group])
        parts = tuple((int(end) - len(s), len(s)) for end, s in zip(ends, by_group, strict=True))
        return np.array(sum(by_group, []), np.int32), parts


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the operands of a launch start: GMEM; `ring` and `factor_ring` in SMEM (this thread's
    first slots). Groups that are not quantised have no scales, and no weights or means: None.
    """

    groups: tuple[Value, ...]
    scales: tuple[Value, ...]
    ids: Value
    offsets: Value
    weights: Value
    spans: Value
    means: Value
    out: Value
    ring: Value
    factor_ring: Value


def gather_thread(
    simt: Simt, shape: GatherShape, at: Addresses, *, thread: Value, block: Value
) -> None:
    """What one thread does: its share of the units of every group, group after group."""
    warp = thread // WARP * shape.config.blocks + block  # neighbours on different SMs
    lane = thread % WARP
    _, parts = shape.spans()
    for group, (first_span, spans) in enumerate(parts):
        if spans:
            gather = _UnitGather(simt, shape, at, group, lane)
            gather.units_of_warp(warp, first_span, spans)


class _UnitGather:
    """One thread's gather from one group: what is static, and what the thread knows of itself."""

    def __init__(self, simt: Simt, shape: GatherShape, at: Addresses, group: int, lane: Value):
        self.simt, self.shape, self.at = simt, shape, at
        self.row = shape.rows[group]
        self.table, self.scales = at.groups[group], at.scales[group]
        self.factors = int(shape.weighted) + int(self.row.quantised)
        self.stream = lane // self.row.lanes
        self.piece = lane % self.row.lanes
        self.streams = WARP // self.row.lanes
        self.ring_rows = max(1, shape.config.ring_rows // self.row.vectors)
        self.items = self.row.vectors * self.row.items_per_vector

    def units_of_warp(self, warp: Value, first_span: int, spans: int) -> None:
        """Stream k of warp w takes unit w * streams + k, then every (warps * streams)th."""
        units = self.shape.samples * spans

        def body(unit: Value) -> list[Value]:
            # The streams of a warp take the same span, so that few of its branches diverge.
            sample, span = unit % self.shape.samples, unit // self.shape.samples
            self.unit(sample, span + first_span)
            return [unit + self.shape.config.warps * self.streams]

        self.simt.while_(lambda unit: unit < units, body, [warp * self.streams + self.stream])

    def unit(self, sample: Value, span: Value) -> None:
        """Pools the bags of one span of one sample."""
        simt, at = self.simt, self.at
        entry = at.spans + simt.wide(span * 16)
        first, count = simt.load_word(entry), simt.load_word(entry + 4)
        column = simt.load_word(entry + 8)
        bag = sample * len(self.shape.slots) + first
        last_bag = bag + count
        position, end = self._offset(bag), self._offset(last_bag)
        ids = self._fill_ring(position, end)
        state = [bag, self._offset(bag + 1), self._output(sample, column), *self._zeros()]
        state = self._close_bags(position, last_bag, state)
        self._walk(position, end, last_bag, state, ids)

    def _zeros(self) -> list[Value]:
        return [self.simt.float_constant(0.0)] * self.items

    def _offset(self, bag: Value) -> Value:
        return self.simt.load_word(self.at.offsets + self.simt.wide(bag) * 4)

    def _output(self, sample: Value, column: Value) -> Value:
        """Where this lane's first items of the unit's first bag go."""
        item = jnp.dtype(self.shape.out_dtype).itemsize
        start = self.simt.wide(sample) * self.shape.width + self.simt.wide(column)
        own = self.piece * (self.row.items_per_vector * item)
        return self.at.out + start * item + self.simt.wide(own)

    def _load_id(self, position: Value, end: Value) -> Value:
        """The id at `position`; behind the unit's last one, an id that nobody uses."""
        simt = self.simt
        last = simt.select(end > 0, end - 1, simt.constant(0))
        return simt.load_word(self.at.ids + simt.wide(minimum(simt, position, last)) * 4)

    def _fill_ring(self, position: Value, end: Value) -> list[Value]:
        """Asks for the first ring of rows; returns the ids of the next `ids_ahead`."""
        ids = [
            self._load_id(position + i, end)
            for i in range(self.ring_rows + self.shape.config.ids_ahead)
        ]
        for i in range(self.ring_rows):
            self._ask(self.simt.constant(i), ids[i], position + i, end)
        return ids[self.ring_rows :]

    def _ask(self, slot: Value, row_id: Value, position: Value, end: Value) -> None:
        """Starts the copy of this lane's pieces of a row and its factors into a ring slot."""
        simt, row = self.simt, self.row
        source = self.table + simt.wide(row_id) * row.row_bytes
        inside = position < end
        for v in range(row.vectors):
            start = source + simt.wide(self._piece_of_vector(v) * row.vector_bytes)
            simt.copy_async(self._slot(slot, v), start, row.vector_bytes, inside)
        for factor, start in enumerate(self._factor_sources(row_id, position)):
            simt.copy_async(self._factor_slot(slot, factor), start, FACTOR_BYTES, inside)
        simt.commit()

    def _factor_sources(self, row_id: Value, position: Value) -> list[Value]:
        """Where the numbers lie that the values of a row are multiplied with."""
        sources = []
        if self.shape.weighted:
            sources.append(self.at.weights + self.simt.wide(position) * FACTOR_BYTES)
        if self.row.quantised:
            sources.append(self.scales + self.simt.wide(row_id) * FACTOR_BYTES)
        return sources

    def _piece_of_vector(self, vector: int) -> Value:
        """The piece of a row that this lane holds; lanes to spare repeat the last one."""
        piece = self.piece + vector * self.row.lanes
        if self.row.pieces % self.row.lanes == 0:
            return piece
        return minimum(self.simt, piece, self.simt.constant(self.row.pieces - 1))

    def _slot(self, slot: Value, vector: int) -> Value:
        stride = self.shape.config.threads * VECTOR_BYTES
        return self.at.ring + (slot * self.row.vectors + vector) * stride

    def _factor_slot(self, slot: Value, factor: int) -> Value:
        config = self.shape.config
        first = self.at.factor_ring + factor * config.ring_slots * FACTOR_BYTES
        return first + slot * (config.threads * FACTOR_BYTES)

    def _walk(
        self, position: Value, end: Value, last_bag: Value, state: list[Value], ids: list[Value]
    ) -> None:
        """Adds row after row, asks for the row a ring ahead, writes each bag that ends."""
        simt, ahead = self.simt, len(ids)

        def body(position: Value, slot: Value, *rest: Value) -> list[Value]:
            state, ids = list(rest[:-ahead]), list(rest[-ahead:])
            simt.wait(self.ring_rows - 1)
            state[3:] = self._add(slot, state[3:])
            asked = position + self.ring_rows
            self._ask(slot, ids[0], asked, end)
            ids = [*ids[1:], self._load_id(asked + ahead, end)]
            state = self._close_bags(position + 1, last_bag, state)
            wraps = simt.equal(slot + 1, self.ring_rows)
            return [position + 1, simt.select(wraps, simt.constant(0), slot + 1), *state, *ids]

        carry = [position, simt.constant(0), *state, *ids]
        simt.while_(lambda position, *_: position < end, body, carry)
        simt.wait(0)

    def _add(self, slot: Value, sums: list[Value]) -> list[Value]:
        values: list[Value] = []
        for v in range(self.row.vectors):
            for word in self.simt.load_shared(self._slot(slot, v), self.row.vector_bytes // 4):
                values += self.simt.unpack(word, self.row.dtype)
        if not self.factors:
            return [total + value for total, value in zip(sums, values, strict=True)]
        factor = self._factor(slot)
        return [self.simt.fma(v, factor, total) for total, v in zip(sums, values, strict=True)]

    def _factor(self, slot: Value) -> Value:
        """The product of the factors of the row in a ring slot."""
        slots = [self._factor_slot(slot, factor) for factor in range(self.factors)]
        first, *others = [self.simt.load_shared_float(slot) for slot in slots]
        return first * others[0] if others else first

    def _close_bags(self, position: Value, last_bag: Value, state: list[Value]) -> list[Value]:
        """Writes every bag that ends at `position`, empty ones too; returns the state after.

        State: the open bag, where its ids end, where it goes, and its sums so far.
        """
        step = self.row.dim * jnp.dtype(self.shape.out_dtype).itemsize

        def ends_here(bag: Value, bag_end: Value, *_: Value) -> Value:
            return (bag < last_bag) & self.simt.equal(bag_end, position)

        def body(bag: Value, bag_end: Value, out: Value, *sums: Value) -> list[Value]:
            self._write(bag, out, list(sums))
            following_end = self._offset(minimum(self.simt, bag + 2, last_bag))
            return [bag + 1, following_end, out + step, *self._zeros()]

        return self.simt.while_(ends_here, body, state)

    def _write(self, bag: Value, out: Value, sums: list[Value]) -> None:
        if self.shape.any_mean:
            scale = self._scale(bag)
            sums = [value * scale for value in sums]
        item = jnp.dtype(self.shape.out_dtype).itemsize
        per_vector, per_store = self.row.items_per_vector, self._items_per_store(item)
        for v in range(self.row.vectors):
            mine = (self.piece + v * self.row.lanes) < self.row.pieces
            for i in range(0, per_vector, per_store):
                first = v * per_vector + i
                words = self._words(sums[first : first + per_store], 4 // item)
                offset = (v * self.row.lanes * per_vector + i) * item
                self.simt.store(out + offset, words, mine)

    def _items_per_store(self, item: int) -> int:
        """Items in one store: 16 bytes where every slot starts at a multiple of that, else 8."""
        items = VECTOR_BYTES // item
        slots = self.shape.slots
        columns = [self.shape.left, self.shape.width, *(slot.column for slot in slots)]
        aligned = all(column % items == 0 for column in columns)
        return min(items if aligned else items // 2, self.row.items_per_vector)

    def _words(self, values: list[Value], per_word: int) -> list[Value]:
        return [
            self.simt.pack(values[i : i + per_word], self.shape.out_dtype)
            for i in range(0, len(values), per_word)
        ]

    def _scale(self, bag: Value) -> Value:
        """1 / ids for a mean slot that is not empty, else 1."""
        simt = self.simt
        slot = bag % len(self.shape.slots)
        mean = simt.load_word(self.at.means + simt.wide(slot) * 4)
        count = self._offset(bag + 1) - self._offset(bag)
        divides = simt.equal(mean, 1) & (count > 0)
        return simt.float_constant(1.0) / simt.to_float(
            simt.select(divides, count, simt.constant(1))
        )


def pooled_gather(
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    slots: tuple[Slot, ...],
    out_dtype: DTypeLike,
    left: Float[Array, "samples left"] | None = None,
    config: GatherConfig = GatherConfig(),
) -> Float[Array, "samples left_and_width"]:
    """Pools every bag of every sample in one launch; see reference.pooled_gather.

    The launch writes behind the columns that `left` then fills: nothing is concatenated, unless
    `left` is no multiple of four columns, which would break the alignment of stores.

    Groups are [rows, dim] of float32, bfloat16 or float16, or quantised tables of int8 or
    float8_e4m3fn; dim is a multiple of 4 up to 256. `rows` holds at least one element. Ids are
    trusted: they must be rows of their slot's group. Raises ValueError for shapes, dtypes or slots
    that the kernel cannot take.
    """
    _check(groups, rows, offsets, slots)
    behind = 0 if left is None or left.shape[1] % 4 else left.shape[1]
    shape = GatherShape(
        samples=(len(offsets) - 1) // len(slots),
        slots=slots,
        rows=tuple(RowShape(dim=v.shape[1], dtype=str(v.dtype)) for v in map(_values, groups)),
        out_dtype=str(jnp.dtype(out_dtype)),
        weighted=weights is not None,
        config=config,
        left=behind,
    )
    if shape.samples == 0:
        return jnp.zeros((0, (0 if left is None else left.shape[1]) + width(slots)), out_dtype)
    spans, _ = shape.spans()
    means = [np.array([slot.mean for slot in slots], np.int32)] if shape.any_mean else []
    optional = [] if weights is None else [weights]
    tables = [*map(_values, groups), *(g.scales for g in groups if isinstance(g, QuantisedTable))]
    out = _launch(shape, [*tables, rows, offsets, spans, *means, *optional])
    if left is None:
        return out
    if not behind:
        return jnp.concatenate([left.astype(out.dtype), out], axis=1)
    return lax.dynamic_update_slice(out, left.astype(out.dtype), (0, 0))


def _values(group: Table) -> Array:
    return group.values if isinstance(group, QuantisedTable) else group


def _launch(shape: GatherShape, operands: list[Array | np.ndarray]) -> Array:
    kernel = plgpu.kernel(
        functools.partial(_body, shape=shape),
        out_type=jax.ShapeDtypeStruct((shape.samples, shape.width), jnp.dtype(shape.out_dtype)),
        scratch_types=[plgpu.SMEM((shape.config.ring_bytes(shape.factors) // 4,), jnp.int32)],
        grid=(shape.config.blocks,),
        grid_names=("block",),
        num_threads=shape.config.warpgroups,
        thread_name="warpgroup",
        kernel_name="pooled_gather",
    )
    return kernel(*operands)


def _body(*refs: Any, shape: GatherShape) -> None:
    """Hands per-thread code its refs: groups, scales of the quantised ones, ids, offsets, spans,
    [means], [weights], out, ring.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def per_thread(_, *refs):
        simt = MosaicSimt()
        *inputs, ring_smem = refs
        inputs = iter([simt.global_address(ref) for ref in inputs])
        groups = tuple(next(inputs) for _ in shape.rows)
        scales = tuple(next(inputs) if row.quantised else None for row in shape.rows)
        ids, offsets, spans = (next(inputs) for _ in range(3))
        means = next(inputs) if shape.any_mean else None
        weights = next(inputs) if shape.weighted else None
        (out,) = inputs
        thread, ring = simt.thread(), simt.shared_address(ring_smem)
        factor_ring = ring + shape.config.ring_slots * VECTOR_BYTES
        at = Addresses(
            groups=groups,
            scales=scales,
            ids=ids,
            offsets=offsets,
            weights=weights,
            spans=spans,
            means=means,
            out=out,
            ring=ring + thread * VECTOR_BYTES,
            factor_ring=factor_ring + thread * FACTOR_BYTES,
        )
        gather_thread(simt, shape, at, thread=thread, block=simt.block())

    per_thread(*refs)


def _check(groups: Sequence[Table], rows: Array, offsets: Array, slots: tuple[Slot, ...]) -> None:
    for index, group in enumerate(groups):
        _check_group(index, group)
    if not slots or (len(offsets) - 1) % len(slots):
        raise ValueError(f"{len(offsets)} offsets do not fit {len(slots)} slots per sample")
    if not len(rows):
        raise ValueError("ids are empty: pad them to one element at least")
    column = 0
    for index, slot in enumerate(slots):
        if slot.column != column or slot.dim != _values(groups[slot.group]).shape[1]:
            raise ValueError(f"slot {index} is {slot}, not dim {slot.dim} at column {column}")
        column += slot.dim


def _check_group(index: int, group: Table) -> None:
    values, quantised = _values(group), isinstance(group, QuantisedTable)
    dim, dtype = values.shape[1], str(values.dtype)
    if dtype not in (LIMITS if quantised else DTYPES) or dim % 4 or not 4 <= dim <= 256:
        kind = "quantised " if quantised else ""
        raise ValueError(f"group {index} is {kind}{dtype}[rows, {dim}]: not a gatherable table")
    if isinstance(group, QuantisedTable):
        found = f"{group.scales.dtype}{list(group.scales.shape)}"
        if found != f"float32[{len(values)}]":
            raise ValueError(f"group {index}: scales are {found}, not float32[{len(values)}]")
