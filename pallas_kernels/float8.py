"""Matmuls of float8 (e4m3) operands: weights with a scale per output, inputs with one for all.

    x @ kernel  =  (e4m3(x / input_scale) @ values) * scales        summed in float32

Weights are scaled so that each column's largest is e4m3's; an input beyond input_scale * 448, which
was calibrated on other inputs, is cut there. Rounding is to nearest even: at most 2^-4 of an
element, and of 2^-10 of the scaled range near zero.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.tables import LIMITS

FLOAT8 = "float8_e4m3fn"
LARGEST = LIMITS[FLOAT8]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Float8Kernel:
    """values e4m3 [inputs, outputs]; scales [outputs], of a product; input_scale; float32 both."""

    values: Any
    scales: Any
    input_scale: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        return self.values.shape


Kernel = Float[Array, "_ _"] | Float8Kernel
"""The weights of a dense layer [inputs, outputs]."""


def quantise_kernel(
    kernel: Float[Array, "inputs outputs"], input_scale: float | Float[Array, ""]
) -> Float8Kernel:
    """`kernel` in e4m3 for inputs up to input_scale * 448. A column of zeros has scale 1."""
    wide = kernel.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=0) / LARGEST
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1, scales)
    input_scale = jnp.asarray(input_scale, jnp.float32)
    values = (wide / scales).astype(FLOAT8)
    return Float8Kernel(values=values, scales=scales * input_scale, input_scale=input_scale)


def product(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    precision: lax.Precision | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "samples outputs"]:
    """x @ kernel in `dtype`. Columns of x behind a float8 kernel's inputs are left out."""
    if not isinstance(kernel, Float8Kernel):
        return jnp.dot(x, kernel, precision=precision, preferred_element_type=dtype)
    scaled = x[:, : len(kernel.values)].astype(jnp.float32) / kernel.input_scale
    rounded = jnp.clip(scaled, -LARGEST, LARGEST).astype(FLOAT8)
    sums = jnp.dot(rounded, kernel.values, preferred_element_type=jnp.float32)
    return (sums * kernel.scales).astype(dtype)
