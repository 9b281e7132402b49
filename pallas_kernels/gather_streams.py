"""The gather's schedule of streams: each walks the ids of many bags, rows in flight in SMEM.

Work is cut into *units*: the bags of one sample in a *span* of consecutive slots that read one
group. A unit's ids are contiguous. A *stream* of 1 to 32 lanes, one per 16 bytes of a row, takes
every k-th unit, or claims units, and walks their ids.

Each lane owns `ring_rows` slots of 16 bytes in SMEM and fills them with cp.async that many rows
ahead; it reads back only its own bytes, so waiting for its own copies suffices and no barrier is
needed. Beside a row slot lie slots of 4 bytes for its *factors*: the id's weight, the row's scale.
Ids are loaded `ids_ahead` rows before their row is asked for.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pallas_kernels.gather_rows import Addresses, RowReader
from pallas_kernels.gather_shape import FACTOR_BYTES, VECTOR_BYTES, WARP, GatherShape
from pallas_kernels.shares import COUNTER_BYTES, Claims, Shares, Turns
from pallas_kernels.simt import Simt, Value, minimum
from pallas_kernels.slots import Run, Slot, runs

BAG_COST = 2.0  # what writing a bag costs, in ids


def stream_spans(shape: GatherShape) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """int32 [spans, 4] of (first slot, slots, first column, 0), and each group's part of it.

    The longest come first: they are walked row after row, and end late if they start late.
    """
    by_group: list[list[tuple[int, int, int, int]]] = [[] for _ in shape.rows]
    for run in runs(shape.slots):
        for first, last in pairwise(_cuts(shape, run)):
            column = shape.left + shape.slots[first].column
            by_group[run.group].append((first, last - first, column, 0))
    for spans in by_group:
        spans.sort(key=lambda span: _cost(shape.slots[span[0] : span[0] + span[1]]), reverse=True)
    ends = np.cumsum([len(spans) for spans in by_group])
    parts = tuple((int(end) - len(s), len(s)) for end, s in zip(ends, by_group, strict=True))
    return np.array(sum(by_group, []), np.int32), parts


def _cuts(shape: GatherShape, run: Run) -> list[int]:
    """Where a run is cut so that its pieces have about the same ids; ends included."""
    members = shape.slots[run.first : run.first + run.count]
    cost = np.cumsum([0.0, *(_cost([slot]) for slot in members)])
    pieces = _pieces(shape, run)
    ideal = cost[-1] * np.arange(1, pieces) / pieces
    inner = np.searchsorted((cost[:-1] + cost[1:]) / 2, ideal)
    return [run.first + int(cut) for cut in np.unique([0, *inner, run.count])]


def _cost(slots: Sequence[Slot]) -> float:
    """In ids."""
    return sum(slot.expected_ids + BAG_COST for slot in slots)


def _pieces(shape: GatherShape, run: Run) -> int:
    """Spans that a run is cut into: its share of its group's, as groups take turns."""
    config = shape.config
    if config.slots_per_unit is not None:
        return -(-run.count // config.slots_per_unit)
    units = _units_per_sample(shape, run.group)
    in_group = sum(slot.group == run.group for slot in shape.slots)
    return max(1, min(run.count, units * run.count // in_group))


def _units_per_sample(shape: GatherShape, group: int) -> int:
    """Into how many units a sample is cut: as many as give each stream so many, none one more."""
    streams = shape.config.warps * shape.rows[group].streams
    return max(1, streams * shape.config.units_per_stream // shape.samples)


def gather_streams(
    simt: Simt, shape: GatherShape, at: Addresses, *, thread: Value, block: Value
) -> None:
    """What one thread does: its share of the units of every group, group after group."""
    warp = thread // WARP * shape.config.blocks + block  # neighbours on different SMs
    _, parts = stream_spans(shape)
    for group, (first_span, spans) in enumerate(parts):
        if spans:
            gather = _UnitGather(simt, shape, at, group, thread % WARP)
            shares: Shares = Turns(worker=warp, workers=shape.config.warps)
            if at.counters is not None:
                counter = at.counters + group * COUNTER_BYTES
                shares = Claims(simt=simt, counter=counter, lane=thread % WARP)
            gather.units_of_warp(shares, first_span, spans)


class _UnitGather(RowReader):
    """One thread's gather from one group: what is static, and what the thread knows of itself."""

    def __init__(self, simt: Simt, shape: GatherShape, at: Addresses, group: int, lane: Value):
        super().__init__(simt, shape, at, group, lane)
        self.factors = int(shape.weighted) + int(self.row.quantised)
        rows = max(1, shape.config.ring_rows // self.row.vectors)
        self.per_turn = min(rows, shape.config.rows_per_turn)
        self.ring_rows = rows - rows % self.per_turn
        self.ids_ahead = shape.config.ids_ahead + -shape.config.ids_ahead % self.per_turn

    def units_of_warp(self, shares: Shares, first_span: int, spans: int) -> None:
        """The warp's share of the units: task t has one for each stream, from t * streams on."""
        simt, samples, streams = self.simt, self.shape.samples, self.row.streams
        units = samples * spans

        def body(task: Value) -> list[Value]:
            asked = shares.after(task)
            unit = task * streams + self.stream

            def once(unit: Value) -> list[Value]:
                # The streams of a warp take the same span, so that few of its branches diverge.
                self.unit(unit % samples, unit // samples + first_span)
                return [simt.constant(units)]

            simt.while_(lambda unit: unit < units, once, [unit])
            return [shares.task(asked)]

        first = shares.task(shares.first())
        simt.while_(lambda task: (task * streams) < units, body, [first])

    def unit(self, sample: Value, span: Value) -> None:
        """Pools the bags of one span of one sample."""
        simt, at = self.simt, self.at
        entry = at.spans + simt.wide(span * 16)
        first, count = simt.load_word(entry), simt.load_word(entry + 4)
        column = simt.load_word(entry + 8)
        bag = sample * len(self.shape.slots) + first
        last_bag = bag + count
        position, end = self.offset(bag), self.offset(last_bag)
        ids = self._fill_ring(position, end)
        ends = [self.offset(bag + 1), self.offset(minimum(simt, bag + 2, last_bag))]
        state = [bag, *ends, self.output(sample, column), *self.zeros()]
        state = self._close_bags(position, last_bag, state)
        self._walk(position, end, last_bag, state, ids)

    def _load_id(self, position: Value, end: Value) -> Value:
        """The id at `position`; behind the unit's last one, an id that nobody uses."""
        simt = self.simt
        last = simt.select(end > 0, end - 1, simt.constant(0))
        return simt.load_word(self.at.ids + simt.wide(minimum(simt, position, last)) * 4)

    def _fill_ring(self, position: Value, end: Value) -> list[Value]:
        """Asks for the first ring of rows; returns the ids of the next `ids_ahead`."""
        ids = [self._load_id(position + i, end) for i in range(self.ring_rows + self.ids_ahead)]
        for first in range(0, self.ring_rows, self.per_turn):
            self._ask(self.simt.constant(first), ids[first:], position + first, end)
        return ids[self.ring_rows :]

    def _ask(self, slot: Value, ids: list[Value], position: Value, end: Value) -> None:
        """Starts the copies of a turn's rows into ring slots, from `slot` on."""
        for i in range(self.per_turn):
            self._ask_row(slot + i, ids[i], position + i, end)
        self.simt.commit()

    def _ask_row(self, slot: Value, row_id: Value, position: Value, end: Value) -> None:
        """Starts the copy of this lane's pieces of a row and its factors into a ring slot."""
        simt, row = self.simt, self.row
        source = self.row_address(row_id)
        inside = position < end
        for v in range(row.vectors):
            start = source + simt.wide(self.piece_of_vector(v) * row.vector_bytes)
            simt.copy_async(self._slot(slot, v), start, row.vector_bytes, inside)
        for factor, start in enumerate(self.factor_sources(row_id, position)):
            simt.copy_async(self._factor_slot(slot, factor), start, FACTOR_BYTES, inside)

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
        """Adds a turn's rows, asks for those a ring ahead, writes each bag that ends. Behind the
        unit's end it adds what belongs to no bag.
        """
        simt, ahead, step = self.simt, len(ids), self.per_turn

        def body(position: Value, slot: Value, *rest: Value) -> list[Value]:
            state, ids = list(rest[:-ahead]), list(rest[-ahead:])
            simt.wait(self.ring_rows // step - 1)
            rows = [self._read(slot + i) for i in range(step)]
            asked = position + self.ring_rows
            self._ask(slot, ids, asked, end)
            ids = ids[step:] + [self._load_id(asked + ahead + i, end) for i in range(step)]
            for i, row in enumerate(rows):
                state[4:] = self.add(*row, state[4:])
                state = self._close_bags(position + (i + 1), last_bag, state)
            wraps = simt.equal(slot + step, self.ring_rows)
            slot = simt.select(wraps, simt.constant(0), slot + step)
            return [position + step, slot, *state, *ids]

        carry = [position, simt.constant(0), *state, *ids]
        simt.while_(lambda position, *_: position < end, body, carry)
        simt.wait(0)

    def _read(self, slot: Value) -> tuple[list[Value], list[Value]]:
        """The words and the factors of the row in a ring slot."""
        per_vector = self.row.vector_bytes // 4
        slots = [self._slot(slot, v) for v in range(self.row.vectors)]
        words = [word for place in slots for word in self.simt.load_shared(place, per_vector)]
        factors = [self._factor_slot(slot, factor) for factor in range(self.factors)]
        return words, [self.simt.load_shared_float(place) for place in factors]

    def _close_bags(self, position: Value, last_bag: Value, state: list[Value]) -> list[Value]:
        """Writes every bag that ends at `position`, empty ones too; returns the state after.

        State: the open bag, where its ids and those of the next one end, where it goes, and its
        sums so far.
        """
        step = self.row.dim * self.shape.out_item_bytes

        def ends_here(bag: Value, bag_end: Value, *_: Value) -> Value:
            return (bag < last_bag) & self.simt.equal(bag_end, position)

        def body(bag: Value, _: Value, next_end: Value, out: Value, *sums: Value) -> list[Value]:
            self.write(out, self._scaled(bag, list(sums)))
            following_end = self.offset(minimum(self.simt, bag + 3, last_bag))
            return [bag + 1, next_end, following_end, out + step, *self.zeros()]

        return self.simt.while_(ends_here, body, state)

    def _scaled(self, bag: Value, sums: list[Value]) -> list[Value]:
        if not self.shape.any_mean:
            return sums
        slot = bag % len(self.shape.slots)
        mean = self.simt.load_word(self.at.means + self.simt.wide(slot) * 4)
        scale = self.mean_scale(mean, self.offset(bag + 1) - self.offset(bag))
        return [value * scale for value in sums]
