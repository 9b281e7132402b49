"""One MLP layer, activation(x @ kernel + bias), for Hopper GPUs.

A persistent kernel: every block walks output tiles [block_m, block_n]. One warpgroup keeps TMA
copies of the operands' [block_m, block_k] and [block_k, block_n] tiles `stages` steps ahead in a
ring in SMEM; the others each multiply 64 * k rows of the tile with wgmma, accumulate in float32
registers, and in the epilogue add the bias, apply the activation, round, and store through SMEM.

Grid: `blocks` (one per SM). Per layer: 2 * m * n * k FLOP; (m * k + k * n + m * n) * 2 bytes.
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

from pallas_kernels.reference import ACTIVATIONS

DTYPES = ("bfloat16", "float16")
ROWS_PER_WGMMA = 64
SWIZZLE = 128
SWIZZLE_ITEMS = SWIZZLE // 2
TMA_ITEMS = 8  # a row starts at a multiple of 16 bytes
SHARED_BYTES = 227 * 1024
PADDED_TO = 64
OUT_COLUMNS = 64  # the epilogue stores a tile in pieces of so many columns, through two slots
OUT_SLOTS = 2


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Tile sizes and depths of one launch.

    The block specs: x tiles [block_m, block_k] and kernel tiles [block_k, block_n] in SMEM, both
    tiled (8, 64) and swizzled by 128 bytes; `warpgroups` share the rows of a tile.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    warpgroups: int = 2
    blocks: int = 132

    def __post_init__(self) -> None:
        owner = f"mlp config {self}"
        if self.block_m % (ROWS_PER_WGMMA * self.warpgroups):
            raise ValueError(f"{owner}: block_m is no multiple of 64 per warpgroup")
        if self.block_n % SWIZZLE_ITEMS or self.block_n > 256:
            raise ValueError(f"{owner}: block_n is no multiple of 64 up to 256")
        if self.block_k % SWIZZLE_ITEMS:
            raise ValueError(f"{owner}: block_k is no multiple of 64")
        if min(self.stages, self.warpgroups, self.blocks) < 1 or self.stages < 2:
            raise ValueError(f"{owner}: needs two stages, a warpgroup and a block at least")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{owner}: {self.shared_bytes} bytes of SMEM, above {SHARED_BYTES}")

    @property
    def rows(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.block_m // self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Operand ring and output slots, 16-bit items."""
        operands = self.stages * self.block_k * (self.block_m + self.block_n)
        return 2 * (operands + OUT_SLOTS * self.block_m * OUT_COLUMNS)


CONFIGS = (
    MlpConfig(),
    MlpConfig(block_n=128),
    MlpConfig(block_n=64),
    MlpConfig(block_m=64, block_n=128, warpgroups=1),
    MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=6),
)
# Share of the matmul rate that a full wave of each config's tiles reaches: a first guess.
_EFFICIENCY = (1.0, 0.85, 0.6, 0.55, 0.4)


def choose_config(m: int, n: int) -> MlpConfig:
    """The config whose waves of tiles take least time for an [m, n] output, by area per wave."""

    def cost(choice: tuple[MlpConfig, float]) -> float:
        config, efficiency = choice
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        waves = -(-tiles // config.blocks)
        return waves * config.block_m * config.block_n / efficiency

    fitting = [
        choice for choice in zip(CONFIGS, _EFFICIENCY, strict=True) if n % choice[0].block_n == 0
    ]
    return min(fitting, key=cost)[0]


def leaves_card_idle(m: int, n: int, k: int) -> bool:
    """Whether the tiles are too few and too deep for one tile per SM to be a good plan.

    There a matmul that also splits K is faster: XLA took 8.6 us against 10.8 at 256 x 1024 x 3456
    and 37 against 70 at 512 x 1024 x 24768, but 15.0 against 14.1 at 1024 x 1024 x 3456 (H200).
    """
    return k >= 2048 and m * n <= 512 * 1024


def pad_kernel(kernel: Float[Array, "inputs outputs"]) -> Float[Array, "inputs_up outputs_up"]:
    """The weights with zero rows and columns up to multiples of 64: done once, at load time."""
    inputs, outputs = kernel.shape
    return jnp.pad(kernel, ((0, -inputs % PADDED_TO), (0, -outputs % PADDED_TO)))


def dense(
    x: Float[Array, "samples inputs"],
    kernel: Float[Array, "inputs_up outputs_up"],
    bias: Float[Array, " outputs"],
    *,
    activation: str,
    config: MlpConfig | None = None,
) -> Float[Array, "samples outputs"]:
    """activation(x @ kernel + bias) in x's dtype, accumulated in float32.

    `kernel` may be padded (`pad_kernel`); the bias says how many outputs there are. Any number of
    samples, inputs and outputs: what is no multiple of a tile is padded inside. Raises ValueError
    for dtypes other than bfloat16 and float16, an unknown activation, or shapes that do not match.
    """
    _check(x, kernel, bias, activation)
    samples, outputs = len(x), len(bias)
    if samples == 0:
        return jnp.zeros((0, outputs), x.dtype)
    kernel = pad_kernel(kernel)
    config = config or choose_config(samples, kernel.shape[1])
    x = jnp.pad(x, ((0, -samples % config.block_m), (0, _missing_inputs(x, kernel))))
    missing_outputs = -kernel.shape[1] % config.block_n
    kernel = jnp.pad(kernel, ((0, 0), (0, missing_outputs)))
    bias = jnp.pad(bias.astype(jnp.float32), (0, kernel.shape[1] - outputs))
    return _launch(x, kernel, bias, activation, config)[:samples, :outputs]


def _missing_inputs(x: Array, kernel: Array) -> int:
    """Zero columns that x needs: none where its rows are whole vectors of TMA's, which fills in
    zeros behind their ends itself.
    """
    return 0 if x.shape[1] % TMA_ITEMS == 0 else kernel.shape[0] - x.shape[1]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Slots in SMEM that are filled and used in order, step by step, and their barriers.

    `loaded` and `consumed` are `slots` barriers per turn. Every `steps` steps the next of `turns`
    warpgroups is the one that uses them: each waits at barriers of its own, as a warpgroup that
    misses a phase of a barrier cannot wait for the next one.
    """

    loaded: Any
    consumed: Any
    slots: int
    steps: int = 1
    turns: int = 1

    def slot(self, step: Array) -> Array:
        """Where `step` lies."""
        return lax.rem(step, self.slots)

    def _barrier(self, barriers: Any, step: Array) -> Any:
        turn = lax.rem(lax.div(step, self.steps), self.turns) if self.turns > 1 else 0
        return barriers.at[self.slot(step) + turn * self.slots]

    def filling(self, step: Array) -> tuple[Array, Any]:
        """The slot of `step`, once it is free, and the barrier at which its copies arrive."""

        @pl.when(step >= self.slots)
        def _reuse() -> None:
            plgpu.barrier_wait(self._barrier(self.consumed, step - self.slots))

        return self.slot(step), self._barrier(self.loaded, step)

    def filled(self, step: Array) -> Array:
        """The slot of `step`, once its copies are there."""
        plgpu.barrier_wait(self._barrier(self.loaded, step))
        return self.slot(step)

    def free(self, step: Array) -> None:
        """Says that the slot of `step` has been used."""
        plgpu.barrier_arrive(self._barrier(self.consumed, step))

    def drain(self, steps: Array) -> None:
        """Waits until the last slots that were filled in `steps` steps are free again."""
        last = lax.min(steps, self.slots)

        @pl.loop(0, last)
        def _slot(index: Array) -> None:
            plgpu.barrier_wait(self._barrier(self.consumed, steps - last + index))


def _launch(x: Array, kernel: Array, bias: Array, activation: str, config: MlpConfig) -> Array:
    dtype = x.dtype
    tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=swizzled())
    launch = plgpu.kernel(
        functools.partial(_body, activation=activation, config=config),
        out_type=jax.ShapeDtypeStruct((len(x), kernel.shape[1]), dtype),
        scratch_types={
            "x_smem": tile((config.stages, config.block_m, config.block_k)),
            "kernel_smem": tile((config.stages, config.block_k, config.block_n)),
            "out_smem": tile((config.warpgroups, OUT_SLOTS, config.rows, OUT_COLUMNS)),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            "consumed": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        },
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mlp_layer",
    )
    return launch(x, kernel, bias)


def swizzled() -> tuple[Any, ...]:
    # Abstract to the type checker alone: JAX fills in what is missing.
    tiling = plgpu.TilingTransform((8, SWIZZLE_ITEMS))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(SWIZZLE)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def _body(
    x_gmem: Any,
    kernel_gmem: Any,
    bias_gmem: Any,
    out_gmem: Any,
    *,
    x_smem: Any,
    kernel_smem: Any,
    out_smem: Any,
    loaded: Any,
    consumed: Any,
    activation: str,
    config: MlpConfig,
) -> None:
    """Warpgroup `config.warpgroups` loads, the ones before it multiply."""
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    tile_columns = kernel_gmem.shape[1] // config.block_n
    tiles = x_gmem.shape[0] // config.block_m * tile_columns
    steps = kernel_gmem.shape[0] // config.block_k
    pieces = config.block_n // OUT_COLUMNS
    own_tiles = lax.div(tiles - block + config.blocks - 1, config.blocks)
    ring = Ring(loaded=loaded, consumed=consumed, slots=config.stages)

    def place(index: Array) -> tuple[Array, Array]:
        tile = block + index * config.blocks
        row, column = lax.div(tile, tile_columns), lax.rem(tile, tile_columns)
        return row * config.block_m, column * config.block_n

    @pl.when(warpgroup == config.warpgroups)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            refs = (x_gmem, kernel_gmem, x_smem, kernel_smem, ring)
            load_tile(*refs, *place(index), index * steps, steps, config)

        ring.drain(own_tiles * steps)

    @pl.when(warpgroup < config.warpgroups)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, own_tiles)
        def _tile(index: Array) -> None:
            row, column = place(index)
            own = warpgroup * config.rows
            refs = (x_smem, kernel_smem, ring)
            product = multiply_tile(*refs, own, index * steps, steps, config)
            rows = pl.ds(row + own, config.rows)
            for piece in range(pieces):
                columns = pl.ds(column + piece * OUT_COLUMNS, OUT_COLUMNS)
                start = piece * OUT_COLUMNS
                out = ACTIVATIONS[activation](
                    product[:, start : start + OUT_COLUMNS]
                    + load_bias(bias_gmem, columns, config.rows)
                )
                slot = out_smem.at[warpgroup, lax.rem(index * pieces + piece, OUT_SLOTS)]
                plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
                slot[...] = out.astype(out_gmem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot, out_gmem.at[rows, columns])

        plgpu.wait_smem_to_gmem(0)


def load_bias(bias_gmem: Any, columns: Any, rows: int) -> Array:
    """The bias of `columns`, for every row, in the layout of the accumulator."""
    layout = plgpu.Layout.WGMMA.reduce(0)
    bias = plgpu.load(bias_gmem.at[columns], layout=layout, optimized=False)
    return lax.broadcast_in_dim(bias, (rows, columns.size), (1,))


def load_tile(
    x_gmem: Any,
    kernel_gmem: Any,
    x_smem: Any,
    kernel_smem: Any,
    ring: Ring,
    row: Array,
    column: Array,
    first_step: Array,
    steps: int,
    config: MlpConfig,
) -> None:
    """Copies the operands of one output tile, step by step, into ring slots that are free."""

    @pl.loop(0, steps)
    def _step(step: Array) -> None:
        slot, barrier = ring.filling(first_step + step)
        k = pl.ds(step * config.block_k, config.block_k)
        x_tile = x_gmem.at[pl.ds(row, config.block_m), k]
        kernel_tile = kernel_gmem.at[k, pl.ds(column, config.block_n)]
        plgpu.copy_gmem_to_smem(x_tile, x_smem.at[slot], barrier)
        plgpu.copy_gmem_to_smem(kernel_tile, kernel_smem.at[slot], barrier)


def multiply_tile(
    x_smem: Any,
    kernel_smem: Any,
    ring: Ring,
    first_row: Array | int,
    first_step: Array,
    steps: int,
    config: MlpConfig,
) -> Array:
    """`config.rows` rows of one output tile, float32; frees each slot one step later."""

    def accumulate(acc: Any) -> Array:
        @pl.loop(0, steps)
        def _step(step: Array) -> None:
            slot = ring.filled(first_step + step)
            rows = pl.ds(first_row, config.rows)
            plgpu.wgmma(acc, x_smem.at[slot, rows], kernel_smem.at[slot])
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _free_previous() -> None:
                ring.free(first_step + step - 1)

        plgpu.wgmma_wait(0)
        ring.free(first_step + steps - 1)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((config.rows, config.block_n)))


def _check(x: Array, kernel: Array, bias: Array, activation: str) -> None:
    if str(x.dtype) not in DTYPES or x.dtype != kernel.dtype:
        raise ValueError(f"x is {x.dtype}, kernel {kernel.dtype}: both bfloat16 or both float16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    inputs, outputs = kernel.shape
    if not inputs - PADDED_TO < x.shape[1] <= inputs:
        raise ValueError(f"x has {x.shape[1]} inputs, the kernel {inputs}")
    if not outputs - PADDED_TO < len(bias) <= outputs:
        raise ValueError(f"the bias has {len(bias)} outputs, the kernel {outputs}")
