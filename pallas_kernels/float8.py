"""Matmuls of float8 (e4m3) operands: weights with a scale per output, inputs with one for all.

    x @ kernel  =  (rounded(x, input_scale) @ values.T) * scales        summed in float32

Weights are scaled so that each output's largest is e4m3's; an input beyond input_scale * 448, which
was calibrated on other inputs, is cut there. Rounding is to nearest even: at most 2^-4 of an
element, and of 2^-10 of the scaled range near zero. Hopper's tensor cores add the products of e4m3
factors with fewer bits than float32 has (arXiv 2412.19437, 3.3.2): about 2^-13 of the largest.
"""

from dataclasses import dataclass, field
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
    """values e4m3 [outputs, inputs], as tensor cores read them; scales float32 [outputs], of a
    product. input_scale, of all inputs, is no array: who makes the inputs rounds by it.
    """

    values: Any
    scales: Any
    input_scale: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        outputs, inputs = self.values.shape
        return inputs, outputs


Kernel = Float[Array, "_ _"] | Float8Kernel
"""The weights of a dense layer [inputs, outputs]."""


def quantise_kernel(kernel: Float[Array, "inputs outputs"], input_scale: float) -> Float8Kernel:
    """`kernel` in e4m3 for inputs up to input_scale * 448. A column of zeros has scale 1."""
    values, scales = _scaled(kernel)
    return Float8Kernel(values=values, scales=scales * input_scale, input_scale=input_scale)


@jax.jit
def _scaled(kernel: Array) -> tuple[Array, Array]:
    """The values of a Float8Kernel, and its scales for inputs of scale 1."""
    wide = kernel.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=0) / LARGEST
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1, scales)
    return (wide / scales).astype(FLOAT8).T, scales


def input_scale_of(kernel: Kernel) -> float | None:
    """What a layer's inputs are to be rounded by; None if they stay as they are."""
    return kernel.input_scale if isinstance(kernel, Float8Kernel) else None


def rounded(x: Float[Array, "samples columns"], scale: float) -> Float[Array, "samples columns"]:
    """x / scale in e4m3, cut at its largest; as it is if it is e4m3 already."""
    if x.dtype == FLOAT8:
        return x
    return jnp.clip(x.astype(jnp.float32) * (1 / scale), -LARGEST, LARGEST).astype(FLOAT8)


def product(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    precision: lax.Precision | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "samples outputs"]:
    """x @ kernel in `dtype`. With a float8 kernel either may have columns behind the other's, which
    are left out.
    """
    if not isinstance(kernel, Float8Kernel):
        return jnp.dot(x, kernel, precision=precision, preferred_element_type=dtype)
    inputs = min(x.shape[1], kernel.shape[0])
    factors = rounded(x[:, :inputs], kernel.input_scale), kernel.values[:, :inputs]
    sums = lax.dot_general(*factors, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (sums * kernel.scales).astype(dtype)
