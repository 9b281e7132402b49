"""Float8 matmuls: how far they round, where they cut, and that layers use them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.float8 import LARGEST, Float8Kernel, product, quantise_kernel


def normal(*shape: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dequantised(kernel: Float8Kernel) -> np.ndarray:
    scales = np.asarray(kernel.scales, np.float64) / float(kernel.input_scale)
    return np.asarray(kernel.values, np.float64) * scales


def test_a_weight_is_off_by_a_sixteenth_at_most() -> None:
    kernel = normal(64, 9) * jnp.logspace(-6, 6, 9)  # columns of very different sizes
    error = np.abs(dequantised(quantise_kernel(kernel, 0.5)) - np.asarray(kernel, np.float64))
    largest = np.abs(np.asarray(kernel)).max(axis=0)
    assert (error <= np.maximum(np.abs(kernel) / 16, largest / LARGEST / 2**10) * 1.0001).all()


def test_each_column_reaches_the_largest_value() -> None:
    values = np.asarray(quantise_kernel(normal(64, 9), 1.0).values, np.float32)
    np.testing.assert_array_equal(np.abs(values).max(axis=0), LARGEST)


def test_a_column_of_zeros_stays_zeros() -> None:
    kernel = quantise_kernel(jnp.zeros((4, 3)), 2.0)
    np.testing.assert_array_equal(product(normal(2, 4), kernel), np.zeros((2, 3)))


def test_a_product_is_that_of_the_rounded_factors() -> None:
    x, kernel = normal(7, 64), quantise_kernel(normal(64, 9, seed=1), 4 / LARGEST)
    scale = float(kernel.input_scale)
    rounded = np.asarray((x / scale).astype(jnp.float8_e4m3fn), np.float64) * scale
    np.testing.assert_allclose(product(x, kernel), rounded @ dequantised(kernel), rtol=1e-4)


@pytest.mark.parametrize("reach", [1.0, 1.5, 100.0])
def test_inputs_beyond_the_calibrated_ones_are_cut(reach: float) -> None:
    """e4m3 has no infinity: a cast beyond its range gives NaN."""
    kernel = quantise_kernel(jnp.ones((1, 1)), 1 / LARGEST)
    np.testing.assert_allclose(product(jnp.full((1, 1), reach), kernel), [[1.0]], rtol=1e-6)


def test_columns_behind_the_kernels_inputs_are_left_out() -> None:
    x, kernel = normal(3, 70), quantise_kernel(normal(64, 9), 0.01)
    np.testing.assert_array_equal(product(x, kernel), product(x[:, :64], kernel))


def test_plain_kernels_are_multiplied_as_they_are() -> None:
    x, kernel = normal(3, 64), normal(64, 9)
    np.testing.assert_array_equal(product(x, kernel), jnp.dot(x, kernel))
    half = product(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), None, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


def test_layers_take_float8_kernels() -> None:
    x, bias = normal(5, 64).astype(jnp.bfloat16), normal(9)
    kernel = normal(64, 9)
    exact = reference.dense(x.astype(jnp.float32), kernel, bias, activation="relu")
    out = reference.dense(x, quantise_kernel(kernel, 5 / LARGEST), bias, activation="relu")
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(out.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 0.001 < error < 0.06


def test_cross_layers_take_float8_kernels() -> None:
    x, down, up = normal(5, 64), normal(64, 16, seed=1) / 8, normal(16, 64, seed=2) / 4
    bias = normal(64, seed=3)
    exact = cross(x, down, up, bias)
    out = cross(x, quantise_kernel(down, 5 / LARGEST), quantise_kernel(up, 5 / LARGEST), bias)
    assert 0.001 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.06


def cross(x, down, up, bias):
    low = reference.dense(x, down, jnp.zeros(16), activation="identity")
    return reference.widen(x, x, low, up, bias)
