"""Embedding work of one batch that rides with dense layers of another: what co-running is made of.

A *ride* says which dense layers of a segment take bags along, and how the kernel runs the two
together. A slice may ride with one layer, or be shared out to several: the less a layer takes, the
better it hides it, but each launch has its own start and end.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast, get_args

from jaxtyping import Array, Float, Int32

from pallas_kernels.slots import Slot
from recflow_jax.model import DeviceBatch, Ops

Spread = Literal["one", "all"]

IN_TURN = "in-turn"
WORTH_A_RIDE = 0.25  # of the largest layer's FLOP, from which a layer takes part in "all"
SHARE_STEP = 32  # samples


@dataclass(frozen=True, kw_only=True)
class Ride:
    """kernel: one of `Ops.corun_configs`. spread: whether the largest layer takes everything, or
    all large ones take shares by their FLOP. Written "kernel/spread".

    Without a kernel, "in-turn": both in one executable, one after the other, which saves a launch.
    """

    kernel: str = ""
    spread: Spread = "one"

    def __str__(self) -> str:
        return f"{self.kernel}/{self.spread}" if self.kernel else IN_TURN

    @classmethod
    def parse(cls, text: str) -> Self:
        """The ride that `str` wrote; ValueError for another text."""
        if text == IN_TURN:
            return cls()
        kernel, _, spread = text.partition("/")
        if not kernel or spread not in get_args(Spread):
            spreads = " or kernel/".join(get_args(Spread))
            raise ValueError(f"ride is {text!r}, not {IN_TURN}, kernel/{spreads}")
        return cls(kernel=kernel, spread=cast(Spread, spread))

    def shares(self, layers: Sequence[tuple[int, int]], samples: int) -> dict[int, int]:
        """How many of `samples` ride with each layer that takes some, by its place among `layers`,
        which are (inputs, outputs); all, or none where there is no kernel or no layer.
        """
        if not self.kernel or not layers:
            return {}
        flop = [inputs * outputs for inputs, outputs in layers]
        largest = flop.index(max(flop))
        least = WORTH_A_RIDE * flop[largest] if self.spread == "all" else math.inf
        taking = [i for i, own in enumerate(flop) if own >= least and i != largest]
        total = flop[largest] + sum(flop[i] for i in taking)
        shares = {i: samples * flop[i] // total // SHARE_STEP * SHARE_STEP for i in taking}
        shares[largest] = samples - sum(shares.values())
        return {i: share for i, share in sorted(shares.items()) if share}


def rides(ops: Ops) -> Iterator[Ride]:
    """All that a back end offers."""
    yield Ride()
    for kernel in ops.corun_configs:
        for spread in get_args(Spread):
            yield Ride(kernel=kernel, spread=spread)


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """Bags that are to land in rows of `vectors` from `first_row` on, behind `left` columns."""

    vectors: Float[Array, "most columns"]
    first_row: Int32[Array, ""]
    groups: tuple[Any, ...]
    batch: DeviceBatch
    slots: tuple[Slot, ...]
    left: int

    def gathered(self, ops: Ops) -> Float[Array, "most columns"]:
        """The vectors, once all bags have landed by a launch of their own."""
        return ops.gather_into(self.vectors, *self.bags, slots=self.slots, left=self.left)

    @property
    def samples(self) -> int:
        return len(self.batch.dense)

    @property
    def bags(self) -> tuple[Any, ...]:
        """As `gather_into` takes them behind the vectors."""
        ids = (self.batch.rows, self.batch.offsets, self.batch.weights)
        return self.first_row, self.groups, *ids


@dataclass(kw_only=True)
class Carriage:
    """Runs a segment's dense layers, whose calls it counts, with their shares of a cargo.

    For one trace: first the layers, by `loaded_ops`; then `unload` gathers what none of them took.
    """

    ops: Ops
    cargo: Cargo
    kernel: str
    shares: Mapping[int, int]
    _vectors: Any = field(init=False)
    _calls: int = 0
    _taken: int = 0

    def __post_init__(self) -> None:
        self._vectors = self.cargo.vectors

    @property
    def loaded_ops(self) -> Ops:
        """The operations, with dense layers that take their shares along."""
        return replace(self.ops, dense=self._dense)

    def unload(self) -> Float[Array, "most columns"]:
        """The vectors, all bags landed."""
        left = self.cargo.samples - self._taken
        return self.ops.gather_into(self._vectors, *self.cargo.bags, **self._next(left))

    def _dense(self, *layer: Any, **options: Any) -> Any:
        share = self.shares.get(self._calls, 0)
        self._calls += 1
        if not share:
            return self.ops.dense(*layer, **options)
        operands = (*layer, self._vectors, *self.cargo.bags)
        out, self._vectors = self.ops.dense_with_gather(
            *operands, **self._next(share), config=self.kernel, **options
        )
        return out

    def _next(self, share: int) -> dict[str, Any]:
        """The span of the next so many samples, and where they land."""
        span = (self._taken, share)
        self._taken += share
        return {"slots": self.cargo.slots, "left": self.cargo.left, "span": span}
