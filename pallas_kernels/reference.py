"""The kernels' meaning in jax.numpy: oracle of their tests, fallback where Mosaic cannot run."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.slots import Run, Slot, runs


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return jnp.maximum(x, 0)


def gelu(x: Array) -> Array:
    """The tanh form of GELU (arXiv 1606.08415)."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + jnp.tanh(inner))


def identity(x: Array) -> Array:
    """x."""
    return x


# Written in primitives alone: the kernels apply the same functions to their accumulators.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "sigmoid": lax.logistic,
    "gelu": gelu,
    "identity": identity,
}


def pooled_gather(
    groups: Sequence[Float[Array, "_ _"]],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    slots: tuple[Slot, ...],
    out_dtype: DTypeLike,
) -> Float[Array, "samples width"]:
    """Pools every bag of every sample: out[s, column:column + dim] = sum_i w_i * group[row_i].

    Bag b = s * len(slots) + slot holds rows[offsets[b]:offsets[b + 1]], rows of its slot's
    group; what lies behind offsets[-1] is padding and is not read. An empty bag gives zeros, a
    mean slot divides by the number of ids. Sums are float32, whatever the tables' dtype.
    """
    samples = (len(offsets) - 1) // len(slots)
    pieces = [
        _pool_run(groups[run.group], rows, offsets, weights, slots, run, samples)
        for run in runs(slots)
    ]
    return jnp.concatenate(pieces, axis=1).astype(out_dtype)


def _pool_run(
    table: Array,
    rows: Array,
    offsets: Array,
    weights: Array | None,
    slots: tuple[Slot, ...],
    run: Run,
    samples: int,
) -> Array:
    bags, slot = _bag_of_each_id(rows, offsets, len(slots))
    inside = (slot >= run.first) & (slot < run.first + run.count)
    vectors = table.at[jnp.where(inside, rows, 0)].get(mode="promise_in_bounds")
    vectors = vectors.astype(jnp.float32)
    if weights is not None:
        vectors = vectors * weights[:, None]
    target = (bags // len(slots)) * run.count + slot - run.first
    total = samples * run.count
    pooled = jax.ops.segment_sum(
        vectors, jnp.where(inside, target, total), total, mode=lax.GatherScatterMode.FILL_OR_DROP
    )
    pooled = pooled.reshape(samples, run.count, run.dim)
    means = jnp.array([s.mean for s in slots[run.first : run.first + run.count]])
    counts = jnp.diff(offsets).reshape(samples, -1)[:, run.first : run.first + run.count]
    scale = jnp.where(means, 1 / jnp.maximum(counts, 1), 1).astype(jnp.float32)
    return (pooled * scale[:, :, None]).reshape(samples, run.count * run.dim)


def _bag_of_each_id(rows: Array, offsets: Array, slots: int) -> tuple[Array, Array]:
    """The bag that each id belongs to and its slot; slot -1 for padding behind the last bag."""
    places = jnp.arange(len(rows), dtype=jnp.int32)
    bags = jnp.searchsorted(offsets, places, side="right").astype(jnp.int32) - 1
    return bags, jnp.where(places < offsets[-1], bags % slots, -1)


def dense(
    x: Float[Array, "samples inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"],
    *,
    activation: str,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples outputs"]:
    """activation(x @ kernel + bias), accumulated in float32, in x's dtype."""
    product = jnp.dot(x, kernel, precision=precision, preferred_element_type=jnp.float32)
    return ACTIVATIONS[activation](product + bias.astype(jnp.float32)).astype(x.dtype)
