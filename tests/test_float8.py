"""Float8 matmuls: how far they round, where they cut, and that layers use them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.float8 import LARGEST, Float8Kernel, product, quantise_kernel, rounded


def normal(*shape: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dequantised(kernel: Float8Kernel) -> np.ndarray:
    scales = np.asarray(kernel.scales, np.float64) / float(kernel.input_scale)
    return np.asarray(kernel.values, np.float64).T * scales


def test_a_weight_is_off_by_a_sixteenth_at_most() -> None:
    kernel = normal(64, 9) * jnp.logspace(-6, 6, 9)  # columns of very different sizes
    error = np.abs(dequantised(quantise_kernel(kernel, 0.5)) - np.asarray(kernel, np.float64))
    largest = np.abs(np.asarray(kernel)).max(axis=0)
    assert (error <= np.maximum(np.abs(kernel) / 16, largest / LARGEST / 2**10) * 1.0001).all()


def test_each_column_reaches_the_largest_value() -> None:
    values = np.asarray(quantise_kernel(normal(64, 9), 1.0).values, np.float32)
    np.testing.assert_array_equal(np.abs(values).max(axis=1), LARGEST)


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


def test_rounded_inputs_are_taken_as_they_are() -> None:
    x, kernel = normal(7, 64), quantise_kernel(normal(64, 9, seed=1), 4 / LARGEST)
    found = product(rounded(x, kernel.input_scale), kernel)
    np.testing.assert_array_equal(found, product(x, kernel))


def test_a_layer_rounds_for_the_one_behind_it() -> None:
    x, kernel, bias = normal(5, 64).astype(jnp.bfloat16), normal(64, 9), normal(9)
    quantised, scale = quantise_kernel(kernel, 5 / LARGEST), 0.01
    plain = reference.dense(x, kernel.astype(x.dtype), bias, activation="relu", out_scale=scale)
    out = reference.dense(x, quantised, bias, activation="relu", out_scale=scale)
    exact = np.maximum(np.asarray(x, np.float64) @ np.asarray(kernel) + np.asarray(bias), 0)
    for found in (plain, out):
        assert found.dtype == "float8_e4m3fn"
        cut = np.minimum(exact, scale * LARGEST)
        error = np.linalg.norm(np.asarray(found, np.float64) * scale - cut)
        assert 0.001 < error / np.linalg.norm(cut) < 0.06
    wide = reference.dense(out, quantise_kernel(normal(9, 4), scale), normal(4), activation="relu")
    assert wide.dtype == "bfloat16"


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


def test_a_gate_is_what_cross_layers_add_up() -> None:
    """Of two layers: x0 * (1 + (low @ up + bias) + (other @ up + bias))."""
    x0 = normal(5, 64).astype(jnp.bfloat16)
    lows = [rounded(normal(5, 16, seed=seed), 4 / LARGEST) for seed in (1, 2)]
    ups = [normal(16, 64, seed=seed) / 4 for seed in (3, 4)]
    biases = [normal(64, seed=seed) for seed in (5, 6)]
    exact = np.asarray(x0, np.float64)
    for low, up, bias in zip(lows, ups, biases, strict=True):
        wide = np.asarray(low, np.float64) * 4 / LARGEST
        exact = np.asarray(x0) * (wide @ np.asarray(up) + np.asarray(bias)) + exact
    kernel = quantise_kernel(jnp.concatenate(ups), 4 / LARGEST)
    bias = 1 + biases[0] + biases[1]
    out = reference.gate(x0, lows, kernel, bias)
    assert out.dtype == "bfloat16"
    codes = reference.gate(x0, lows, kernel, bias, out_scale=0.1)
    assert codes.dtype == "float8_e4m3fn"
    for found in (np.asarray(out, np.float64), np.asarray(codes, np.float64) * 0.1):
        assert 0.001 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.06
