"""The widening half of a low-rank cross layer, x0 * (low @ up + bias) + x, for Hopper GPUs.

A persistent kernel like `mlp`, but its warpgroups take turns: one multiplies a whole output tile
[block_m, block_n] while the other is in its epilogue. The parts of x0 and x that the epilogue needs
come by TMA too, in pieces of `PIECE` columns, ahead of their use; the result is written over x's
piece in SMEM and stored from there. Nothing else of the layer's width is read or written. Tiles go
by rows, from the last row up: what the matmul before has read last is met in L2.

Grid: `blocks` (one per SM). Per layer: 2 * samples * rank * width FLOP; 6 * samples * width bytes,
a third less where x is x0.
"""

import functools
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
    SHARED_BYTES,
    MlpConfig,
    Ring,
    load_bias,
    load_tile,
    multiply_tile,
    swizzled,
)

PIECE = 64
TURNS = 2  # warpgroups that multiply, tile by tile in turn


@dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """tile: what one warpgroup multiplies. piece_slots: pairs of pieces in flight."""

    tile: MlpConfig = MlpConfig(block_m=128, block_n=128, warpgroups=1)
    piece_slots: int = 3

    def __post_init__(self) -> None:
        if self.tile.warpgroups != 1:
            raise ValueError(f"cross config {self}: a tile is one warpgroup's")
        if self.piece_slots < 2:
            raise ValueError(f"cross config {self}: needs two piece slots at least")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"cross config {self}: {self.shared_bytes} bytes of SMEM, above {SHARED_BYTES}"
            )

    @property
    def shared_bytes(self) -> int:
        """Operand ring and pieces, 16-bit items."""
        tile = self.tile
        operands = tile.stages * tile.block_k * (tile.block_m + tile.block_n)
        return 2 * (operands + 2 * self.piece_slots * tile.block_m * PIECE)

    def takes(self, width: int, rank: int, dtype: Any) -> bool:
        """Whether there are whole tiles for these widths."""
        whole = width % self.tile.block_n == 0 and rank % self.tile.block_k == 0
        return whole and str(dtype) in DTYPES


CONFIG = CrossConfig()


def widen(
    x0: Float[Array, "samples width"],
    x: Float[Array, "samples width"],
    low: Float[Array, "samples rank"],
    up: Float[Array, "rank width"],
    bias: Float[Array, " width"],
    *,
    config: CrossConfig = CONFIG,
) -> Float[Array, "samples width"]:
    """x0 * (low @ up + bias) + x in x's dtype, in float32 up to the one rounding at the end.

    Any number of samples. Raises ValueError for shapes that do not match, dtypes that differ, and
    widths and dtypes that the config does not take.
    """
    _check(x0, x, low, up, bias, config)
    samples = len(x)
    if samples == 0:
        return x
    same = x0 is x
    rows = ((0, -samples % config.tile.block_m), (0, 0))
    x, low = jnp.pad(x, rows), jnp.pad(low, rows)
    x0 = x if same else jnp.pad(x0, rows)
    return _launch(low, up, bias.astype(jnp.float32), x0, x, same, config)[:samples]


def _launch(
    low: Array, up: Array, bias: Array, x0: Array, x: Array, same: bool, config: CrossConfig
) -> Array:
    tile = config.tile
    smem = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=swizzled())
    pieces = smem((config.piece_slots, tile.block_m, PIECE))
    barriers, piece_barriers = TURNS * tile.stages, TURNS * config.piece_slots
    piece_copies = 1 if same else 2
    launch = plgpu.kernel(
        functools.partial(_body, same=same, config=config),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={
            "low_smem": smem((tile.stages, tile.block_m, tile.block_k)),
            "up_smem": smem((tile.stages, tile.block_k, tile.block_n)),
            "x0_smem": pieces,
            "x_smem": pieces,
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=barriers),
            "consumed": plgpu.Barrier(num_barriers=barriers),
            "piece_loaded": plgpu.Barrier(num_arrivals=piece_copies, num_barriers=piece_barriers),
            "piece_free": plgpu.Barrier(num_barriers=piece_barriers),
        },
        grid=(tile.blocks,),
        grid_names=("block",),
        num_threads=TURNS + 1,
        thread_name="warpgroup",
        kernel_name="cross_widen",
    )
    return launch(low, up, bias, x0, x)


def _body(
    low_gmem: Any,
    up_gmem: Any,
    bias_gmem: Any,
    x0_gmem: Any,
    x_gmem: Any,
    out_gmem: Any,
    *,
    low_smem: Any,
    up_smem: Any,
    x0_smem: Any,
    x_smem: Any,
    loaded: Any,
    consumed: Any,
    piece_loaded: Any,
    piece_free: Any,
    same: bool,
    config: CrossConfig,
) -> None:
    """Warpgroup `TURNS` loads; warpgroup w of the others takes every `TURNS`-th tile from w."""
    tile = config.tile
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    tile_columns = x_gmem.shape[1] // tile.block_n
    tiles = x_gmem.shape[0] // tile.block_m * tile_columns
    steps = low_gmem.shape[1] // tile.block_k
    pieces = tile.block_n // PIECE
    own_tiles = lax.div(tiles - block + tile.blocks - 1, tile.blocks)
    ring = Ring(loaded=loaded, consumed=consumed, slots=tile.stages, steps=steps, turns=TURNS)
    piece_ring = Ring(
        loaded=piece_loaded,
        consumed=piece_free,
        slots=config.piece_slots,
        steps=pieces,
        turns=TURNS,
    )

    def place(index: Array) -> tuple[Array, Array]:
        from_last = tiles - 1 - (block + index * tile.blocks)
        row, column = lax.div(from_last, tile_columns), lax.rem(from_last, tile_columns)
        return row * tile.block_m, column * tile.block_n

    def columns_of(column: Array, piece: int) -> Any:
        return pl.ds(column + piece * PIECE, PIECE)

    @pl.when(warpgroup == TURNS)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load_piece(piece: Array, rows: Any, columns: Any) -> None:
            slot, barrier = piece_ring.filling(piece)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, columns], x_smem.at[slot], barrier)
            if not same:
                plgpu.copy_gmem_to_smem(x0_gmem.at[rows, columns], x0_smem.at[slot], barrier)

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            refs = (low_gmem, up_gmem, low_smem, up_smem, ring)
            row, column = place(index)
            load_tile(*refs, row, column, index * steps, steps, tile)
            for piece in range(pieces):
                rows = pl.ds(row, tile.block_m)
                load_piece(index * pieces + piece, rows, columns_of(column, piece))

        ring.drain(own_tiles * steps)
        piece_ring.drain(own_tiles * pieces)

    @pl.when(warpgroup < TURNS)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, lax.div(own_tiles - warpgroup + TURNS - 1, TURNS))
        def _tile(turn: Array) -> None:
            index = turn * TURNS + warpgroup
            row, column = place(index)
            refs = (low_smem, up_smem, ring)
            (product,) = multiply_tile(*refs, 0, index * steps, steps, tile)
            for piece in range(pieces):
                columns = columns_of(column, piece)
                high = product[:, piece * PIECE : (piece + 1) * PIECE]
                high = high + load_bias(bias_gmem, columns, tile.block_m)
                slot = piece_ring.filled(index * pieces + piece)
                x = x_smem[slot].astype(jnp.float32)
                x0 = x if same else x0_smem[slot].astype(jnp.float32)
                x_smem[slot] = (x0 * high + x).astype(x_smem.dtype)
                plgpu.commit_smem()
                out = out_gmem.at[pl.ds(row, tile.block_m), columns]
                plgpu.copy_smem_to_gmem(x_smem.at[slot], out)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                piece_ring.free(index * pieces + piece)

        plgpu.wait_smem_to_gmem(0)


def _check(x0: Array, x: Array, low: Array, up: Array, bias: Array, config: CrossConfig) -> None:
    dtypes = {str(a.dtype) for a in (x0, x, low, up)}
    if len(dtypes) > 1 or not dtypes <= {*DTYPES}:
        raise ValueError(f"x0, x, low and up are {sorted(dtypes)}: all bfloat16 or all float16")
    rank, width = up.shape
    shapes = [x0.shape, x.shape, low.shape, bias.shape]
    if shapes != [(len(x), width), (len(x), width), (len(x), rank), (width,)]:
        raise ValueError(f"x0, x, low and bias are {shapes}, up is {up.shape}")
    if not config.takes(width, rank, x.dtype):
        raise ValueError(f"no tiles for width {width} and rank {rank}: {config}")
