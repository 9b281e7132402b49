"""What both schedules of the gather are made of: a lane's part of rows, from table to output."""

from dataclasses import dataclass
from typing import Any

from pallas_kernels.gather_shape import FACTOR_BYTES, VECTOR_BYTES, GatherShape
from pallas_kernels.simt import CommonSimt, Value


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the operands of a launch start: GMEM; `ring` and `factor_ring` in SMEM (this thread's
    first slots), `partial` too (its warpgroup's). counters: int32, zero at first, where warps claim
    their tasks. Groups that are not quantised have no scales, and no weights or means, or what
    another schedule needs: None.
    """

    groups: tuple[Value, ...]
    scales: tuple[Value, ...]
    ids: Value
    offsets: Value
    weights: Value
    spans: Value
    means: Value
    bag_spans: Value
    bag_slots: Value
    out: Value
    ring: Value
    factor_ring: Value
    partial: Value
    counters: Value = None


class RowReader:
    """One lane's part of the rows of one group: where its pieces lie, and where they go."""

    def __init__(
        self, simt: CommonSimt, shape: GatherShape, at: Addresses, group: int, lane: Value
    ):
        self.simt: Any = simt
        self.shape, self.at = shape, at
        self.row = shape.rows[group]
        self.table, self.scales = at.groups[group], at.scales[group]
        self.stream = lane // self.row.lanes
        self.piece = lane % self.row.lanes

    def zeros(self) -> list[Value]:
        """Sums of a bag without ids."""
        return [self.simt.float_constant(0.0)] * self.row.items

    def offset(self, bag: Value) -> Value:
        """Where a bag's ids start."""
        return self.simt.load_word(self.at.offsets + self.simt.wide(bag) * 4)

    def row_address(self, row_id: Value) -> Value:
        """Where a row of the group starts."""
        return self.table + self.simt.wide(row_id) * self.row.row_bytes

    def piece_of_vector(self, vector: int) -> Value:
        """The piece of a row that this lane holds; lanes to spare repeat the last one."""
        piece = self.piece + vector * self.row.lanes
        if self.row.pieces % self.row.lanes == 0:
            return piece
        last = self.simt.constant(self.row.pieces - 1)
        return self.simt.select(piece < last, piece, last)

    def factor_sources(self, row_id: Value, position: Value) -> list[Value]:
        """Where the numbers lie that the values of a row are multiplied with."""
        sources = []
        if self.shape.weighted:
            sources.append(self.at.weights + self.simt.wide(position) * FACTOR_BYTES)
        if self.row.quantised:
            sources.append(self.scales + self.simt.wide(row_id) * FACTOR_BYTES)
        return sources

    def add(self, words: list[Value], factors: list[Value], sums: list[Value]) -> list[Value]:
        """The sums with one more row, times the product of its factors."""
        values = [v for word in words for v in self.simt.unpack(word, self.row.dtype)]
        if not factors:
            return [total + value for total, value in zip(sums, values, strict=True)]
        first, *others = factors
        factor = first * others[0] if others else first
        return [self.simt.fma(v, factor, total) for total, v in zip(sums, values, strict=True)]

    def output(self, sample: Value, column: Value) -> Value:
        """Where this lane's first items of a bag go."""
        item = self.shape.out_item_bytes
        start = self.simt.wide(sample) * self.shape.width + self.simt.wide(column)
        own = self.piece * (self.row.items_per_vector * item)
        return self.at.out + start * item + self.simt.wide(own)

    def mean_scale(self, mean: Value, count: Value) -> Value:
        """1 / ids for a mean slot that is not empty, else 1."""
        divides = self.simt.equal(mean, 1) & (count > 0)
        divisor = self.simt.select(divides, count, self.simt.constant(1))
        return self.simt.float_constant(1.0) / self.simt.to_float(divisor)

    def write(self, out: Value, sums: list[Value], where: Value | None = None) -> None:
        """Stores this lane's items of a bag at `out`, in lanes `where` holds."""
        item = self.shape.out_item_bytes
        per_vector, per_store = self.row.items_per_vector, self._items_per_store(item)
        for v in range(self.row.vectors):
            mine = (self.piece + v * self.row.lanes) < self.row.pieces
            mine = mine if where is None else mine & where
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


def zero_right(
    simt: CommonSimt, shape: GatherShape, at: Addresses, *, thread: Value, block: Value
) -> None:
    """One thread's share of the zeros behind the pooled columns, 4 items at a time."""
    pieces = shape.right // 4
    if not pieces:
        return
    item, zero = shape.out_item_bytes, simt.constant(0)

    def body(piece: Value) -> list[Value]:
        sample, column = piece // pieces, piece % pieces * 4 + (shape.width - shape.right)
        start = simt.wide(sample) * shape.width + simt.wide(column)
        simt.store(at.out + start * item, [zero] * item, piece < shape.samples * pieces)
        return [piece + shape.config.blocks * shape.config.threads]

    first = block * shape.config.threads + thread
    simt.while_(lambda piece: piece < shape.samples * pieces, body, [first])
