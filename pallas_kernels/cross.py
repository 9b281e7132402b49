"""The widening half of low-rank cross layers for Hopper GPUs: `widen` of floats, of one layer,
x0 * (low @ up + bias) + x; `gate` of e4m3, of all layers so far, x0 * (lows @ up + bias).

A persistent kernel like `mlp`, but its warpgroups take turns: one multiplies a whole output tile
[block_m, block_n] while the other is in its epilogue. The parts of x0 and x that the epilogue
needs come by TMA too, in pieces of `PIECE` columns, ahead of their use; `widen` writes the result
over x's piece in SMEM and stores it from there, `gate`, whose result is smaller, from slots of its
own. Nothing else of the layer's width is read or written. Tiles go by rows, from the last row up:
what the matmul before has read last is met in L2.

Grid: `blocks` (one per SM), in clusters. `widen`: 2 * samples * rank * width FLOP; 6 * samples *
width bytes, a third less where x is x0. `gate`, in layer n: n times the FLOP, of e4m3; 3 * samples
* width bytes.
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

from pallas_kernels.float8 import FLOAT8, Float8Kernel
from pallas_kernels.mlp import (
    DTYPES,
    SHARED_BYTES,
    MlpConfig,
    Ring,
    kernel_tile,
    load_tile,
    multiply_tile,
    step_items,
    swizzled,
    with_columns,
)
from pallas_kernels.reference import finished

PIECE = 64
CLUSTER, MEMBER = "cluster", "member"
TURNS = 2  # warpgroups that multiply, tile by tile in turn
OUT_SLOTS = 2  # of each, for pieces of what `gate` gives


@dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """tile: what one warpgroup multiplies. piece_slots: pieces of x0, and of x, in flight.
    cluster: blocks whose tiles are one below the other, so that each loads a part of `up`'s for all
    of them (TMA multicast).
    """

    tile: MlpConfig = MlpConfig(block_m=128, block_n=128, warpgroups=1)
    piece_slots: int = 3
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.tile.warpgroups != 1:
            raise ValueError(f"cross config {self}: a tile is one warpgroup's")
        if self.piece_slots < 2:
            raise ValueError(f"cross config {self}: needs two piece slots at least")
        if self.cluster < 1 or self.tile.blocks % self.cluster:
            raise ValueError(f"cross config {self}: no whole clusters")
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

    @property
    def rows(self) -> int:
        """Rows of a cluster's tiles."""
        return self.cluster * self.tile.block_m

    @property
    def clusters(self) -> int:
        """Clusters of the card."""
        return self.tile.blocks // self.cluster

    @property
    def grid(self) -> dict[str, Any]:
        """What `plgpu.kernel` launches: axis CLUSTER and, where a cluster has several, MEMBER."""
        grid: dict[str, Any] = {"grid": (self.clusters,), "grid_names": (CLUSTER,)}
        if self.cluster > 1:
            grid |= {"cluster": (self.cluster,), "cluster_names": (MEMBER,)}
        return grid

    def takes(self, width: int, rank: int, dtype: Any) -> bool:
        """Whether there are whole tiles for these widths and operands."""
        whole = width % self.tile.block_n == 0 and rank % step_items(self.tile, dtype) == 0
        return whole and str(dtype) in (*DTYPES, FLOAT8)


CONFIG = CrossConfig()
PAIRED = CrossConfig(cluster=2)


def widen(
    x0: Float[Array, "samples width"],
    x: Float[Array, "samples width"],
    low: Float[Array, "samples rank"],
    up: Float[Array, "rank width"],
    bias: Float[Array, " width"],
    *,
    config: CrossConfig | None = None,
) -> Float[Array, "samples width"]:
    """x0 * (low @ up + bias) + x in x's dtype, in float32 up to the one rounding at the end.

    Any number of samples. Raises ValueError for shapes that do not match, dtypes that differ, and
    widths and dtypes that the config does not take. config: None takes PAIRED where there are rows
    for it.
    """
    config = config or _config_for(len(x))
    _check(x0, x, low, up, bias, config)
    samples = len(x)
    if samples == 0:
        return x
    same = x0 is x
    rows = ((0, -samples % config.rows), (0, 0))
    x, low = jnp.pad(x, rows), jnp.pad(low, rows)
    x0 = x if same else jnp.pad(x0, rows)
    columns = bias.astype(jnp.float32)[None]
    return _launch((low,), up, columns, (x,) if same else (x, x0), None, config)[:samples]


def gate(
    x0: Float[Array, "samples width"],
    lows: Sequence[Float[Array, "samples _"]],
    up: Float8Kernel,
    bias: Float[Array, " width"],
    *,
    out_scale: float,
    config: CrossConfig | None = None,
) -> Float[Array, "samples width"]:
    """x0 * (lows side by side @ up + bias), rounded by out_scale to e4m3, as lows are.

    Any number of samples. Raises ValueError for shapes that do not match, dtypes other than these,
    and widths that the config does not take. config: None takes PAIRED where there are rows for it.
    """
    config = config or _config_for(len(x0))
    _check_gate(x0, lows, up, bias, config)
    samples = len(x0)
    if samples == 0:
        return x0.astype(FLOAT8)
    rows = ((0, -samples % config.rows), (0, 0))
    x0, *lows = (jnp.pad(array, rows) for array in (x0, *lows))
    columns = jnp.stack([bias.astype(jnp.float32), up.scales])
    return _launch(tuple(lows), up.values, columns, (x0,), out_scale, config)[:samples]


def _config_for(samples: int) -> CrossConfig:
    return PAIRED if samples > CONFIG.rows else CONFIG


def _launch(
    lows: tuple[Array, ...],
    up: Array,
    columns: Array,
    wide: tuple[Array, ...],
    out_scale: float | None,
    config: CrossConfig,
) -> Array:
    """wide: x, and x0 where that is another array; of `gate`, which has an out_scale, x0."""
    tile, x = config.tile, wide[0]
    gating = out_scale is not None
    operand = functools.partial(plgpu.SMEM, dtype=up.dtype, transforms=swizzled(up.dtype))
    out_dtype = jnp.dtype(FLOAT8) if gating else x.dtype

    def pieces(*slots: int, dtype: Any) -> Any:
        shape = (*slots, tile.block_m, PIECE)
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, PIECE))

    used = plgpu.Barrier
    if config.cluster > 1:
        used = functools.partial(plgpu.ClusterBarrier, collective_axes=(MEMBER,))
    barriers, piece_barriers = TURNS * tile.stages, TURNS * config.piece_slots
    launch = plgpu.kernel(
        functools.partial(_body, out_scale=out_scale, config=config),
        out_type=jax.ShapeDtypeStruct(x.shape, out_dtype),
        scratch_types={
            "low_smem": operand((tile.stages, tile.block_m, step_items(tile, up.dtype))),
            "up_smem": operand((tile.stages, *kernel_tile(tile, up.dtype))),
            "wide_smem": [pieces(config.piece_slots, dtype=x.dtype) for _ in wide],
            "out_smem": [pieces(TURNS, OUT_SLOTS, dtype=out_dtype)] if gating else [],
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=barriers),
            "consumed": used(num_barriers=barriers),
            "piece_loaded": plgpu.Barrier(num_arrivals=len(wide), num_barriers=piece_barriers),
            "piece_free": plgpu.Barrier(num_barriers=piece_barriers),
        },
        **config.grid,
        num_threads=TURNS + 1,
        thread_name="warpgroup",
        kernel_name="cross_gate" if gating else "cross_widen",
    )
    return launch(up, columns, *wide, *lows)


def _body(
    up_gmem: Any,
    columns_gmem: Any,
    *gmem: Any,
    low_smem: Any,
    up_smem: Any,
    wide_smem: Any,
    out_smem: Any,
    loaded: Any,
    consumed: Any,
    piece_loaded: Any,
    piece_free: Any,
    out_scale: float | None,
    config: CrossConfig,
) -> None:
    """Warpgroup `TURNS` loads; warpgroup w of the others takes every `TURNS`-th tile from w."""
    tile = config.tile
    warpgroup = lax.axis_index("warpgroup")
    cluster = lax.axis_index(CLUSTER)
    shared_by = MEMBER if config.cluster > 1 else None
    member = lax.axis_index(MEMBER) if config.cluster > 1 else 0
    *inputs, out_gmem = gmem
    wide_gmem, lows_gmem = inputs[: len(wide_smem)], inputs[len(wide_smem) :]
    tile_columns = out_gmem.shape[1] // tile.block_n
    units = tile.tiles(out_gmem.shape) // config.cluster
    low_steps = [low.shape[1] // low_smem.shape[-1] for low in lows_gmem]
    steps = sum(low_steps)
    pieces = tile.block_n // PIECE
    own_tiles = lax.div(units - cluster + config.clusters - 1, config.clusters)
    ring = Ring(loaded=loaded, consumed=consumed, slots=tile.stages, steps=steps, turns=TURNS)
    piece_ring = Ring(
        loaded=piece_loaded,
        consumed=piece_free,
        slots=config.piece_slots,
        steps=pieces,
        turns=TURNS,
    )

    def place(index: Array) -> tuple[Array, Array]:
        from_last = units - 1 - (cluster + index * config.clusters)
        row, column = lax.div(from_last, tile_columns), lax.rem(from_last, tile_columns)
        return row * config.rows + member * tile.block_m, column * tile.block_n

    def columns_of(column: Array, piece: int) -> Any:
        return pl.ds(column + piece * PIECE, PIECE)

    @pl.when(warpgroup == TURNS)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            row, column = place(index)
            before = 0
            for low_gmem, count in zip(lows_gmem, low_steps, strict=True):
                refs = (low_gmem, up_gmem, low_smem, up_smem, ring)
                step = index * steps + before
                options = {"first_kernel_k": before, "shared_by": shared_by}
                load_tile(*refs, row, column, step, count, tile, **options)
                before += count
            rows = pl.ds(row, tile.block_m)
            for piece in range(pieces):
                slot, barrier = piece_ring.filling(index * pieces + piece)
                for gmem, smem in zip(wide_gmem, wide_smem, strict=True):
                    piece_gmem = gmem.at[rows, columns_of(column, piece)]
                    plgpu.copy_gmem_to_smem(piece_gmem, smem.at[slot], barrier)

        ring.drain(own_tiles * steps)
        piece_ring.drain(own_tiles * pieces)

    def widened(slot: Array, high: Array) -> Any:
        """Where x0 * high + x lies: over x, as there is no room for more."""
        x, *others = [smem[slot].astype(jnp.float32) for smem in wide_smem]
        (x0,) = others or (x,)
        wide_smem[0][slot] = (x0 * high + x).astype(out_gmem.dtype)
        return wide_smem[0].at[slot]

    def gated(slot: Array, high: Array, piece: Array) -> Any:
        """Where x0 * high lies, rounded."""
        (x0_smem,), (slots,) = wide_smem, out_smem
        out = slots.at[warpgroup, lax.rem(piece, OUT_SLOTS)]
        plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
        out[...] = finished(x0_smem[slot].astype(jnp.float32) * high, "identity", out_scale)
        return out

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
                sums = product[:, piece * PIECE : (piece + 1) * PIECE]
                high = with_columns(sums, columns_gmem, columns)
                step = index * pieces + piece
                slot = piece_ring.filled(step)
                out = out_gmem.at[pl.ds(row, tile.block_m), columns]
                if out_smem:
                    result = gated(slot, high, turn * pieces + piece)
                else:
                    result = widened(slot, high)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(result, out)
                if not out_smem:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                piece_ring.free(step)

        plgpu.wait_smem_to_gmem(0)


def _check_gate(
    x0: Array, lows: Sequence[Array], up: Float8Kernel, bias: Array, config: CrossConfig
) -> None:
    if str(x0.dtype) not in DTYPES or {str(low.dtype) for low in lows} != {FLOAT8}:
        found = sorted({str(low.dtype) for low in lows})
        raise ValueError(f"x0 is {x0.dtype}, lows are {found}: a 16-bit float and {FLOAT8}")
    ranks, width = up.shape
    lengths = {len(low) for low in lows}
    if lengths != {len(x0)} or sum(low.shape[1] for low in lows) != ranks:
        raise ValueError(f"x0 is {x0.shape}, lows are {[low.shape for low in lows]}, up {up.shape}")
    if x0.shape[1] != width or bias.shape != (width,):
        raise ValueError(f"x0 is {x0.shape}, bias {bias.shape}, up {up.shape}")
    if not all(config.takes(width, low.shape[1], FLOAT8) for low in lows):
        raise ValueError(f"no tiles for width {width} and ranks {[len(low[0]) for low in lows]}")


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
