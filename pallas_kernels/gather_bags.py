"""The gather's schedule of bags: each is taken by as many streams as its expected ids are worth.

Slots are sorted into *classes*: how many streams of a warp share a bag, and whether four warps do.
A *task* is a span of slots of one class for as many neighbouring samples as a warp has bags at
once; all its streams are at the same slot, so bags that are alike run side by side, and a table's
rows are asked for at about the same time by all SMs. A stream loads `rows_at_once` rows into
registers, adds them, and goes on in steps of all streams that share the bag; these then add up
their sums, by shuffles in a warp, through SMEM among warps. Of one-hot slots several bags are
loaded at once instead. Offsets are loaded a step ahead.

Any lengths give right answers; expected ones decide how long it takes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pallas_kernels.gather_rows import Addresses, RowReader
from pallas_kernels.gather_shape import FACTOR_BYTES, VECTOR_BYTES, WARP, GatherShape
from pallas_kernels.shares import COUNTER_BYTES, Claims, Shares, Turns
from pallas_kernels.simt import Value, WarpSimt, minimum
from pallas_kernels.slots import Slot

WARPGROUP_WARPS = 4
TASKS_PER_WARP = 4  # at least, so that the last ones to end are short
LONGEST_SPAN = 16


@dataclass(frozen=True, kw_only=True)
class BagClass:
    """Slots of one group that are gathered alike. split: streams of a warp that share a bag; warps:
    warps that do, 1 or 4. A step is `bags_at_once` slots, `rows_at_once` rows of each.
    """

    group: int
    split: int
    warps: int
    bags_at_once: int
    rows_at_once: int
    first_span: int
    spans: int


@dataclass(frozen=True, kw_only=True)
class BagPlan:
    """slots int32 [n, 4]: (slot, column, mean, 0), class by class; spans int32 [m, 2]: (first of
    those, how many).
    """

    slots: np.ndarray
    spans: np.ndarray
    classes: tuple[BagClass, ...]

    @property
    def shares_bags_among_warps(self) -> bool:
        """Whether some class needs SMEM for sums."""
        return any(cls.warps > 1 for cls in self.classes)


class _Kind(NamedTuple):
    """What slots of a class have in common; fields as in BagClass."""

    warps: int
    split: int
    rows_at_once: int
    group: int
    bags_at_once: int


def _kind_of(shape: GatherShape, slot: Slot) -> _Kind:
    row, expected = shape.rows[slot.group], slot.expected_ids
    at_once = max(1, shape.config.rows_at_once // row.vectors)
    per_stream = at_once if shape.scarce else shape.config.ids_per_stream
    split = min(row.streams, _power_of_two(expected / per_stream))
    shared = shape.config.shares_bags and shape.scarce and expected > 2 * per_stream * split
    rows = min(at_once, _power_of_two(expected / split))
    return _Kind(
        group=slot.group,
        split=split,
        warps=WARPGROUP_WARPS if shared else 1,
        bags_at_once=at_once // rows,
        rows_at_once=rows,
    )


def _power_of_two(least: float) -> int:
    return 1 << max(0, math.ceil(least) - 1).bit_length()


@functools.cache
def bag_plan(shape: GatherShape) -> BagPlan:
    """How the bags of a launch are laid over tasks."""
    members: dict[_Kind, list[int]] = {}
    for index, slot in enumerate(shape.slots):
        members.setdefault(_kind_of(shape, slot), []).append(index)
    kinds = sorted(members, reverse=True)  # warpgroups first, then the longest tasks
    costs = {kind: [_cost(kind, shape.slots[i]) for i in members[kind]] for kind in kinds}
    total = sum(sum(costs[kind]) * _sample_blocks(shape, kind) for kind in kinds)
    limit = total / (shape.config.warps * TASKS_PER_WARP)
    lengths = {kind: _span_lengths(costs[kind], limit, kind.bags_at_once) for kind in kinds}
    counts = [count for kind in kinds for count in lengths[kind]]
    first_spans = accumulate([0, *(len(lengths[kind]) for kind in kinds)])
    classes = tuple(
        BagClass(**kind._asdict(), first_span=first, spans=len(lengths[kind]))
        for kind, first in zip(kinds, first_spans, strict=False)
    )
    entries = [
        (i, shape.left + shape.slots[i].column, shape.slots[i].mean, 0)
        for kind in kinds
        for i in members[kind]
    ]
    firsts = accumulate([0, *counts])
    spans = list(zip(firsts, counts, strict=False))
    return BagPlan(
        slots=np.array(entries, np.int32), spans=np.array(spans, np.int32), classes=classes
    )


def _cost(kind: _Kind, slot: Slot) -> float:
    """Steps that a task spends on a slot, about."""
    turns = slot.expected_ids / (kind.split * kind.warps * kind.rows_at_once)
    return (1 + turns) / kind.bags_at_once


def _sample_blocks(shape: GatherShape, kind: _Kind) -> int:
    return -(-shape.samples // (shape.rows[kind.group].streams // kind.split))


def _span_lengths(costs: Sequence[float], limit: float, step: int) -> list[int]:
    """How many of the slots go into each span: about `limit` together, in whole steps."""
    longest = max(step, LONGEST_SPAN)
    lengths, open_cost, open_count = [], 0.0, 0
    for cost in costs:
        full = open_count % step == 0 and (open_cost + cost > limit or open_count >= longest)
        if open_count and full:
            lengths.append(open_count)
            open_cost, open_count = 0.0, 0
        open_cost, open_count = open_cost + cost, open_count + 1
    return [*lengths, open_count] if open_count else lengths


def gather_bags(
    simt: WarpSimt, shape: GatherShape, at: Addresses, *, thread: Value, block: Value
) -> None:
    """What the warps of a block do: their shares of the tasks of every class, class after class."""
    config, taken = shape.config, 0
    warp = thread // WARP
    for index, cls in enumerate(bag_plan(shape).classes):
        gather = _BagGather(simt, shape, at, cls, thread)
        if at.counters is not None:
            counter = at.counters + index * COUNTER_BYTES
            gather.tasks_of(Claims(simt=simt, counter=counter, lane=thread % WARP))
            continue
        workers = config.warps // cls.warps
        worker = warp // cls.warps * config.blocks + block
        # Whoever had one task less in the class before is first in this one.
        turned = worker + (workers - taken % workers)
        worker = simt.select(turned < workers, turned, turned - workers)
        gather.tasks_of(Turns(worker=worker, workers=workers))
        taken += gather.tasks if cls.warps == 1 else 0


class _BagGather(RowReader):
    """One lane's part in the tasks of one class."""

    def __init__(
        self, simt: WarpSimt, shape: GatherShape, at: Addresses, cls: BagClass, thread: Value
    ):
        super().__init__(simt, shape, at, cls.group, thread % WARP)
        self.cls = cls
        self.samples_at_once = self.row.streams // cls.split
        self.sample_blocks = -(-shape.samples // self.samples_at_once)
        self.tasks = self.sample_blocks * cls.spans
        self.warp = thread // WARP % cls.warps
        self.part = self.warp * cls.split + self.stream % cls.split
        self.stride = cls.split * cls.warps

    def tasks_of(self, shares: Shares) -> None:
        """The warp's share of the tasks."""

        def body(task: Value) -> list[Value]:
            asked = shares.after(task)
            self.task(task)
            return [shares.task(asked)]

        self.simt.while_(lambda task: task < self.tasks, body, [shares.task(shares.first())])

    def task(self, task: Value) -> None:
        """Pools the bags of one span for one block of samples."""
        simt = self.simt
        span, block = task // self.sample_blocks, task % self.sample_blocks
        sample = block * self.samples_at_once + self.stream // self.cls.split
        entry = self.at.bag_spans + simt.wide((span + self.cls.first_span) * 8)
        first, count = simt.load_words(entry, 2)
        live = sample < self.shape.samples
        sample = minimum(simt, sample, simt.constant(self.shape.samples - 1))
        slots = _Slots(first=first, count=count, sample=sample, live=live)

        def body(index: Value, *bounds: Value) -> list[Value]:
            following = self._step(slots, index, list(bounds))
            return [index + self.cls.bags_at_once, *following]

        carry = [simt.constant(0), *self._bounds(slots, simt.constant(0))]
        simt.while_(lambda index, *_: index < count, body, carry)

    def _entry(self, slots: "_Slots", index: Value) -> list[Value]:
        """(slot, column, mean, 0) of the span's slot `index`; behind the last one, the last."""
        place = slots.first + minimum(self.simt, index, slots.count - 1)
        return self.simt.load_words(self.at.bag_slots + self.simt.wide(place * 16), 4)

    def _bounds(self, slots: "_Slots", index: Value) -> list[Value]:
        """Where the ids of the step's bags start and end, bag after bag."""
        bounds = []
        for bag in range(self.cls.bags_at_once):
            slot, *_ = self._entry(slots, index + bag)
            start = slots.sample * len(self.shape.slots) + slot
            bounds += [self.offset(start), self.offset(start + 1)]
        return bounds

    def _step(self, slots: "_Slots", index: Value, bounds: list[Value]) -> list[Value]:
        """Pools `bags_at_once` bags; returns the bounds of the next step's."""
        bags = list(zip(bounds[::2], bounds[1::2], strict=True))
        places = [self._positions(start + self.part) for start, _ in bags]
        ids = [self._ids(p, end) for p, (_, end) in zip(places, bags, strict=True)]
        following = self._bounds(slots, index + self.cls.bags_at_once)
        rows = [self._rows(*bag) for bag in zip(ids, places, [e for _, e in bags], strict=True)]
        for bag, (start, end) in enumerate(bags):
            sums = self._added(rows[bag], self.zeros())
            sums = self._rest(places[bag][0] + self.stride * self.cls.rows_at_once, end, sums)
            sums = self._joined(sums)
            _, column, mean, _ = self._entry(slots, index + bag)
            if self.shape.any_mean:
                scale = self.mean_scale(mean, end - start)
                sums = [value * scale for value in sums]
            live = slots.live & ((index + bag) < slots.count) & self._writes()
            self.write(self.output(slots.sample, column), sums, live)
        return following

    def _writes(self) -> Value:
        """Whether this lane's stream is the one, of those that share a bag, that stores it."""
        return self.simt.equal(self.part, 0)

    def _positions(self, first: Value) -> list[Value]:
        return [first + row * self.stride for row in range(self.cls.rows_at_once)]

    def _ids(self, positions: list[Value], end: Value) -> list[Value]:
        return [
            self.simt.load_words_if(self.at.ids + self.simt.wide(place) * 4, 1, place < end)[0]
            for place in positions
        ]

    def _rows(
        self, ids: list[Value], positions: list[Value], end: Value
    ) -> list[tuple[list[Value], list[Value]]]:
        """The words and the factors of each row, zeros behind the bag's end."""
        return [
            self._row(row_id, place, place < end)
            for row_id, place in zip(ids, positions, strict=True)
        ]

    def _row(
        self, row_id: Value, position: Value, inside: Value
    ) -> tuple[list[Value], list[Value]]:
        simt, size = self.simt, self.row.vector_bytes
        start = self.row_address(row_id)
        places = [
            start + simt.wide(self.piece_of_vector(v) * size) for v in range(self.row.vectors)
        ]
        words = [w for place in places for w in simt.load_words_if(place, size // 4, inside)]
        sources = self.factor_sources(row_id, position)
        factors = [simt.load_words_if(source, 1, inside)[0] for source in sources]
        return words, [simt.unpack(factor, "float32")[0] for factor in factors]

    def _added(self, rows: list[tuple[list[Value], list[Value]]], sums: list[Value]) -> list[Value]:
        for words, factors in rows:
            sums = self.add(words, factors, sums)
        return sums

    def _rest(self, position: Value, end: Value, sums: list[Value]) -> list[Value]:
        """The sums with the rows from `position` on, ids a turn ahead."""
        turn, count = self.stride * self.cls.rows_at_once, self.cls.rows_at_once

        def body(position: Value, *rest: Value) -> list[Value]:
            rows = self._rows(list(rest[:count]), self._positions(position), end)
            ids = self._ids(self._positions(position + turn), end)
            return [position + turn, *ids, *self._added(rows, list(rest[count:]))]

        carry = [position, *self._ids(self._positions(position), end), *sums]
        return self.simt.while_(lambda place, *_: place < end, body, carry)[1 + count :]

    def _joined(self, sums: list[Value]) -> list[Value]:
        """The sums of all streams that share the bag, in each of them."""
        step = self.row.lanes
        while step < self.row.lanes * self.cls.split:
            sums = [total + self.simt.shuffle_xor(total, step) for total in sums]
            step *= 2
        return self._joined_warps(sums) if self.cls.warps > 1 else sums

    def _joined_warps(self, sums: list[Value]) -> list[Value]:
        """The same among the warps of a warpgroup, which all come here equally often."""
        simt, size = self.simt, self.row.items * FACTOR_BYTES
        own = self.at.partial + self.piece * size
        warp_bytes = self.row.lanes * size
        for i in range(0, self.row.items, 4):
            place = own + self.warp * warp_bytes + i * FACTOR_BYTES
            simt.store_shared(place, sums[i : i + 4], simt.equal(self.stream, 0))
        simt.sync_warpgroup()
        totals = self.zeros()
        for warp in range(self.cls.warps):
            words: list[Value] = []
            for i in range(0, size, VECTOR_BYTES):
                words += simt.load_shared(own + (warp * warp_bytes + i), 4)
            totals = [t + simt.unpack(w, "float32")[0] for t, w in zip(totals, words, strict=True)]
        simt.sync_warpgroup()
        return totals


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """A task's span of slots and this lane's sample; not live: a lane without one."""

    first: Value
    count: Value
    sample: Value
    live: Value


def partial_bytes(shape: GatherShape) -> int:
    """SMEM of a warpgroup for the sums of its warps."""
    if not bag_plan(shape).shares_bags_among_warps:
        return 0
    widest = max(row.lanes * row.items for row in shape.rows)
    return WARPGROUP_WARPS * widest * FACTOR_BYTES
