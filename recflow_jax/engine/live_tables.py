"""The tables while they are in use: what executables read, and the rows of them that change."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.tables import QuantisedTable, Table
from recflow_jax.engine.compilation import Job
from recflow_jax.engine.updates import NewRows, uploaded
from recflow_jax.params import as_rows_of


class LiveTables:
    """The table groups of one engine; whoever launches what reads them also writes them.

    A write is in place, behind all that was launched before: the arrays that were given are used
    up by the first one. sizes: how many rows a write may be padded to, none if none may come.
    """

    def __init__(self, groups: tuple[Table, ...], sizes: Sequence[int]) -> None:
        self.groups = groups
        self._sizes = sizes

    def jobs(self) -> list[Job]:
        """What writes each size into each group: (table, rows, values) -> (table, landed)."""
        return [
            Job(_key(new), jax.jit(_written, donate_argnums=0), self._arguments(new))
            for new in self._nothing()
        ]

    def write(self, executables: Any, new: NewRows) -> Array:
        """Writes `new`; what comes back is ready when they have landed."""
        table, landed = executables[_key(new)](*self._arguments(new))
        self.groups = (*self.groups[: new.group], table, *self.groups[new.group + 1 :])
        return landed

    def warm_up(self, executables: Any) -> None:
        """Runs each executable of `jobs` once; writes nothing."""
        for new in self._nothing():
            self.write(executables, new).block_until_ready()

    def _arguments(self, new: NewRows) -> tuple[Any, ...]:
        return self.groups[new.group], new.rows, new.values

    def _nothing(self) -> Iterator[NewRows]:
        """Padding alone, of every group and size."""
        for group, table in enumerate(self.groups):
            quantised = isinstance(table, QuantisedTable)
            dtype, dim = (
                (jnp.float32, table.values.shape[1]) if quantised else (table.dtype, table.shape[1])
            )
            for size in self._sizes:
                empty = np.zeros((0, dim), dtype)
                yield uploaded(group, np.zeros(0, np.int32), empty, size=size)


def _key(new: NewRows) -> tuple[str, int, int]:
    return "rows", new.group, len(new.rows)


def _written(table: Table, rows: Array, values: Array) -> tuple[Table, Array]:
    """`table` with new rows, quantised if it is; those below 0 are in no table."""

    def scatter(into: Array, new: Array) -> Array:
        at = into.at[rows]
        return at.set(new, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jax.tree.map(scatter, table, as_rows_of(values, table)), rows[0]
