"""Which tiles a dense layer is computed with on a device: a table measured there by `recflow tune`.

An entry is a shape (m samples, k inputs, n outputs, the last two padded to multiples of 64), the
fastest configuration of `pallas_kernels.mlp`, and the times of all that was tried. XLA's matmul is
taken where it is ahead by more than `XLA_HOST_US`: the host has to trace it into the executable's
CUDA graph anew whenever buffers have moved, which a kernel does not need.

A shape that was not measured takes the choice of the nearest one within a factor of 1.41 in each of
m, k and n; without that, the rule `mlp.choose_config` and `mlp.leaves_card_idle`.

Layers that `pallas_kernels.mlp_chain` takes run in one launch where that was measured to be faster,
for as many samples within a factor of 1.41; between two launches pass `GAP_US` more.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pallas_kernels.mlp import PADDED_TO, MlpConfig, choose_config, leaves_card_idle

SCHEMA = 1
XLA = "xla"
XLA_HOST_US = 2.0
NEAR = 0.5  # a factor of 1.41, in powers of two
GAP_US = 1.0


class TileTableError(ValueError):
    """A file that is no tile table; the message names it."""


@dataclass(frozen=True, kw_only=True, order=True)
class DenseShape:
    """x [m, k] @ kernel [k, n]."""

    m: int
    k: int
    n: int

    def distance(self, other: "DenseShape") -> float:
        """The largest of the ratios of m, k and n, in powers of two."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return max(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True, kw_only=True, order=True)
class Chain:
    """m samples through layers of `widths`, inputs first, multiples of 64, and so many scores."""

    m: int
    widths: tuple[int, ...]
    scores: int

    @classmethod
    def of(cls, samples: int, layers: Sequence[tuple[int, int]], scores: int) -> "Chain":
        """Of layers (inputs, outputs), of one at least."""
        widths = (layers[0][0], *(outputs for _, outputs in layers))
        padded = tuple(width + -width % PADDED_TO for width in widths)
        return cls(m=samples, widths=padded, scores=scores)

    @property
    def launches(self) -> int:
        """How many there are without a chain."""
        return len(self.widths) - 1 + bool(self.scores)


@dataclass(frozen=True, kw_only=True)
class TileTable:
    """The fastest choice for each measured shape; None is XLA's matmul. chains: whether each runs
    in one launch.
    """

    device: str
    choices: Mapping[DenseShape, MlpConfig | None]
    chains: Mapping[Chain, bool] = field(default_factory=dict)

    def chain_from(self, samples: int, layers: Sequence[tuple[int, int]], scores: int) -> int:
        """From which layer (inputs, outputs) on they run in one launch; their count if none do."""
        for first in range(len(layers)):
            if self._runs_chained(Chain.of(samples, layers[first:], scores)):
                return first
        return len(layers)

    def _runs_chained(self, chain: Chain) -> bool:
        like = [own for own in self.chains if replace(own, m=chain.m) == chain]
        apart = {own: abs(math.log2(own.m / max(chain.m, 1))) for own in like}
        nearest = min(like, key=lambda own: (apart[own], own), default=None)
        return nearest is not None and apart[nearest] <= NEAR and self.chains[nearest]

    def choose(self, shape: DenseShape) -> MlpConfig | None:
        """What to compute `shape` with; see the module for shapes that were not measured."""
        nearest = self._nearest(shape)
        if nearest is not None and self._fits(self.choices[nearest], shape):
            return self.choices[nearest]
        if leaves_card_idle(shape.m, shape.n, shape.k):
            return None
        return choose_config(shape.m, shape.n, shape.k)

    def _nearest(self, shape: DenseShape) -> DenseShape | None:
        near = [s for s in self.choices if s.distance(shape) <= NEAR]
        return min(near, key=lambda s: (s.distance(shape), s), default=None)

    @staticmethod
    def _fits(config: MlpConfig | None, shape: DenseShape) -> bool:
        return config is None or shape.n % config.block_n == 0

    @classmethod
    def of_device(cls, kind: str) -> "TileTable":
        """The shipped table of devices of that name, an empty one where there is none."""
        file = resources.files("recflow_jax") / "tile_tables" / f"{slug(kind)}.json"
        return cls.read(file) if file.is_file() else cls(device=kind, choices={})

    @classmethod
    def read(cls, file: Any) -> "TileTable":
        """A table that `recflow tune` wrote. Raises TileTableError."""
        try:
            table = json.loads(file.read_text())
            if table["schema"] != SCHEMA:
                raise ValueError(f"schema {table['schema']}, not {SCHEMA}")
            return cls(
                device=table["device"],
                choices=dict(map(_entry, table["shapes"])),
                chains=dict(map(_chain_entry, table.get("chains", ()))),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TileTableError(f"{file}: no tile table: {error!r}") from error


def _entry(entry: Mapping[str, Any]) -> tuple[DenseShape, MlpConfig | None]:
    shape = DenseShape(m=entry["m"], k=entry["k"], n=entry["n"])
    tried = dict(entry["tried_us"])
    xla_us = tried.pop(XLA, math.inf)
    takes_xla = xla_us + XLA_HOST_US < min(tried.values())
    return shape, None if takes_xla else MlpConfig(**entry["config"])


def _chain_entry(entry: Mapping[str, Any]) -> tuple[Chain, bool]:
    chain = Chain(m=entry["m"], widths=tuple(entry["widths"]), scores=entry["scores"])
    gaps_us = GAP_US * (chain.launches - 1)
    return chain, entry["chain_us"] < entry["layers_us"] + gaps_us


def chain_entry_of(chain: Chain, chain_us: float, layers_us: float) -> dict[str, Any]:
    """Layers as they stand in the file: in one launch, and in one each."""
    times = {"chain_us": chain_us, "layers_us": layers_us}
    return {"m": chain.m, "widths": [*chain.widths], "scores": chain.scores, **times}


def entry_of(shape: DenseShape, config: MlpConfig, tried_us: Mapping[str, float]) -> dict[str, Any]:
    """A shape as it stands in the file: its fastest config, and microseconds by name."""
    return {**asdict(shape), "config": asdict(config), "tried_us": dict(tried_us)}


def path_of(folder: Path, kind: str) -> Path:
    """Where the table of a device goes."""
    return folder / f"{slug(kind)}.json"


def slug(name: str) -> str:
    """A device's or model's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def table_of(kind: str) -> TileTable:
    """`TileTable.of_device`, read once."""
    return TileTable.of_device(kind)


def shapes_in(table: Mapping[str, Any]) -> Iterable[DenseShape]:
    """The shapes of a file's content."""
    return (_entry(entry)[0] for entry in table["shapes"])


def chains_in(table: Mapping[str, Any]) -> Iterable[Chain]:
    """The chains of a file's content."""
    return (_chain_entry(entry)[0] for entry in table.get("chains", ()))
