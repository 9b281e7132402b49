"""Which tiles a dense layer is computed with on a device: a table measured there by `recflow tune`.

An entry is a shape (m samples, k inputs, n outputs, the last two padded to multiples of 64), the
fastest configuration of `pallas_kernels.mlp`, and the times of all that was tried. XLA's matmul is
taken where it is ahead by more than `XLA_HOST_US`: the host has to trace it into the executable's
CUDA graph anew whenever buffers have moved, which a kernel does not need.

A shape that was not measured takes the choice of the nearest one within a factor of 1.41 in each of
m, k and n; without that, the rule `mlp.choose_config` and `mlp.leaves_card_idle`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pallas_kernels.mlp import MlpConfig, choose_config, leaves_card_idle

SCHEMA = 1
XLA = "xla"
XLA_HOST_US = 2.0
NEAR = 0.5  # a factor of 1.41, in powers of two


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


@dataclass(frozen=True, kw_only=True)
class TileTable:
    """The fastest choice for each measured shape; None is XLA's matmul."""

    device: str
    choices: Mapping[DenseShape, MlpConfig | None]

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
            return cls(device=table["device"], choices=dict(map(_entry, table["shapes"])))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TileTableError(f"{file}: no tile table: {error!r}") from error


def _entry(entry: Mapping[str, Any]) -> tuple[DenseShape, MlpConfig | None]:
    shape = DenseShape(m=entry["m"], k=entry["k"], n=entry["n"])
    tried = dict(entry["tried_us"])
    xla_us = tried.pop(XLA, math.inf)
    takes_xla = xla_us + XLA_HOST_US < min(tried.values())
    return shape, None if takes_xla else MlpConfig(**entry["config"])


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
