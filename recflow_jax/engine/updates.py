"""New rows for tables that are in use: checked and uploaded on the caller's thread."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.config import QUANTISED, DLRMConfig, TableConfig
from recflow_jax.layout import Layout
from scheduling.buckets import smallest_holding


@dataclass(frozen=True, kw_only=True, eq=False)
class NewRows:
    """`count` rows of one group on the device, padded to a static size.

    rows: int32 [size], each once; those below 0 are padding. values: [size, dim], in the group's
    dtype, or float32 where it is quantised.
    """

    group: int
    rows: Any
    values: Any
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one call wants written; `done` when it is, and not to be cancelled."""

    rows: NewRows
    done: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()


def new_rows(
    config: DLRMConfig,
    layout: Layout,
    table: str,
    ids: Any,
    values: Any,
    *,
    sizes: Sequence[int],
) -> NewRows:
    """`values` [k, dim] for the rows `ids` [k] of a table, of an id that comes twice the last.

    sizes: what they are padded to, ascending. Raises InputError that names what is wrong.
    """
    index = _index_of(config, table)
    group, base = layout.table_places[index]
    ids, values = _ids(config.tables[index], ids), _values(config.tables[index], values)
    if len(ids) != len(values):
        raise InputError(f"table {table!r}: {len(ids)} ids, {len(values)} rows of values")
    ids, places = np.unique(ids[::-1], return_index=True)
    if len(ids) > sizes[-1]:
        raise InputError(f"table {table!r}: {len(ids)} rows, an update may have {sizes[-1]}")
    size = smallest_holding(sizes, len(ids))
    return uploaded(group, base + ids, values[::-1][places], size=size)


def uploaded(group: int, rows: np.ndarray, values: np.ndarray, *, size: int) -> NewRows:
    """Rows of a group, each once, with their values, padded to `size`."""
    count = len(rows)
    padded = -1 - np.arange(size, dtype=np.int32)
    padded[:count] = rows
    room = np.zeros((size, values.shape[1]), values.dtype)
    room[:count] = values
    on_device = jax.device_put((padded, room))
    return NewRows(group=group, rows=on_device[0], values=on_device[1], count=count)


def _index_of(config: DLRMConfig, table: str) -> int:
    names = [known.name for known in config.tables]
    if table not in names:
        raise InputError(f"the model has no table {table!r} (it has {', '.join(names):.200})")
    return names.index(table)


def _ids(table: TableConfig, given: Any) -> np.ndarray:
    ids = np.asarray(given)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(
            f"table {table.name!r}: ids are {ids.dtype}{list(ids.shape)}, not integers [k]"
        )
    outside = np.flatnonzero((ids < 0) | (ids >= table.rows))
    if len(outside):
        raise InputError(f"table {table.name!r}: id {ids[outside[0]]} is not in [0, {table.rows})")
    return ids.astype(np.int32)


def _values(table: TableConfig, given: Any) -> np.ndarray:
    """In what is uploaded; what is finite, but not in the table's dtype, is refused too."""
    values = np.asarray(given)
    if values.shape == (0,):
        values = values.reshape(0, table.dim)
    if values.ndim != 2 or values.shape[1] != table.dim or not _are_numbers(values):
        raise InputError(
            f"table {table.name!r}: values are {values.dtype}{list(values.shape)}, "
            f"not floats [k, {table.dim}]"
        )
    with np.errstate(over="ignore"):
        written = values.astype(np.float32).astype(_uploaded_dtype(table))
    bad = np.argwhere(~np.isfinite(written.astype(np.float32)))
    if len(bad):
        row, column = bad[0].tolist()
        raise InputError(
            f"table {table.name!r}: value {values[row, column]} at [{row}, {column}] is not a "
            f"finite {written.dtype}"
        )
    return written


def _are_numbers(values: np.ndarray) -> bool:
    return values.dtype.kind in "fiu" or jnp.issubdtype(values.dtype, jnp.floating)


def _uploaded_dtype(table: TableConfig) -> np.dtype:
    return np.dtype(np.float32) if table.dtype in QUANTISED else np.dtype(jnp.dtype(table.dtype))
