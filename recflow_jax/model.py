"""The DLRM: its parameters, and the reference forward that says what everything computes."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.float8 import FLOAT8, Float8Kernel, Kernel, input_scale_of, quantise_kernel
from pallas_kernels.tables import QuantisedTable
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig, dense_shapes
from recflow_jax.layout import Group, Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """kernel [inputs, outputs], an array or a Float8Kernel; bias [outputs]."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CrossLayer:
    """Low-rank cross layer: x0 * ((x @ down) @ up + bias) + x; down [width, rank].

    As a float8 layer, for `reference.gate`: `up` is a Float8Kernel of this layer's inputs behind
    those of the layers before, bias 1 + the sum of all of theirs.
    """

    down: Any
    up: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Params:
    """All parameters: stacked table groups (see Layout), arrays or QuantisedTables, and layers."""

    groups: tuple[Any, ...]
    bottom: tuple[DenseLayer, ...]
    cross: tuple[CrossLayer, ...]
    top: tuple[DenseLayer, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """Packed samples. dense float32 [n, dense_width], rows int32 [ids], offsets int32
    [n * slots + 1], weights float32 [ids] or None; ids behind the last offset are padding.
    """

    dense: Any
    rows: Any
    offsets: Any
    weights: Any = None


def to_device(layout: Layout, batch: JaggedBatch, *, ids: int) -> DeviceBatch:
    """The samples packed as the model takes them, ids padded to `ids` behind the last bag."""
    rows = np.zeros(ids, np.int32)
    rows[: len(batch.values)] = layout.rows(batch)
    weights = None
    if batch.weights is not None:
        weights = np.zeros(ids, np.float32)
        weights[: len(batch.values)] = batch.weights
    offsets = layout.slot_offsets(batch)
    return DeviceBatch(dense=batch.dense, rows=rows, offsets=offsets, weights=weights)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operations that back ends replace, signatures as in pallas_kernels.reference.

    What `dot` and `pooled_dot` give may be wider than the reference's, by zero columns that `dense`
    takes.
    chain_from: of (samples, kernels, scores behind them), the place of the first layer from which
    on they run as one `chain`; how many layers there are if none do.
    dense_columns: `dense` is fastest if its input has a multiple of so many columns.
    corun_configs: what `dense_with_gather` may be told to use, by name; none where it is no kernel.
    """

    pooled_gather: Callable[..., Any] = reference.pooled_gather
    gather_into: Callable[..., Any] = reference.gather_into
    dense: Callable[..., Any] = reference.dense
    dense_with_gather: Callable[..., Any] = reference.dense_with_gather
    widen: Callable[..., Any] = reference.widen
    gate: Callable[..., Any] = reference.gate
    dot: Callable[..., Any] = reference.dot
    pooled_dot: Callable[..., Any] = reference.pooled_dot
    chain: Callable[..., Any] = reference.chain
    chain_from: Callable[[int, Sequence[Kernel], int], int] = lambda _, kernels, __: len(kernels)
    dense_columns: int = 1
    corun_configs: tuple[str, ...] = ()


REFERENCE = Ops()


def param_shapes(config: DLRMConfig) -> Params:
    """The parameters as jax.ShapeDtypeStruct; layers are float32, tables of their own dtype."""

    def layer(inputs: int, outputs: int) -> DenseLayer:
        return DenseLayer(kernel=_f32(inputs, outputs), bias=_f32(outputs))

    width, rank = config.interaction_width, config.cross_rank
    bottom, top = dense_shapes(config)
    cross = CrossLayer(down=_f32(width, rank), up=_f32(rank, width), bias=_f32(width))
    return Params(
        groups=tuple(group_shape(group) for group in Layout.of(config).groups),
        bottom=tuple(layer(*shape) for shape in bottom),
        cross=(cross,) * config.cross_layers,
        top=tuple(layer(*shape) for shape in top),
    )


def group_shape(group: Group) -> jax.ShapeDtypeStruct | QuantisedTable:
    """A table group as jax.ShapeDtypeStruct, values [rows, dim] and scales [rows] if quantised."""
    values = jax.ShapeDtypeStruct((group.rows, group.dim), jnp.dtype(group.dtype))
    return QuantisedTable(values=values, scales=_f32(group.rows)) if group.quantised else values


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def with_compute_dtype(params: Params, config: DLRMConfig) -> Params:
    """The same parameters with kernels as config.compute_dtype wants them, or as they are where
    they are that already; biases stay float32, tables as they are. Raises ValueError for a float8
    model without input scales.
    """
    if len(config.input_scales) < config.float8_matmuls:
        raise ValueError(
            f"model {config.name!r}: its float8 layers have no input scales "
            "(recflow_jax.calibrate finds them)"
        )
    scales = iter(config.matmul_scales)

    def cast(kernel: Kernel) -> Kernel:
        scale = next(scales)
        if isinstance(kernel, Float8Kernel):
            return kernel
        return (
            kernel.astype(config.carried_dtype) if scale is None else quantise_kernel(kernel, scale)
        )

    def dense(layer: DenseLayer) -> DenseLayer:
        return dataclasses.replace(layer, kernel=cast(layer.kernel))

    # In the order in which they run.
    bottom = tuple([dense(layer) for layer in params.bottom])
    downs, low_scales = [], []
    for layer in params.cross:
        downs.append(cast(layer.down))
        low_scales.append(next(scales))
    top = tuple([dense(layer) for layer in params.top])
    ups = params.cross
    if config.compute_dtype == FLOAT8:
        ups = _gates(params.cross, low_scales)
    cross = [
        dataclasses.replace(layer, down=down, up=_carried(layer.up, config))
        for layer, down in zip(ups, downs, strict=True)
    ]
    return Params(groups=params.groups, bottom=bottom, cross=tuple(cross), top=top)


def _carried(kernel: Kernel, config: DLRMConfig) -> Kernel:
    return kernel if isinstance(kernel, Float8Kernel) else kernel.astype(config.carried_dtype)


def _gates(layers: tuple[CrossLayer, ...], low_scales: Sequence[float]) -> tuple[CrossLayer, ...]:
    """The layers with what `reference.gate` takes. All have the scales of the products of the last
    one, which adds up those of all: each low scale is part of its layer's weights.
    """
    if not layers or isinstance(layers[0].up, Float8Kernel):
        return layers
    scaled = [layer.up * scale for layer, scale in zip(layers, low_scales, strict=True)]
    of_all = quantise_kernel(jnp.concatenate(scaled), 1.0)
    gates, bias, inputs = [], jnp.float32(1), 0
    for layer, scale in zip(layers, low_scales, strict=True):
        bias, inputs = bias + layer.bias, inputs + len(layer.up)
        values = of_all.values[:, :inputs]
        up = dataclasses.replace(of_all, values=values, input_scale=scale)
        gates.append(dataclasses.replace(layer, up=up, bias=bias))
    return tuple(gates)


def forward(
    params: Params,
    batch: DeviceBatch,
    *,
    config: DLRMConfig,
    layout: Layout,
    precision: lax.Precision | None = None,
    ops: Ops = REFERENCE,
) -> Float[Array, "samples outputs"]:
    """Scores (logits, float32) of `batch`, in config.compute_dtype: the meaning of the engine.

    With compute_dtype float32, `precision=lax.Precision.HIGHEST` and the reference ops this is
    what every back end's answers are held against.
    """
    params = with_compute_dtype(params, config)
    dense = batch.dense.astype(config.carried_dtype)
    options: dict[str, Any] = {"precision": precision, "ops": ops}
    bottom = mlp(params.bottom, dense, config.activation, **options)
    if config.interaction == "dot" and layout.slots:
        bags = (params.groups, batch.rows, batch.offsets, batch.weights)
        x = ops.pooled_dot(bottom, *bags, slots=layout.slots, precision=precision)
        return scores(params.top, x, config.activation, **options)
    vectors = pool(params.groups, batch, config=config, layout=layout, left=bottom, ops=ops)
    scale = input_scale_of(params.top[0].kernel)
    x = interact(params.cross, vectors, config=config, out_scale=scale, **options)
    return scores(params.top, x, config.activation, **options)


def pool(
    groups: tuple[Any, ...],
    batch: DeviceBatch,
    *,
    config: DLRMConfig,
    layout: Layout,
    left: Float[Array, "samples left"] | None = None,
    ops: Ops = REFERENCE,
) -> Float[Array, "samples left_and_pooled"]:
    """The concatenated pooled rows of all sparse features, in config.carried_dtype, behind the
    columns of `left` (the bottom MLP's output) and before `columns_behind`.
    """
    dtype = jnp.dtype(config.carried_dtype)
    if not layout.slots:
        return jnp.zeros((len(batch.dense), 0), dtype) if left is None else left
    return ops.pooled_gather(
        *(groups, batch.rows, batch.offsets, batch.weights),
        slots=layout.slots,
        out_dtype=dtype,
        left=left,
        right=columns_behind(config, ops),
    )


def columns_behind(config: DLRMConfig, ops: Ops) -> int:
    """Zero columns behind the pooled ones, where they go into the top MLP as they are."""
    return -config.interaction_width % ops.dense_columns if config.interaction == "concat" else 0


def mlp(
    layers: tuple[DenseLayer, ...],
    x: Float[Array, "samples inputs"],
    activation: str,
    *,
    out_scale: float | None = None,
    precision: lax.Precision | None = None,
    ops: Ops = REFERENCE,
) -> Float[Array, "samples outputs"]:
    """Dense layers, each followed by the activation. out_scale: the input scale of a float8 layer
    behind them.
    """
    first = len(layers)
    if out_scale is None:
        first = ops.chain_from(len(x), [layer.kernel for layer in layers], 0)
    options: dict[str, Any] = {"precision": precision, "ops": ops}
    x = _one_by_one(layers[:first], x, activation, out_scale=out_scale, **options)
    if first == len(layers):
        return x
    operands = (x, *_parts(layers[first:]), None)
    return ops.chain(*operands, activation=activation, precision=precision)


def _parts(layers: tuple[DenseLayer, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(layer.kernel for layer in layers), tuple(layer.bias for layer in layers)


def _one_by_one(
    layers: tuple[DenseLayer, ...],
    x: Array,
    activation: str,
    *,
    out_scale: float | None = None,
    precision: lax.Precision | None,
    ops: Ops,
) -> Array:
    out_scales = [*(input_scale_of(layer.kernel) for layer in layers[1:]), out_scale]
    for layer, scale in zip(layers, out_scales, strict=False):
        options = {"activation": activation, "out_scale": scale, "precision": precision}
        x = ops.dense(x, layer.kernel, layer.bias, **options)
    return x


def scores(
    layers: tuple[DenseLayer, ...],
    x: Float[Array, "samples inputs"],
    activation: str,
    *,
    precision: lax.Precision | None = None,
    ops: Ops = REFERENCE,
) -> Float[Array, "samples outputs"]:
    """`mlp`, but the last layer gives float32 logits, whatever the dtype that feeds it."""
    hidden, last = layers[:-1], layers[-1]
    outputs = last.kernel.shape[1]
    first = ops.chain_from(len(x), [layer.kernel for layer in hidden], outputs)
    x = _one_by_one(hidden[:first], x, activation, precision=precision, ops=ops)
    if first < len(hidden):
        operands = (x, *_parts(hidden[first:]), (last.kernel, last.bias))
        return ops.chain(*operands, activation=activation, precision=precision)
    x = x[:, : len(last.kernel)]
    product = jnp.dot(x, last.kernel, precision=precision, preferred_element_type=jnp.float32)
    return product + last.bias


def interact(
    cross: tuple[CrossLayer, ...],
    vectors: Float[Array, "samples bottom_and_pooled"],
    *,
    config: DLRMConfig,
    out_scale: float | None = None,
    precision: lax.Precision | None = None,
    ops: Ops = REFERENCE,
) -> Float[Array, "samples width"]:
    """The interaction of config: `concat`, `dot` or `dcn` (see DLRMConfig). `vectors` are the
    bottom MLP's output and the pooled rows; out_scale as in `mlp`, for `dcn`.
    """
    if config.interaction == "dot":
        return ops.dot(
            vectors, vectors=config.dot_vectors, keep=config.bottom_width, precision=precision
        )
    x, lows = vectors, []
    out_scales = [*(input_scale_of(layer.down) for layer in cross[1:]), out_scale]
    for layer, scale in zip(cross, out_scales, strict=False):
        no_bias = jnp.zeros(layer.down.shape[1], jnp.float32)
        low_scale = input_scale_of(layer.up)
        options = {"activation": "identity", "out_scale": low_scale, "precision": precision}
        low = ops.dense(x, layer.down, no_bias, **options)
        if low_scale is None:
            x = ops.widen(vectors, x, low, layer.up, layer.bias, precision=precision)
        else:
            lows.append(low)
            x = ops.gate(vectors, tuple(lows), layer.up, layer.bias, out_scale=scale)
    return x
