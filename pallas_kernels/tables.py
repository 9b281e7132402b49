"""Embedding tables: plain arrays, or 8-bit values with one float32 scale per row."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The largest magnitude that a quantised row uses, by dtype."""

CHUNK_ROWS = 2**16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantisedTable:
    """values int8 or float8_e4m3fn [rows, dim], scales float32 [rows]; row r is
    values[r] * scales[r].
    """

    values: Any
    scales: Any


Table = Shaped[Array, "_ _"] | QuantisedTable
"""float32, bfloat16 or float16 [rows, dim], or a quantised one."""


def quantise_rows(rows: Float[Array, "rows dim"], dtype: DTypeLike) -> QuantisedTable:
    """`rows` in 8 bits, rounded to nearest even, each row with scale max|row| / LIMITS[dtype].

    Error of an element x of a row of scale s, float32's own rounding apart: int8: at most s / 2,
    half a step. float8_e4m3fn: at most |x| * 2^-4, and s * 2^-10 where |x| is below s * 2^-6.
    A row whose scale would be no normal float32, as a row of zeros, has scale 1 and is rounded to
    zeros. Raises ValueError for another dtype.
    """
    name = str(jnp.dtype(dtype))
    if name not in LIMITS:
        raise ValueError(f"{name} is no dtype to quantise to ({', '.join(LIMITS)} are)")
    wide = rows.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=1) / LIMITS[name]
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1, scales)
    values = wide / scales[:, None]
    if name == "int8":
        values = jnp.round(values)
    return QuantisedTable(values=values.astype(name), scales=scales)


def quantise(table: Float[Array, "rows dim"], dtype: DTypeLike) -> QuantisedTable:
    """quantise_rows of a whole table, CHUNK_ROWS at a time: no float32 copy of all of it."""
    rows, dim = table.shape
    size = min(rows, CHUNK_ROWS)

    def quantise_chunk(index: Array, done: QuantisedTable) -> QuantisedTable:
        start = index * size  # too late for the last chunk: reading and writing clamp it alike
        return update_rows(done, quantise_rows(read_rows(table, start, size), dtype), start)

    empty = QuantisedTable(
        values=jnp.zeros((rows, dim), dtype), scales=jnp.zeros(rows, jnp.float32)
    )
    return lax.fori_loop(0, -(-rows // size), quantise_chunk, empty)


def read_rows(array: Array, start: Any, rows: int) -> Array:
    """`rows` rows of a [rows, ...] array from `start`."""
    return lax.dynamic_slice_in_dim(array, start, rows)


def update_rows(table: Any, rows: Any, start: Any) -> Any:
    """The table, an array or a quantised one, with `rows` of its kind from row `start`."""
    return jax.tree.map(lambda t, r: lax.dynamic_update_slice_in_dim(t, r, start, 0), table, rows)


def take(table: Table, rows: Int[Array, " ids"]) -> Float[Array, "ids dim"]:
    """The rows in float32, dequantised. They are trusted to be in the table."""
    if isinstance(table, QuantisedTable):
        return take(table.values, rows) * _take(table.scales, rows)[:, None]
    return _take(table, rows).astype(jnp.float32)


def _take(array: Array, rows: Array) -> Array:
    return array.at[rows].get(mode="promise_in_bounds")
