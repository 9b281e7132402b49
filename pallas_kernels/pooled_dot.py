"""Bags of about one id and the dot interaction in one kernel, for Hopper GPUs.

A warp takes a sample at a time, as in `interaction`, but loads the rows of the sample's bags from
their table instead of pooled vectors from an array: these are neither written nor read. The
offsets and first ids of a warp's next sample are loaded while the rows of this one are on their
way. Rows in another dtype than the vectors are dequantised and rounded in registers.
Bags of other lengths are right, too, and slow: their rows come one after the other.

Per sample: 4 bytes per id and per bag, a row of each id and the kept columns read, the output's
items written. Bound by memory.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import embedding, interaction
from pallas_kernels.interaction import CHUNK, ITEM_BYTES, VECTOR_BYTES, WARP, DotShape, DotWarp
from pallas_kernels.reference import vectors_of
from pallas_kernels.simt import MosaicSimt, Value, WarpSimt, minimum
from pallas_kernels.slots import Slot
from pallas_kernels.tables import QuantisedTable, Table

WORD_BYTES = 4
QUAD_ITEMS = CHUNK // 4  # of a chunk, that a lane holds


@dataclass(frozen=True, kw_only=True)
class PooledDotShape(DotShape):
    """All that is static about one launch. table_dtype: of the rows, before their scale."""

    table_dtype: str

    @property
    def rounds(self) -> bool:
        """Whether rows of the table have to be rounded to `dtype` first."""
        return self.table_dtype != self.dtype


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Where the operands of a launch start in GMEM: of `pooled_dot`, and its output. A table that
    is not quantised has no scales.
    """

    left: Value
    table: Value
    scales: Value
    ids: Value
    offsets: Value
    out: Value


def takes(left: Array, groups: Sequence[Table], weights: Any, slots: Sequence[Slot]) -> bool:
    """Whether the kernel takes such operands, and bags are as it is made for; see `pooled_dot`."""
    keep, dim = left.shape[1], slots[0].dim
    if weights is not None or len(groups) != 1 or keep % dim:
        return False
    if not isinstance(groups[0], QuantisedTable) and str(groups[0].dtype) not in embedding.DTYPES:
        return False
    if any(slot.expected_ids > 1 or slot.mean for slot in slots):
        return False
    return interaction.takes(left.dtype, vectors_of(left, slots), dim, keep)


def pooled_dot(
    left: Float[Array, "samples left"],
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    *,
    slots: tuple[Slot, ...],
) -> Float[Array, "samples left_and_pairs_up"]:
    """See reference.pooled_dot, and `interaction.dot`. Takes sums of bags without weights, all of
    one group; ValueError else. Ids are trusted: they must be rows of the group.
    """
    if not takes(left, groups, None, slots):
        raise ValueError(f"no pooled dot kernel for {left.dtype}{left.shape} and {slots}")
    (group,) = groups
    tables = (group.values, group.scales) if isinstance(group, QuantisedTable) else (group,)
    shape = PooledDotShape(
        samples=len(left),
        vectors=vectors_of(left, slots),
        dim=slots[0].dim,
        keep=left.shape[1],
        dtype=str(left.dtype),
        table_dtype=str(tables[0].dtype),
    )
    if shape.samples == 0:
        return jnp.zeros((0, shape.columns), left.dtype)
    kernel = interaction.launch(functools.partial(_body, shape=shape), shape, "pooled_dot")
    return kernel(left, rows, offsets, *tables)


def _body(*refs: Any, shape: PooledDotShape) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def per_thread(_, *refs):
        simt = MosaicSimt()
        *gmem, smem = refs
        left, ids, offsets, *tables, out = (simt.global_address(ref) for ref in gmem)
        table, scales = tables if len(tables) > 1 else (*tables, None)
        thread = simt.thread()
        warp = thread // WARP
        pooled_dot_warp(
            *(simt, shape),
            at=Bags(left=left, table=table, scales=scales, ids=ids, offsets=offsets, out=out),
            pairs=simt.shared_address(smem) + warp * shape.pairs_bytes,
            first_sample=warp * shape.blocks + simt.block(),
            lane=thread % WARP,
        )

    per_thread(*refs)


def pooled_dot_warp(
    simt: WarpSimt,
    shape: PooledDotShape,
    *,
    at: Bags,
    pairs: Value,
    first_sample: Value,
    lane: Value,
) -> None:
    """What one warp does: its samples, from `first_sample` on."""
    warp = _PooledDotWarp(simt, shape, at, pairs, lane)
    warp.zero_pairs()

    def body(sample: Value, *flat: Value) -> list[Value]:
        following = sample + shape.warps * shape.blocks
        return [following, *warp.sample(sample, following, flat)]

    simt.while_(
        lambda sample, *_: sample < shape.samples,
        body,
        [first_sample, *warp.bags(first_sample)],
    )


class _PooledDotWarp(DotWarp):
    """A lane's row of a block is a row of `left` or the bag of a slot: (first id, start, end)."""

    def __init__(self, simt: WarpSimt, shape: PooledDotShape, at: Bags, pairs: Value, lane: Value):
        super().__init__(simt, shape, pairs, lane)
        self.at, self.rounds, self.table_dtype = at, shape.rounds, shape.table_dtype
        self.item_bytes = jnp.dtype(shape.table_dtype).itemsize
        self.lefts = shape.keep // shape.dim
        self.slots = shape.vectors - self.lefts

    def sample(self, sample: Value, following: Value, flat: Sequence[Value]) -> list[Value]:
        """Writes a sample whose bags are `flat`; returns those of the following one."""
        bags = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        left = self.at.left + self.simt.wide(sample) * (self.shape.keep * ITEM_BYTES)
        words = [self._first_row(block, left, *bag) for block, bag in enumerate(bags)]
        later = self.bags(following)
        words = [self._pooled(own, *bag[1:]) for own, bag in zip(words, bags, strict=True)]
        target = self.at.out + self.simt.wide(sample) * (self.shape.columns * ITEM_BYTES)
        self.write(words, left, target)
        return later

    def bags(self, sample: Value) -> list[Value]:
        """(first id, start, end) of this lane's row of each block; behind the last sample, its."""
        simt = self.simt
        sample = minimum(simt, sample, simt.constant(self.shape.samples - 1))
        bounds = [self._bounds(sample, block) for block in range(self.blocks)]
        places = [self.at.ids + simt.wide(start) * WORD_BYTES for start, _ in bounds]
        ids = [
            simt.load_words_if(place, 1, start < end)[0]
            for place, (start, end) in zip(places, bounds, strict=True)
        ]
        return [value for own, bounds in zip(ids, bounds, strict=True) for value in (own, *bounds)]

    def _bounds(self, sample: Value, block: int) -> tuple[Value, Value]:
        """Where the ids of a bag start and end; of rows of `left`, nowhere."""
        simt, vector = self.simt, self.vector(block)
        is_slot = vector > (self.lefts - 1)
        slot = simt.select(is_slot, vector - self.lefts, simt.constant(0))
        place = self.at.offsets + simt.wide(sample * self.slots + slot) * WORD_BYTES
        zero = simt.constant(0)
        start, end = (simt.load_word(place + behind) for behind in (0, WORD_BYTES))
        return simt.select(is_slot, start, zero), simt.select(is_slot, end, zero)

    def _first_row(
        self, block: int, left: Value, row: Value, start: Value, end: Value
    ) -> list[Value]:
        """This lane's words of a row of `left`, or of a bag's first row; zeros of an empty bag."""
        simt, vector = self.simt, self.vector(block)
        is_left, has_row = vector < self.lefts, end > start
        own = left + simt.wide(vector * (self.shape.dim * ITEM_BYTES))
        if self.rounds:
            lefts = self._words(own, is_left)
            rows = self._packed(self._values(row, has_row))
            return [simt.select(is_left, *both) for both in zip(lefts, rows, strict=True)]
        source = simt.select(is_left, own, self._row(row))
        is_there = simt.select(is_left, simt.constant(1), end - start) > 0
        return self._words(source, is_there)

    def _row(self, row: Value) -> Value:
        return self.at.table + self.simt.wide(row) * (self.shape.dim * self.item_bytes)

    def _words(self, source: Value, where: Value) -> list[Value]:
        """This lane's words of a vector at `source` that is in the output's dtype."""
        places = [source + self.simt.wide(place) for place in self.places()]
        return [word for place in places for word in self.simt.load_words_if(place, 4, where)]

    def _values(self, row: Value, where: Value) -> list[Value]:
        """This lane's items of a row, float32; zeros where `where` is not."""
        simt, size = self.simt, QUAD_ITEMS * self.item_bytes
        step = min(size, VECTOR_BYTES)
        first = self._row(row) + simt.wide(self.quad * size)
        places = [
            first + (chunk * self.item_bytes + piece)
            for chunk in range(0, self.shape.dim, CHUNK)
            for piece in range(0, size, step)
        ]
        loaded = [simt.load_words_if(place, step // WORD_BYTES, where) for place in places]
        values = [v for words in loaded for w in words for v in simt.unpack(w, self.table_dtype)]
        if self.at.scales is None:
            return values
        (word,) = simt.load_words_if(self.at.scales + simt.wide(row) * WORD_BYTES, 1, where)
        (scale,) = simt.unpack(word, "float32")
        return [value * scale for value in values]

    def _packed(self, values: Sequence[Value]) -> list[Value]:
        halves = [values[i : i + 2] for i in range(0, len(values), 2)]
        return [self.simt.pack(two, self.shape.dtype) for two in halves]

    def _pooled(self, words: list[Value], start: Value, end: Value) -> list[Value]:
        """The words of all of a bag's rows, if it has several: summed up in float32."""
        simt = self.simt

        def add(place: Value, *sums: Value) -> list[Value]:
            row = simt.load_word(self.at.ids + simt.wide(place) * WORD_BYTES)
            values = self._values(row, place < end)
            return [place + 1, *(a + b for a, b in zip(sums, values, strict=True))]

        def pool(second: Value, *_: Value) -> list[Value]:
            zeros = [simt.float_constant(0.0)] * (2 * len(words))
            last, *sums = simt.while_(lambda place, *_: place < end, add, [second - 1, *zeros])
            return [last, *self._packed(sums)]

        return simt.while_(lambda place, *_: place < end, pool, [start + 1, *words])[1:]
