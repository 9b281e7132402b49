"""Quantised tables: the error that rounding makes, row by row, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tables
from pallas_kernels.tables import LIMITS, QuantisedTable, quantise, quantise_rows, take

# What float32 adds: the division by the scale, the scale's own rounding, the product again.
FLOAT32_ROUNDING = 4 * 2.0**-24


def make_rows(rows: int = 300, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Rows of sizes from 2^-40 to 2^40, elements of a row of very different sizes too."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, dim)) * 2.0 ** rng.integers(-12, 1, (rows, dim))
    return (values * 2.0 ** rng.integers(-40, 41, (rows, 1))).astype(np.float32)


def dequantised(table: QuantisedTable) -> np.ndarray:
    return np.asarray(table.values, np.float64) * np.asarray(table.scales, np.float64)[:, None]


def allowed_error(values: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """The bound of quantise_rows for every element."""
    sizes, scales = np.abs(values.astype(np.float64)), np.asarray(scales, np.float64)[:, None]
    if dtype == "int8":
        bound = np.broadcast_to(scales / 2, sizes.shape)
    else:
        bound = np.where(sizes < scales * 2.0**-6, scales * 2.0**-10, sizes * 2.0**-4)
    return bound + sizes * FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", LIMITS)
@given(seed=st.integers(0, 2**32))
def test_error_is_within_the_bound(dtype: str, seed: int):
    values = make_rows(seed=seed)
    table = quantise_rows(jnp.asarray(values), dtype)
    error = np.abs(dequantised(table) - values)
    assert (error <= allowed_error(values, table.scales, dtype)).all()


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.95), ("float8_e4m3fn", 0.9)])
def test_the_bound_is_reached(dtype: str, share: float):
    values = make_rows(3000)
    table = quantise_rows(jnp.asarray(values), dtype)
    error = np.abs(dequantised(table) - values) / allowed_error(values, table.scales, dtype)
    assert error.max() > share


@pytest.mark.parametrize(("dtype", "limit"), LIMITS.items())
def test_a_row_s_largest_element_gets_the_largest_value(dtype: str, limit: float):
    values = make_rows()
    table = quantise_rows(jnp.asarray(values), dtype)
    assert (table.values.dtype, table.scales.dtype) == (jnp.dtype(dtype), np.float32)
    largest = np.abs(np.asarray(table.values, np.float32)).max(axis=1)
    np.testing.assert_array_equal(largest, limit)
    np.testing.assert_allclose(table.scales, np.abs(values).max(axis=1) / limit, rtol=1e-6)


def test_ties_go_to_even():
    row = np.array([[127, 0.5, 1.5, -2.5, -3.5, 4.4999]], np.float32)
    assert quantise_rows(jnp.asarray(row), "int8").values.tolist() == [[127, 0, 2, -2, -4, 4]]
    row = np.array([[448, 17, 19, -17, -19, 2**-10]], np.float32)
    halves = quantise_rows(jnp.asarray(row), "float8_e4m3fn").values
    assert halves.astype(jnp.float32).tolist() == [[448, 16, 20, -16, -20, 0]]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-125])
def test_rows_of_nothing_stay_so(dtype: str, size: float):
    rows = np.array([[size] * 4, [1, 2, 3, 4]], np.float32)
    table = quantise_rows(jnp.asarray(rows), dtype)
    assert float(table.scales[0]) == 1
    np.testing.assert_array_equal(np.asarray(table.values[0], np.float32), 0)
    np.testing.assert_allclose(dequantised(table)[1], rows[1], rtol=2**-4)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [1, 7, 300, 2**16])
def test_chunks_are_the_whole(chunk: int, source: str, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "CHUNK_ROWS", chunk)
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((300, 8)), source)
    found = jax.jit(lambda rows: quantise(rows, dtype))(rows)
    jax.tree.map(np.testing.assert_array_equal, found, quantise_rows(rows, dtype))


@pytest.mark.parametrize("dtype", ["int4", "float32", "float8_e5m2"])
def test_other_dtypes_are_refused(dtype: str):
    with pytest.raises(ValueError, match=rf"{dtype} is no dtype to quantise to \(int8, float8"):
        quantise(jnp.zeros((3, 4)), dtype)


@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_are_taken_dequantised(dtype: str):
    table = quantise_rows(jnp.asarray(make_rows()), dtype)
    rows = np.array([299, 0, 0, 17], np.int32)
    taken = take(table, jnp.asarray(rows))
    assert taken.dtype == np.float32
    np.testing.assert_allclose(taken, dequantised(table)[rows], rtol=2**-23)
