"""Narrow dense layers in one launch, for Hopper GPUs: an MLP whose activations stay in SMEM.

A launch of its own costs a small layer more than its arithmetic: the host a node of its CUDA graph,
the device a start, an end, and a trip of the activations through L2. A persistent kernel: every
block takes `ROWS` samples through all layers. One warpgroup loads, the samples' inputs and then the
weights, tile by tile, into a ring for each of two others, which multiply, every second `CHUNK` of a
layer's outputs each, and write activations into the one of two buffers in SMEM that they do not
read. After each layer they wait for each other.

Optionally the last layer gives scores: float32 sums without activation, of few outputs.

Grid: `blocks` (one per SM). 2 * samples * (sum of inputs * outputs) FLOP; each block reads all
weights for each of its `ROWS` samples, from L2: bytes * samples / ROWS.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mlp import (
    DTYPES,
    PADDED_TO,
    SHARED_BYTES,
    Ring,
    accumulated,
    for_every_row,
    swizzled,
    with_columns,
)
from pallas_kernels.reference import ACTIVATIONS

ROWS = 64
PIECE = 64  # columns of a swizzled tile
CHUNK = 128  # outputs that a warpgroup multiplies at a time
CONSUMERS = 2
WIDEST = 512
MOST_SCORES = 4
BARRIER_BYTES = 3072  # what barriers and alignment take of SMEM, at most


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """stages: tiles of [64, 128] weights in flight for each of the warpgroups that multiply."""

    stages: int = 3
    blocks: int = 132

    def __post_init__(self) -> None:
        if self.stages < 2 or self.blocks < 1:
            raise ValueError(f"chain config {self}: needs two stages and a block at least")


CONFIG = ChainConfig()


@dataclass(frozen=True, kw_only=True)
class ChainShape:
    """widths: of the input and of each layer's outputs, padded. scores: how many, 0 for none."""

    widths: tuple[int, ...]
    scores: int
    config: ChainConfig

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the layers that tensor cores multiply."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    def buffer_pieces(self, which: int) -> int:
        """Pieces of an activation buffer: the widest of every second array of activations."""
        return max(self.widths[which::2]) // PIECE

    @property
    def shared_bytes(self) -> int:
        """Buffers, rings of 16-bit items, and scores."""
        pieces = sum(self.buffer_pieces(which) for which in (0, 1))
        rings = CONSUMERS * self.config.stages * PIECE * CHUNK
        return 2 * (pieces * ROWS * PIECE + rings) + 4 * self.scores * ROWS + BARRIER_BYTES


def takes(widths: Sequence[int], scores: int = 0) -> bool:
    """Whether there is room for activations of these widths and so many scores."""
    if len(widths) < 2 or max(widths) > WIDEST or scores > MOST_SCORES:
        return False
    shape = ChainShape(widths=_padded(widths), scores=scores, config=CONFIG)
    return shape.shared_bytes <= SHARED_BYTES


def _padded(widths: Sequence[int]) -> tuple[int, ...]:
    """Of the input, in whole pieces, and of the layers, in whole chunks."""
    inputs, *outputs = widths
    return (inputs + -inputs % PIECE, *(width + -width % CHUNK for width in outputs))


def chain(
    x: Float[Array, "samples inputs"],
    kernels: Sequence[Float[Array, "_ _"]],
    biases: Sequence[Float[Array, " _"]],
    scores: tuple[Float[Array, "_ _"], Float[Array, " _"]] | None = None,
    *,
    activation: str,
    config: ChainConfig = CONFIG,
) -> Float[Array, "samples _"]:
    """The samples through all layers, each activation(x @ kernel + bias), rounded to x's dtype.

    Kernels may be padded (`mlp.pad_kernel`); biases say how many outputs there are. scores: the
    weights and bias of a last layer without activation, whose sums are given in float32. Any number
    of samples. Raises ValueError for dtypes other than bfloat16 and float16, an unknown activation,
    widths that `takes` does not, or shapes that do not match.
    """
    outputs = _check(x, kernels, biases, activation, scores)
    samples = len(x)
    widths = _padded([x.shape[1], *map(len, biases)])
    kernels = [
        jnp.pad(kernel, ((0, inputs - kernel.shape[0]), (0, columns - kernel.shape[1])))
        for kernel, inputs, columns in zip(kernels, widths, widths[1:], strict=False)
    ]
    shape = ChainShape(widths=widths, scores=outputs if scores else 0, config=config)
    dtype = jnp.dtype(jnp.float32) if scores else x.dtype
    if samples == 0:
        return jnp.zeros((0, outputs), dtype)
    x = jnp.pad(x, ((0, -samples % ROWS), (0, widths[0] - x.shape[1])))
    columns = [
        jnp.pad(bias.astype(jnp.float32), (0, width - len(bias)))[None]
        for bias, width in zip(biases, widths[1:], strict=True)
    ]
    out = _launch(x, kernels, columns, scores, activation, outputs, shape)
    return out.T[:samples] if scores else out[:samples, :outputs]


def _launch(
    x: Array,
    kernels: Sequence[Array],
    columns: Sequence[Array],
    scores: tuple[Array, Array] | None,
    activation: str,
    outputs: int,
    shape: ChainShape,
) -> Array:
    config = shape.config
    tile = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=swizzled(x.dtype, PIECE))
    buffers = [tile((shape.buffer_pieces(which), ROWS, PIECE)) for which in (0, 1)]
    ring = tile((CONSUMERS * config.stages, PIECE, CHUNK))
    last: tuple[Array, ...] = ()
    out_type = jax.ShapeDtypeStruct((len(x), outputs + -outputs % PIECE), x.dtype)
    if scores is not None:
        kernel, bias = scores
        weights = jnp.pad(kernel, ((0, shape.widths[-1] - len(kernel)), (0, 0))).T
        last = (weights.astype(jnp.float32), bias.astype(jnp.float32))
        out_type = jax.ShapeDtypeStruct((shape.scores, len(x)), jnp.float32)
    launch = plgpu.kernel(
        functools.partial(_body, activation=activation, shape=shape),
        out_type=out_type,
        scratch_types={
            "buffers": buffers,
            "ring_smem": ring,
            "scores_smem": [plgpu.SMEM((shape.scores, ROWS), jnp.float32)] if last else [],
            "x_loaded": plgpu.Barrier(num_arrivals=shape.widths[0] // PIECE),
            "loaded": plgpu.Barrier(num_barriers=CONSUMERS * config.stages),
            "consumed": plgpu.Barrier(num_barriers=CONSUMERS * config.stages),
            "layer_done": plgpu.Barrier(num_arrivals=CONSUMERS),
            "tile_done": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="mlp_chain",
    )
    return launch(x, *kernels, *columns, *last)


def _body(
    x_gmem: Any,
    *gmem: Any,
    buffers: Any,
    ring_smem: Any,
    scores_smem: Any,
    x_loaded: Any,
    loaded: Any,
    consumed: Any,
    layer_done: Any,
    tile_done: Any,
    activation: str,
    shape: ChainShape,
) -> None:
    """Warpgroup `CONSUMERS` loads, the ones before it multiply."""
    config, layers = shape.config, shape.layers
    kernels_gmem, columns_gmem = gmem[: len(layers)], gmem[len(layers) : 2 * len(layers)]
    *last_gmem, out_gmem = gmem[2 * len(layers) :]
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    tiles = x_gmem.shape[0] // ROWS
    own_tiles = lax.div(tiles - block + config.blocks - 1, config.blocks)

    def ring_of(consumer: Array | int) -> Ring:
        first = consumer * config.stages
        return Ring(loaded=loaded, consumed=consumed, slots=config.stages, first=first)

    def own_chunks(layer: int, consumer: Array | int) -> Any:
        """How many chunks of a layer a warpgroup multiplies: every second one."""
        return (layers[layer][1] // CHUNK - consumer + CONSUMERS - 1) // CONSUMERS

    def steps_before(layer: int, consumer: Array | int) -> Any:
        """Steps of its ring for a tile's layers before this one."""
        own = (own_chunks(i, consumer) * (layers[i][0] // PIECE) for i in range(layer))
        return sum(own, start=0)

    def rows_of(index: Array) -> Any:
        return pl.ds((block + index * config.blocks) * ROWS, ROWS)

    @pl.when(warpgroup == CONSUMERS)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        rings = [ring_of(consumer) for consumer in range(CONSUMERS)]
        tile_steps = [steps_before(len(layers), consumer) for consumer in range(CONSUMERS)]

        def load_chunk(consumer: int, layer: int, first_step: Array, chunk: Array) -> None:
            columns = pl.ds(chunk * CHUNK, CHUNK)

            @pl.loop(0, layers[layer][0] // PIECE)
            def _step(step: Array) -> None:
                slot, barrier = rings[consumer].filling(first_step + step)
                tile = kernels_gmem[layer].at[pl.ds(step * PIECE, PIECE), columns]
                plgpu.copy_gmem_to_smem(tile, ring_smem.at[slot], barrier)

        def load_layer(layer: int, index: Array) -> None:
            chunk_steps = layers[layer][0] // PIECE

            @pl.loop(0, -(-layers[layer][1] // CHUNK // CONSUMERS))
            def _turn(turn: Array) -> None:
                for consumer in range(CONSUMERS):
                    before = index * tile_steps[consumer] + steps_before(layer, consumer)

                    @pl.when(turn < own_chunks(layer, consumer))
                    def _own(consumer: int = consumer, before: Array = before) -> None:
                        chunk = turn * CONSUMERS + consumer
                        load_chunk(consumer, layer, before + turn * chunk_steps, chunk)

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            @pl.when(index > 0)
            def _reuse() -> None:
                plgpu.barrier_wait(tile_done)

            for piece in range(shape.widths[0] // PIECE):
                tile = x_gmem.at[rows_of(index), pl.ds(piece * PIECE, PIECE)]
                plgpu.copy_gmem_to_smem(tile, buffers[0].at[piece], x_loaded)
            for layer in range(len(layers)):
                load_layer(layer, index)

        for consumer in range(CONSUMERS):
            rings[consumer].drain(own_tiles * tile_steps[consumer])

        @pl.when(own_tiles > 0)
        def _last() -> None:
            plgpu.barrier_wait(tile_done)

    def multiply(source: Any, steps: int, first_step: Array) -> Array:
        def issue(sums: Sequence[Any], step: Array, slot: Array) -> None:
            plgpu.wgmma(sums[0], source.at[step], ring_smem.at[slot])

        (sums,) = accumulated(issue, [(ROWS, CHUNK)], ring_of(warpgroup), first_step, steps)
        return sums

    def run_layer(layer: int, index: Array) -> None:
        source, target = buffers[layer % 2], buffers[(layer + 1) % 2]
        steps = layers[layer][0] // PIECE
        before = index * steps_before(len(layers), warpgroup) + steps_before(layer, warpgroup)
        is_output = layer == len(layers) - 1 and not last_gmem

        @pl.loop(0, own_chunks(layer, warpgroup))
        def _chunk(turn: Array) -> None:
            chunk = turn * CONSUMERS + warpgroup
            sums = multiply(source, steps, before + turn * steps)
            for part in range(CHUNK // PIECE):
                piece = chunk * (CHUNK // PIECE) + part
                columns = pl.ds(piece * PIECE, PIECE)
                own = sums[:, part * PIECE : (part + 1) * PIECE]
                out = ACTIVATIONS[activation](with_columns(own, columns_gmem[layer], columns))
                target[piece] = out.astype(x_gmem.dtype)
                if is_output:
                    plgpu.commit_smem()

                    @pl.when(piece < out_gmem.shape[1] // PIECE)
                    def _store(piece: Array = piece, columns: Any = columns) -> None:
                        into = out_gmem.at[rows_of(index), columns]
                        plgpu.copy_smem_to_gmem(target.at[piece], into)

        plgpu.commit_smem()
        plgpu.barrier_arrive(layer_done)
        plgpu.barrier_wait(layer_done)

    def run_scores(index: Array) -> None:
        weights_gmem, bias_gmem = last_gmem
        source, (slots,) = buffers[len(layers) % 2], scores_smem
        for output in range(shape.scores):
            total = jnp.zeros((ROWS, PIECE), jnp.float32)
            for piece in range(shape.widths[-1] // PIECE):
                own = weights_gmem.at[output, pl.ds(piece * PIECE, PIECE)]
                weights = for_every_row(own, total.shape)
                total = total + source[piece].astype(jnp.float32) * weights
            slots[output] = total.sum(axis=1) + bias_gmem[output]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slots.at[output], out_gmem.at[output, rows_of(index)])

    @pl.when(warpgroup < CONSUMERS)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            plgpu.barrier_wait(x_loaded)
            for layer in range(len(layers)):
                run_layer(layer, index)
            if last_gmem:
                pl.when(warpgroup == 0)(lambda: run_scores(index))
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(tile_done)


def _check(
    x: Array,
    kernels: Sequence[Array],
    biases: Sequence[Array],
    activation: str,
    scores: tuple[Array, Array] | None,
) -> int:
    """How many outputs there are."""
    dtypes = {str(array.dtype) for array in (x, *kernels)}
    if len(dtypes) > 1 or not dtypes <= {*DTYPES}:
        raise ValueError(f"x and kernels are {sorted(dtypes)}: all bfloat16 or all float16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    widths = [x.shape[1], *map(len, biases)]
    outputs = scores[0].shape[1] if scores else 0
    if not takes(widths, outputs):
        raise ValueError(f"no chain of layers of {widths} and {outputs} scores")
    shapes = [kernel.shape for kernel in kernels]
    fits = len(kernels) == len(biases) and all(
        width <= inputs < width + PADDED_TO and behind <= columns < behind + PADDED_TO
        for width, behind, (inputs, columns) in zip(widths, widths[1:], shapes, strict=False)
    )
    if not fits or (scores is not None and scores[0].shape != (widths[-1], len(scores[1]))):
        found = [*shapes, *([scores[0].shape] if scores else [])]
        raise ValueError(f"layers of {widths}, kernels {found}")
    return outputs or widths[-1]
