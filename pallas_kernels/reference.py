"""The kernels' meaning in jax.numpy: oracle of their tests, fallback where Mosaic cannot run."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.float8 import FLOAT8, Float8Kernel, Kernel, product, rounded
from pallas_kernels.slots import Run, Slot, offsets_of, runs, width
from pallas_kernels.tables import Table, take


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


def finished(sums: Array, activation: str, out_scale: float | None) -> Array:
    """activation(sums), float32; rounded by out_scale to e4m3 unless that is None."""
    out = ACTIVATIONS[activation](sums)
    return out if out_scale is None else rounded(out, out_scale)


def pooled_gather(
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    slots: tuple[Slot, ...],
    out_dtype: DTypeLike,
    left: Float[Array, "samples left"] | None = None,
    right: int = 0,
) -> Float[Array, "samples left_width_and_right"]:
    """Pools every bag of every sample: out[s, column:column + dim] = sum_i w_i * group[row_i].

    Bag b = s * len(slots) + slot holds rows[offsets[b]:offsets[b + 1]], rows of its slot's
    group; what lies before offsets[0] or behind offsets[-1] is not read. An empty bag gives zeros,
    a mean slot divides by the number of ids. Sums are float32, whatever the tables' dtype; rows of
    quantised tables are dequantised first. The columns of `left` come before the pooled ones,
    `right` zero columns behind them.
    """
    pieces = [
        _pool_run(groups[run.group], rows, offsets, weights, slots, run) for run in runs(slots)
    ]
    if left is not None:
        pieces.insert(0, left)
    if right:
        pieces.append(jnp.zeros((len(pieces[0]), right)))
    return jnp.concatenate([piece.astype(out_dtype) for piece in pieces], axis=1)


def gather_into(
    vectors: Float[Array, "most columns"],
    first_row: Int32[Array, ""],
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    slots: tuple[Slot, ...],
    left: int,
    span: tuple[int, int] | None = None,
) -> Float[Array, "most columns"]:
    """`vectors` with what `pooled_gather` gives in its rows from `first_row` on: the pooled columns
    behind `left` ones that stay, zeros behind them. All samples must fit.

    span: the first sample and how many, in rows from `first_row` plus that first one on; other rows
    stay as they are. None: all.
    """
    right = vectors.shape[1] - left - width(slots)
    if span is not None:
        if not span[1]:
            return vectors
        offsets, first_row = offsets_of(offsets, len(slots), span), first_row + span[0]
    options = {"slots": slots, "out_dtype": vectors.dtype, "right": right}
    pooled = pooled_gather(groups, rows, offsets, weights, **options)
    return lax.dynamic_update_slice(vectors, pooled, (first_row, jnp.int32(left)))


def _pool_run(
    table: Table,
    rows: Array,
    offsets: Array,
    weights: Array | None,
    slots: tuple[Slot, ...],
    run: Run,
) -> Array:
    """The run's columns. Ids of other slots are counted to a bag behind the last and dropped."""
    own = slice(run.first, run.first + run.count)
    lengths = jnp.diff(offsets).reshape(-1, len(slots))
    total = lengths.shape[0] * run.count
    bags = jnp.full(lengths.shape, total, jnp.int32)
    bags = bags.at[:, own].set(jnp.arange(total).reshape(-1, run.count))
    target = _per_id(bags, offsets, len(rows))
    inside = target < total
    vectors = take(table, jnp.where(inside, rows, 0))
    if weights is not None:
        vectors = vectors * weights[:, None]
    in_order = len(slots) == run.count
    pooled = jax.ops.segment_sum(vectors, target, total, indices_are_sorted=in_order)
    pooled = pooled.reshape(-1, run.count, run.dim)
    means = jnp.array([slot.mean for slot in slots[own]])
    scale = jnp.where(means, 1 / jnp.maximum(lengths[:, own], 1), 1).astype(jnp.float32)
    return (pooled * scale[:, :, None]).reshape(-1, run.count * run.dim)


def _per_id(per_bag: Array, offsets: Array, ids: int) -> Array:
    """The value of the bag that each of `ids` ids is in; those in no bag get the largest."""
    largest = jnp.full(1, jnp.iinfo(jnp.int32).max, jnp.int32)
    values = jnp.concatenate([largest, per_bag.ravel(), largest])
    counts = jnp.diff(offsets, prepend=0, append=ids)
    return jnp.repeat(values, counts, total_repeat_length=ids)


def dense(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    bias: Float[Array, " outputs"],
    *,
    activation: str,
    out_scale: float | None = None,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples outputs"]:
    """activation(x @ kernel + bias), accumulated in float32, in `out_dtype`.

    out_scale: what the output is rounded by to e4m3 (see float8), as a float8 layer behind it takes
    it; None: it stays a float.
    """
    sums = product(x, kernel, precision) + bias.astype(jnp.float32)
    return finished(sums, activation, out_scale).astype(out_dtype(x, out_scale))


def chain(
    x: Float[Array, "samples inputs"],
    kernels: Sequence[Float[Array, "_ _"]],
    biases: Sequence[Float[Array, " _"]],
    scores: tuple[Float[Array, "_ _"], Float[Array, " _"]] | None = None,
    *,
    activation: str,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples _"]:
    """The samples through `dense` layers, one after the other. scores: weights and bias of a last
    layer without activation, whose sums are given in float32.
    """
    for kernel, bias in zip(kernels, biases, strict=True):
        x = dense(x, kernel, bias, activation=activation, precision=precision)
    if scores is None:
        return x
    kernel, bias = scores
    return product(x, kernel, precision) + bias


def out_dtype(x: Array, out_scale: float | None) -> jnp.dtype:
    """e4m3 where the output is rounded by a scale; else x's dtype, bfloat16 for e4m3."""
    if out_scale is not None:
        return jnp.dtype(FLOAT8)
    return jnp.dtype(jnp.bfloat16) if x.dtype == FLOAT8 else x.dtype


def dense_with_gather(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    bias: Float[Array, " outputs"],
    *gather: Any,
    activation: str,
    slots: tuple[Slot, ...],
    left: int,
    span: tuple[int, int] | None = None,
    out_scale: float | None = None,
    config: Any = None,
    precision: lax.Precision | None = None,
) -> tuple[Float[Array, "samples outputs"], Float[Array, "most columns"]]:
    """`dense` of one batch and `gather_into`, whose arguments come behind the layer's, of another.

    config: how a kernel runs the two together; nothing to this one.
    """
    layer = {"activation": activation, "out_scale": out_scale, "precision": precision}
    out = dense(x, kernel, bias, **layer)
    return out, gather_into(*gather, slots=slots, left=left, span=span)


def widen(
    x0: Float[Array, "samples width"],
    x: Float[Array, "samples width"],
    low: Float[Array, "samples rank"],
    up: Float[Array, "rank width"],
    bias: Float[Array, " width"],
    *,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples width"]:
    """x0 * (low @ up + bias) + x: the second half of a low-rank cross layer (DCN v2, arXiv
    2008.13535), where low is x through a `dense` layer; up is [rank, width].

    The matmul accumulates in float32 and hands on x's dtype: a wide float32 array costs more time
    than it adds precision. The elementwise part is float32.
    """
    high = product(low, up, precision, x.dtype).astype(jnp.float32)
    return (x0 * (high + bias) + x).astype(x.dtype)


def gate(
    x0: Float[Array, "samples width"],
    lows: Sequence[Float[Array, "samples _"]],
    up: Float8Kernel,
    bias: Float[Array, " width"],
    *,
    out_scale: float | None = None,
) -> Float[Array, "samples width"]:
    """x0 * (lows @ up + bias): what comes out of low-rank cross layers, of all their low ones.

    `widen` adds x0 * (low @ up + bias) to x in each layer, from x0 on: what it has added up to some
    layer is x0 times 1 + the sum of all (low @ up + bias), which is one matmul of the low ones side
    by side. It reads no x, of which float8 layers have but the rounded one. lows are e4m3, `up` has
    the inputs of all of them; out_scale as in `dense`.
    """
    sums = x0 * (product(jnp.concatenate(lows, axis=1), up) + bias)
    return finished(sums, "identity", out_scale).astype(out_dtype(x0, out_scale))


def dot(
    x: Float[Array, "samples columns"],
    *,
    vectors: int,
    keep: int,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples keep_and_pairs"]:
    """The first `keep` columns, then the dot product of each pair of a sample's vectors.

    x holds `vectors` vectors of equal dim side by side; pairs (i, j), i < j, go by i, then j.
    """
    apart = x.reshape(len(x), vectors, -1)
    products = jnp.einsum("nid,njd->nij", apart, apart, precision=precision)
    upper = jnp.triu_indices(vectors, k=1)
    return jnp.concatenate([x[:, :keep], products[:, *upper]], axis=1)


def pooled_dot(
    left: Float[Array, "samples left"],
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    slots: tuple[Slot, ...],
    precision: lax.Precision | None = None,
    gather: Callable[..., Any] = pooled_gather,
    interact: Callable[..., Any] = dot,
) -> Float[Array, "samples left_and_pairs"]:
    """`dot` of `left`, which is kept, and of what `pooled_gather` gives behind it; `gather` and
    `interact` may be others that do the same.
    """
    options: dict[str, Any] = {"slots": slots, "out_dtype": left.dtype, "left": left}
    x = gather(groups, rows, offsets, weights, **options)
    return interact(x, vectors=vectors_of(left, slots), keep=left.shape[1], precision=precision)


def vectors_of(left: Array, slots: Sequence[Slot]) -> int:
    """How many vectors of the slots' dim there are in `left` and behind it."""
    return left.shape[1] // slots[0].dim + len(slots)
