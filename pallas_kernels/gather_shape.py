"""What is static about one launch of the pooled gather: its configuration, rows and schedules.

A launch has one of two schedules. `streams`: a stream of lanes walks the ids of many bags, rows in
flight in SMEM; faster by 3 to 6 % where all rows are long and there are many of them. `bags`: a
stream, several of them or a warpgroup take one bag at a time, rows in flight in registers; faster,
up to twice, where rows are short, bags jagged, or there are too few bags for all streams.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import jax.numpy as jnp

from pallas_kernels.slots import Slot, width
from pallas_kernels.tables import LIMITS

WARP = 32
WARPGROUP = 128
VECTOR_BYTES = 16
FACTOR_BYTES = 4
SHARED_BYTES = 227 * 1024

Schedule = Literal["streams", "bags"]

LONG_ROW_BYTES = 128
LONG_BAG_BYTES = 1024
SCARCE_TURNS = 64  # rows for each lane of a launch, on average, below which bags are split further


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """How the gather is laid over the GPU.

    blocks: thread blocks launched, one per SM. warpgroups: 128-thread groups per block.
    Of `streams`: ring_rows: rows in flight per stream. rows_per_turn: rows that a turn of a
    stream's loop adds. ids_ahead: how many rows before its use an id is loaded. units_per_stream:
    what samples are cut for. slots_per_unit: the longest span, instead of that. Of `bags`:
    rows_at_once: rows that a stream has in flight. ids_per_stream: so many of a bag's ids are worth
    a stream of its own, where there are bags for all. shares_bags: whether the warps of a warpgroup
    share long bags, where bags are few.
    """

    schedule: Schedule = "streams"
    blocks: int = 132
    warpgroups: int = 8
    ring_rows: int = 8
    ids_ahead: int = 8
    rows_per_turn: int = 1
    units_per_stream: int = 1
    slots_per_unit: int | None = None
    rows_at_once: int = 4
    ids_per_stream: int = 1
    shares_bags: bool = True

    def __post_init__(self) -> None:
        least = dict.fromkeys(("blocks", "warpgroups", "ids_ahead", "rows_per_turn"), 1)
        least |= {"units_per_stream": 1, "ids_per_stream": 1, "rows_at_once": 1, "ring_rows": 2}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"gather config: {name} is {getattr(self, name)}, below {limit}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"gather config: schedule is {self.schedule!r}")
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
    def streams(self) -> int:
        """Streams of a warp."""
        return WARP // self.lanes

    @property
    def vectors(self) -> int:
        return -(-self.pieces // self.lanes)

    @property
    def items_per_vector(self) -> int:
        return self.vector_bytes // self.item_bytes

    @property
    def items(self) -> int:
        """Items of a row that one lane holds."""
        return self.vectors * self.items_per_vector


@dataclass(frozen=True, kw_only=True)
class GatherShape:
    """All that is static about one launch. left: columns before the pooled ones, which it leaves
    alone; right: columns behind them, which it makes zero.
    """

    samples: int
    slots: tuple[Slot, ...]
    rows: tuple[RowShape, ...]
    out_dtype: str
    weighted: bool
    config: GatherConfig
    left: int = 0
    right: int = 0
    any_mean: bool = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "any_mean", any(slot.mean for slot in self.slots))
        object.__setattr__(self, "width", self.left + width(self.slots) + self.right)
        if self.config.schedule == "streams":
            self.config.check_ring(factors=self.factors)

    @property
    def factors(self) -> int:
        """Rings of factors: of weights, of scales."""
        return int(self.weighted) + int(any(row.quantised for row in self.rows))

    @cached_property
    def scarce(self) -> bool:
        """Whether lanes have few rows each, so that the longest bags decide how long it takes."""
        return _turns(self.samples, self.slots, self.rows, self.config) < SCARCE_TURNS

    @property
    def out_item_bytes(self) -> int:
        return jnp.dtype(self.out_dtype).itemsize


def choose_config(
    samples: int, slots: tuple[Slot, ...], rows: tuple[RowShape, ...]
) -> GatherConfig:
    """The fastest config, as measured on an H200: see docs/kernels.md."""
    bags = GatherConfig(schedule="bags")
    if _turns(samples, slots, rows, bags) < SCARCE_TURNS:
        return bags
    if all(row.row_bytes >= LONG_ROW_BYTES for row in rows):
        return GatherConfig()
    if _bag_bytes(slots, rows) >= LONG_BAG_BYTES:
        return GatherConfig(schedule="bags", warpgroups=5, rows_at_once=8, ids_per_stream=4)
    return bags


def _bag_bytes(slots: tuple[Slot, ...], rows: tuple[RowShape, ...]) -> float:
    """Of the rows of a bag, on average."""
    return sum(slot.expected_ids * rows[slot.group].row_bytes for slot in slots) / len(slots)


def _turns(
    samples: int, slots: tuple[Slot, ...], rows: tuple[RowShape, ...], config: GatherConfig
) -> float:
    """Rows that each lane of the launch has a part of, on average."""
    lanes = sum(slot.expected_ids * rows[slot.group].lanes for slot in slots)
    return samples * lanes / (WARP * config.warps)
