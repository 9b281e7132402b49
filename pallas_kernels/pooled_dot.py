"""Bags of about one id and the dot interaction in one kernel, for Hopper GPUs.

A warp takes a sample at a time, as in `interaction`, but loads the rows of the sample's bags from
their table instead of pooled vectors from an array: these are neither written nor read. The
offsets and first ids of a warp's next sample are loaded while the rows of this one are on their
way. Bags of other lengths are right, too, and slow: their rows come one after the other.

Per sample: 4 bytes per id and per bag, a row of each id and the kept columns read, the output's
items written. Bound by memory.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import interaction
from pallas_kernels.interaction import ITEM_BYTES, WARP, DotShape, DotWarp
from pallas_kernels.reference import vectors_of
from pallas_kernels.simt import MosaicSimt, Value, WarpSimt, minimum
from pallas_kernels.slots import Slot
from pallas_kernels.tables import QuantisedTable, Table

WORD_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Where the operands of a launch start in GMEM: of `pooled_dot`, and its output."""

    left: Value
    table: Value
    ids: Value
    offsets: Value
    out: Value


def takes(left: Array, groups: Sequence[Table], weights: Any, slots: Sequence[Slot]) -> bool:
    """Whether the kernel takes such operands, and bags are as it is made for; see `pooled_dot`."""
    table, keep, dim = groups[0], left.shape[1], slots[0].dim
    if weights is not None or len(groups) != 1 or isinstance(table, QuantisedTable):
        return False
    are_short = all(slot.expected_ids <= 1 and not slot.mean for slot in slots)
    if not are_short or table.dtype != left.dtype or keep % dim:
        return False
    return interaction.takes(table.dtype, vectors_of(left, slots), dim, keep)


def pooled_dot(
    left: Float[Array, "samples left"],
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    *,
    slots: tuple[Slot, ...],
) -> Float[Array, "samples left_and_pairs_up"]:
    """See reference.pooled_dot, and `interaction.dot`. Takes sums of bags without weights, of one
    group in left's dtype; ValueError else. Ids are trusted: they must be rows of the group.
    """
    if not takes(left, groups, None, slots):
        raise ValueError(f"no pooled dot kernel for {left.dtype}{left.shape} and {slots}")
    shape = DotShape(
        samples=len(left),
        vectors=vectors_of(left, slots),
        dim=slots[0].dim,
        keep=left.shape[1],
        dtype=str(left.dtype),
    )
    if shape.samples == 0:
        return jnp.zeros((0, shape.columns), left.dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, shape=shape),
        out_type=jax.ShapeDtypeStruct((shape.samples, shape.columns), left.dtype),
        scratch_types=[plgpu.SMEM((shape.warps * shape.pairs_bytes // WORD_BYTES,), jnp.int32)],
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=shape.warpgroups,
        thread_name="warpgroup",
        kernel_name="pooled_dot",
    )
    return kernel(left, groups[0], rows, offsets)


def _body(*refs: Any, shape: DotShape) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def per_thread(_, *refs):
        simt = MosaicSimt()
        *gmem, smem = refs
        left, table, ids, offsets, out = (simt.global_address(ref) for ref in gmem)
        thread = simt.thread()
        warp = thread // WARP
        pooled_dot_warp(
            *(simt, shape),
            at=Bags(left=left, table=table, ids=ids, offsets=offsets, out=out),
            pairs=simt.shared_address(smem) + warp * shape.pairs_bytes,
            first_sample=warp * shape.blocks + simt.block(),
            lane=thread % WARP,
        )

    per_thread(*refs)


def pooled_dot_warp(
    simt: WarpSimt, shape: DotShape, *, at: Bags, pairs: Value, first_sample: Value, lane: Value
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

    def __init__(self, simt: WarpSimt, shape: DotShape, at: Bags, pairs: Value, lane: Value):
        super().__init__(simt, shape, pairs, lane)
        self.at = at
        self.row_bytes = shape.dim * ITEM_BYTES
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
        is_left = vector < self.lefts
        own = left + simt.wide(vector * self.row_bytes)
        source = simt.select(is_left, own, self._row(row))
        is_there = simt.select(is_left, simt.constant(1), end - start) > 0
        return self._words(source, is_there)

    def _row(self, row: Value) -> Value:
        return self.at.table + self.simt.wide(row) * self.row_bytes

    def _words(self, source: Value, where: Value) -> list[Value]:
        places = [source + self.simt.wide(place) for place in self.places()]
        return [word for place in places for word in self.simt.load_words_if(place, 4, where)]

    def _pooled(self, words: list[Value], start: Value, end: Value) -> list[Value]:
        """The words with the bag's other rows added, if it has any: summed up in float32."""
        simt, dtype = self.simt, self.shape.dtype

        def add(place: Value, *sums: Value) -> list[Value]:
            row = simt.load_word(self.at.ids + simt.wide(place) * WORD_BYTES)
            more = self._words(self._row(row), place < end)
            values = [value for word in more for value in simt.unpack(word, dtype)]
            return [place + 1, *(a + b for a, b in zip(sums, values, strict=True))]

        def pool(first: Value, *words: Value) -> list[Value]:
            values = [value for word in words for value in simt.unpack(word, dtype)]
            last, *sums = simt.while_(lambda place, *_: place < end, add, [first, *values])
            halves = [sums[i : i + 2] for i in range(0, len(sums), 2)]
            return [last, *(simt.pack(two, dtype) for two in halves)]

        return simt.while_(lambda place, *_: place < end, pool, [start + 1, *words])[1:]
