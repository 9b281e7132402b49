"""One MLP layer, activation(x @ kernel + bias), for Hopper GPUs.

A persistent kernel: every block walks output tiles [block_m, block_n]. One warpgroup keeps TMA
copies of the operands' [block_m, block_k] and [block_k, block_n] tiles `stages` steps ahead in a
ring in SMEM; the others each multiply 64 * k rows of the tile with wgmma, accumulate in float32
registers, and in the epilogue add the bias, apply the activation, round, and store through SMEM.
Operands are 16-bit floats or e4m3 (see `float8`), whose steps are twice as long: as many bytes.
Where tiles are fewer than SMs and k is long, k is cut into `splits`: each tile is then computed in
as many parts, stored as they are in float32, and XLA adds them up in one pass with the epilogue.

Grid: `blocks` (one per SM). Per layer: 2 * m * n * k FLOP; (m * k + k * n + m * n) * 2 bytes, and
8 * splits * m * n more where splits > 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.float8 import FLOAT8, Float8Kernel, Kernel, rounded
from pallas_kernels.reference import ACTIVATIONS, finished, identity, out_dtype

DTYPES = ("bfloat16", "float16")
ROWS_PER_WGMMA = 64
SWIZZLE = 128
SWIZZLE_ITEMS = SWIZZLE // 2
SHARED_BYTES = 227 * 1024
PADDED_TO = 64


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Tile sizes and depths of one launch.

    The block specs: x tiles [block_m, block_k] and kernel tiles [block_k, block_n] in SMEM, both
    tiled (8, 64) and swizzled by 128 bytes; of e4m3 operands [block_m, 2 * block_k] and
    [block_n, 2 * block_k], tiled (8, 128). `warpgroups` share the rows of a tile. splits: parts
    that k is cut into, at most one per step. out_slots: the epilogue stores a tile in
    pieces of SWIZZLE bytes a row, through so many slots. wgmma_columns: of one wgmma at most, whose
    sums need half as many registers at launch.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    warpgroups: int = 2
    blocks: int = 132
    splits: int = 1
    out_slots: int = 2
    wgmma_columns: int = 256

    def __post_init__(self) -> None:
        owner = f"mlp config {self}"
        if self.block_m % (ROWS_PER_WGMMA * self.warpgroups):
            raise ValueError(f"{owner}: block_m is no multiple of 64 per warpgroup")
        if self.block_n % SWIZZLE_ITEMS or self.block_n > 256:
            raise ValueError(f"{owner}: block_n is no multiple of 64 up to 256")
        if self.block_n % self.wgmma_n or self.wgmma_n % SWIZZLE_ITEMS:
            raise ValueError(f"{owner}: no whole wgmmas, of a multiple of 64, in block_n")
        if self.block_k % SWIZZLE_ITEMS:
            raise ValueError(f"{owner}: block_k is no multiple of 64")
        if min(self.warpgroups, self.blocks, self.splits, self.out_slots) < 1 or self.stages < 2:
            raise ValueError(
                f"{owner}: needs two stages, a warpgroup, a block, a split and an out slot at least"
            )
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{owner}: {self.shared_bytes} bytes of SMEM, above {SHARED_BYTES}")

    @property
    def rows(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.block_m // self.warpgroups

    @property
    def wgmma_n(self) -> int:
        """Columns of one wgmma."""
        return min(self.block_n, self.wgmma_columns)

    def tiles(self, shape: tuple[int, ...]) -> int:
        """Tiles of an output [rows, columns] of whole ones."""
        rows, columns = shape
        return (rows // self.block_m) * (columns // self.block_n)

    @property
    def shared_bytes(self) -> int:
        """Operand ring of 16-bit items, and output slots."""
        operands = self.stages * self.block_k * (self.block_m + self.block_n)
        return 2 * operands + self.out_slots * self.block_m * SWIZZLE


CONFIGS = (
    MlpConfig(),
    MlpConfig(block_n=128),
    MlpConfig(block_n=64),
    MlpConfig(block_m=64, block_n=128, warpgroups=1),
    MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=6),
)
# Share of the matmul rate that a full wave of each config's tiles reaches: a first guess.
_EFFICIENCY = {(256, 2): 1.0, (128, 2): 0.85, (64, 2): 0.6, (128, 1): 0.55, (64, 1): 0.4}
_STEPS_AROUND = 6  # what filling the ring and the epilogue take, in steps of k
_STEPS_TO_JOIN = 12  # and what adding up the splits takes


def estimated_cost(config: MlpConfig, m: int, n: int, k: int) -> float:
    """What an [m, k] @ [k, n] costs, about, as waves of tiles: for comparing configs."""
    tiles = config.splits * -(-m // config.block_m) * -(-n // config.block_n)
    steps = -(-k // config.block_k // config.splits) + _STEPS_AROUND
    joining = _STEPS_TO_JOIN if config.splits > 1 else 0
    area = config.block_m * config.block_n / _EFFICIENCY[config.block_n, config.warpgroups]
    return (-(-tiles // config.blocks) * steps + joining) * area


def choose_config(m: int, n: int, k: int) -> MlpConfig:
    """The config that is estimated to take least time, without splits of k."""
    fitting = [config for config in CONFIGS if n % config.block_n == 0]
    return min(fitting, key=lambda config: estimated_cost(config, m, n, k))


def leaves_card_idle(m: int, n: int, k: int) -> bool:
    """Whether the tiles are too few and too deep for one tile per SM to be a good plan.

    There a matmul that also splits K is faster: XLA took 8.6 us against 10.8 at 256 x 1024 x 3456
    and 37 against 70 at 512 x 1024 x 24768, but 15.0 against 14.1 at 1024 x 1024 x 3456 (H200).
    """
    return k >= 2048 and m * n <= 512 * 1024


def pad_kernel(kernel: Kernel) -> Kernel:
    """The weights with zeros up to multiples of 64 inputs, 128 of float8 ones, and of 64 outputs:
    done once, at load time.
    """
    return _in_steps(kernel, inputs=inputs_step(kernel), outputs=PADDED_TO)


def inputs_step(kernel: Kernel, block_k: int = PADDED_TO) -> int:
    """Inputs of a step of `block_k` 16-bit items."""
    return 2 * block_k if isinstance(kernel, Float8Kernel) else block_k


def _in_steps(kernel: Kernel, *, inputs: int, outputs: int) -> Kernel:
    """The weights with zeros up to multiples of so many inputs and outputs."""
    below, behind = (
        -size % step for size, step in zip(kernel.shape, (inputs, outputs), strict=True)
    )
    if not isinstance(kernel, Float8Kernel):
        return jnp.pad(kernel, ((0, below), (0, behind)))
    return dataclasses.replace(
        kernel,
        values=jnp.pad(kernel.values, ((0, behind), (0, below))),
        scales=jnp.pad(kernel.scales, (0, behind)),
    )


def dense(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    bias: Float[Array, " outputs"],
    *,
    activation: str,
    out_scale: float | None = None,
    config: MlpConfig | None = None,
) -> Float[Array, "samples outputs"]:
    """activation(x @ kernel + bias) in x's dtype, accumulated in float32; with an out_scale rounded
    to e4m3. For a float8 kernel x is e4m3, or is rounded to it first.

    `kernel` may be padded (`pad_kernel`); the bias says how many outputs there are. Any number of
    samples, inputs and outputs: what is no multiple of a tile is padded inside. Raises ValueError
    for other dtypes than bfloat16, float16 and float8 kernels', an unknown activation, or shapes
    that do not match.
    """
    check(x, kernel, bias, activation)
    if len(x) == 0:
        return jnp.zeros((0, len(bias)), out_dtype(x, out_scale))
    layer = Layer.of(x, kernel, bias, activation, out_scale, config)
    return layer.finished(_launch(layer))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense layer in whole tiles: operands padded, splits capped. `kernel` is [inputs, outputs],
    or of e4m3 [outputs, inputs]; `columns` float32: the bias and, of e4m3 kernels, the scales.
    """

    x: Array
    kernel: Array
    columns: Array
    activation: str
    out_scale: float | None
    dtype: jnp.dtype
    config: MlpConfig
    samples: int
    outputs: int

    @classmethod
    def of(
        cls,
        x: Array,
        kernel: Kernel,
        bias: Array,
        activation: str,
        out_scale: float | None,
        config: MlpConfig | None,
    ) -> "Layer":
        """The layer of operands that `dense` takes, of one sample at least."""
        samples, outputs = len(x), len(bias)
        dtype = out_dtype(x, out_scale)
        kernel = pad_kernel(kernel)
        inputs, columns = kernel.shape
        config = config or choose_config(
            samples, columns, inputs * PADDED_TO // inputs_step(kernel)
        )
        step = inputs_step(kernel, config.block_k)
        kernel = _in_steps(kernel, inputs=step, outputs=config.block_n)
        if isinstance(kernel, Float8Kernel):
            x = rounded(x, kernel.input_scale)
        x = jnp.pad(x, ((0, -samples % config.block_m), (0, kernel.shape[0] - x.shape[1])))
        rows = [jnp.pad(bias.astype(jnp.float32), (0, kernel.shape[1] - outputs))]
        if isinstance(kernel, Float8Kernel):
            rows.append(kernel.scales)
        # A split without a step would free a slot that was never filled.
        splits = min(config.splits, kernel.shape[0] // step)
        return cls(
            x=x,
            kernel=kernel.values if isinstance(kernel, Float8Kernel) else kernel,
            columns=jnp.stack(rows),
            activation=activation,
            out_scale=out_scale,
            dtype=dtype,
            config=dataclasses.replace(config, splits=splits),
            samples=samples,
            outputs=outputs,
        )

    @property
    def split(self) -> bool:
        """Whether the kernel writes parts of the product, one below the other, in float32."""
        return self.config.splits > 1

    @property
    def operands(self) -> tuple[Array, Array, Array]:
        """What the kernel reads; of the columns nothing but zeros where parts are added later."""
        return self.x, self.kernel, jnp.zeros_like(self.columns[:1]) if self.split else self.columns

    @property
    def finish(self) -> Callable[[Array], Array]:
        """What the kernel makes of sums with their bias."""
        if self.split:
            return identity
        return functools.partial(finished, activation=self.activation, out_scale=self.out_scale)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes."""
        dtype = jnp.dtype(jnp.float32) if self.split else self.dtype
        rows = self.config.splits * len(self.x)
        return jax.ShapeDtypeStruct((rows, self.columns.shape[1]), dtype)

    @property
    def tiles_per_block(self) -> int:
        """Output tiles of a block, at most."""
        return -(-self.config.tiles(self.out_type.shape) // self.config.blocks)

    @property
    def transforms(self) -> tuple[Any, ...]:
        """How operands lie in SMEM."""
        return swizzled(self.x.dtype)

    @property
    def scratch_types(self) -> dict[str, Any]:
        """SMEM and barriers by their names in LayerRefs."""
        config, out = self.config, self.out_type
        tile = functools.partial(plgpu.SMEM, dtype=self.x.dtype, transforms=self.transforms)
        columns = min(config.wgmma_n, SWIZZLE // out.dtype.itemsize)
        out_tile = (config.warpgroups, config.out_slots, config.rows, columns)
        return {
            "x_smem": tile((config.stages, config.block_m, step_items(config, self.x.dtype))),
            "kernel_smem": tile((config.stages, *kernel_tile(config, self.x.dtype))),
            "out_smem": plgpu.SMEM(out_tile, out.dtype, transforms=swizzled(out.dtype, columns)),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            "consumed": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        }

    def finished(self, out: Array) -> Array:
        """The layer's output from what the kernel wrote."""
        if self.split:
            sums = out.reshape(self.config.splits, *self.x.shape[:1], -1).sum(axis=0)
            sums = _scaled(sums, *self.columns)
            out = finished(sums, self.activation, self.out_scale).astype(self.dtype)
        return out[: self.samples, : self.outputs]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Slots in SMEM that are filled and used in order, step by step, and their barriers.

    `loaded` and `consumed` are `slots` barriers per turn. Every `steps` steps the next of `turns`
    warpgroups is the one that uses them: each waits at barriers of its own, as a warpgroup that
    misses a phase of a barrier cannot wait for the next one. first: of the slots and barriers.
    """

    loaded: Any
    consumed: Any
    slots: int
    steps: int = 1
    turns: int = 1
    first: Array | int = 0

    def slot(self, step: Array) -> Array:
        """Where `step` lies."""
        return self.first + lax.rem(step, self.slots)

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


def _launch(layer: Layer) -> Array:
    launch = plgpu.kernel(
        functools.partial(_body, finish=layer.finish, config=layer.config),
        out_type=layer.out_type,
        scratch_types=layer.scratch_types,
        grid=(layer.config.blocks,),
        grid_names=("block",),
        num_threads=layer.config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mlp_layer",
    )
    return launch(*layer.operands)


def step_items(config: MlpConfig, dtype: DTypeLike) -> int:
    """How much of k a step is, in operands of `dtype`."""
    return config.block_k * 2 // jnp.dtype(dtype).itemsize


def kernel_tile(config: MlpConfig, dtype: DTypeLike) -> tuple[int, int]:
    """A step's tile of weights of `dtype`: e4m3 ones come with k along their rows, as wgmma takes
    no others.
    """
    step, columns = step_items(config, dtype), config.block_n
    return (columns, step) if dtype == FLOAT8 else (step, columns)


def swizzled(dtype: DTypeLike, columns: int | None = None) -> tuple[Any, ...]:
    """Tiles of 8 rows of so many columns, of SWIZZLE bytes at most and if not told."""
    item = jnp.dtype(dtype).itemsize
    columns = columns or SWIZZLE // item
    # Abstract to the type checker alone: JAX fills in what is missing.
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(columns * item)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def _body(*gmem: Any, finish: Callable[[Array], Array], config: MlpConfig, **scratch: Any) -> None:
    """Warpgroup `config.warpgroups` loads, the ones before it multiply."""
    warpgroup = lax.axis_index("warpgroup")
    x, kernel, columns, out = gmem
    refs = LayerRefs(x=x, kernel=kernel, columns=columns, out=out, config=config, **scratch)

    @pl.when(warpgroup == config.warpgroups)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load_layer(refs)

    @pl.when(warpgroup < config.warpgroups)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        multiply_layer(refs, warpgroup, finish)


@dataclass(frozen=True, kw_only=True)
class LayerRefs:
    """What the warpgroups of a block that compute a layer share: operands and output in GMEM, then
    the scratch of Layer.scratch_types.
    """

    x: Any
    kernel: Any
    columns: Any
    out: Any
    x_smem: Any
    kernel_smem: Any
    out_smem: Any
    loaded: Any
    consumed: Any
    config: MlpConfig

    @property
    def ring(self) -> Ring:
        return Ring(loaded=self.loaded, consumed=self.consumed, slots=self.config.stages)

    def place(self, index: Array) -> "_Place":
        """Where the block's tile number `index` lies."""
        config = self.config
        tile_columns = self.columns.shape[1] // config.block_n
        tile_rows = self.x.shape[0] // config.block_m
        all_steps = self.x.shape[1] // self.x_smem.shape[-1]
        tile = lax.axis_index("block") + index * config.blocks
        row, column = lax.div(tile, tile_columns), lax.rem(tile, tile_columns)
        split = lax.div(row, tile_rows)
        return _Place(
            row=(row - split * tile_rows) * config.block_m,
            out_row=row * config.block_m,
            column=column * config.block_n,
            first=lax.div(split * all_steps, config.splits),
            last=lax.div((split + 1) * all_steps, config.splits),
        )

    def each_tile(self, tile: Callable[[Array, "_Place", Array], None]) -> Array:
        """Calls `tile` for each of the block's tiles with its index, place and the steps of those
        before; returns all of them.
        """
        config = self.config
        block = lax.axis_index("block")
        own_tiles = lax.div(config.tiles(self.out.shape) - block + config.blocks - 1, config.blocks)

        def body(index: Array, before: Array) -> Array:
            at = self.place(index)
            tile(index, at, before)
            return before + at.last - at.first

        return lax.fori_loop(0, own_tiles, body, jnp.int32(0))


def load_layer(refs: LayerRefs) -> None:
    """What the loading warpgroup does: TMA copies of the operands of all tiles of its block."""
    memory = (refs.x, refs.kernel, refs.x_smem, refs.kernel_smem, refs.ring)

    @jax.named_scope("load")
    def load(index: Array, at: _Place, before: Array) -> None:
        steps = at.last - at.first
        load_tile(*memory, at.row, at.column, before, steps, refs.config, at.first)

    refs.ring.drain(refs.each_tile(load))


def multiply_layer(refs: LayerRefs, warpgroup: Array, finish: Callable[[Array], Array]) -> None:
    """What a multiplying warpgroup does: its rows of every tile of its block, and the epilogue."""
    config = refs.config
    own = warpgroup * config.rows
    out_columns = refs.out_smem.shape[-1]
    pieces = config.block_n // out_columns

    @jax.named_scope("multiply")
    def multiply(index: Array, at: _Place, before: Array) -> None:
        memory = (refs.x_smem, refs.kernel_smem, refs.ring)
        products = multiply_tile(*memory, own, before, at.last - at.first, config)
        rows = pl.ds(at.out_row + own, config.rows)
        for piece in range(pieces):
            part, start = divmod(piece * out_columns, config.wgmma_n)
            columns = pl.ds(at.column + piece * out_columns, out_columns)
            sums = products[part][:, start : start + out_columns]
            out = finish(with_columns(sums, refs.columns, columns))
            slot = refs.out_smem.at[warpgroup, lax.rem(index * pieces + piece, config.out_slots)]
            plgpu.wait_smem_to_gmem(config.out_slots - 1, wait_read_only=True)
            slot[...] = out.astype(refs.out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, refs.out.at[rows, columns])

    refs.each_tile(multiply)
    plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A tile: its first row of x and of the output, its first column, its steps of k."""

    row: Array
    out_row: Array
    column: Array
    first: Array
    last: Array


def with_columns(sums: Array, columns_gmem: Any, columns: Any) -> Array:
    """Sums [rows, columns], in the accumulator's layout, times the scales that Layer.columns has
    for them, if it has, plus the bias.
    """
    own = [
        for_every_row(columns_gmem.at[row, columns], sums.shape)
        for row in range(columns_gmem.shape[0])
    ]
    return _scaled(sums, *own)


def _scaled(sums: Array, bias: Array, scales: Array | None = None) -> Array:
    return (sums if scales is None else sums * scales) + bias


def for_every_row(gmem: Any, shape: tuple[int, ...]) -> Array:
    """What GMEM has for the columns of an accumulator of this shape, in its layout."""
    values = plgpu.load(gmem, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(values, shape, (1,))


def load_tile(
    x_gmem: Any,
    kernel_gmem: Any,
    x_smem: Any,
    kernel_smem: Any,
    ring: Ring,
    row: Array,
    column: Array,
    first_step: Array,
    steps: Array | int,
    config: MlpConfig,
    first_k: Array | int = 0,
    first_kernel_k: Array | int = 0,
    shared_by: str | None = None,
) -> None:
    """Copies the operands of one output tile, step by step, into ring slots that are free; k starts
    at step `first_k`, of the kernel `first_kernel_k` steps later. shared_by: the axis of a cluster
    whose blocks all need the same tile of the kernel: each loads a part of it for all.
    """

    @pl.loop(0, steps)
    def _step(step: Array) -> None:
        slot, barrier = ring.filling(first_step + step)
        items = x_smem.shape[-1]
        x_tile = x_gmem.at[pl.ds(row, config.block_m), pl.ds((first_k + step) * items, items)]
        k = pl.ds((first_kernel_k + first_k + step) * items, items)
        outputs = pl.ds(column, config.block_n)
        kernel_tile = kernel_gmem.at[(outputs, k) if x_smem.dtype == FLOAT8 else (k, outputs)]
        plgpu.copy_gmem_to_smem(x_tile, x_smem.at[slot], barrier)
        into = kernel_smem.at[slot]
        plgpu.copy_gmem_to_smem(kernel_tile, into, barrier, collective_axes=shared_by)


def multiply_tile(
    x_smem: Any,
    kernel_smem: Any,
    ring: Ring,
    first_row: Array | int,
    first_step: Array,
    steps: Array | int,
    config: MlpConfig,
) -> tuple[Array, ...]:
    """`config.rows` rows of one output tile, float32, in parts of `config.wgmma_n` columns; frees
    each slot one step later.
    """

    def issue(sums: Sequence[Any], _: Array, slot: Array) -> None:
        rows = pl.ds(first_row, config.rows)
        for part, acc in enumerate(sums):
            columns = pl.ds(part * config.wgmma_n, config.wgmma_n)
            if x_smem.dtype == FLOAT8:
                kernel = kernel_smem.at[slot, columns].transpose((1, 0))
            else:
                kernel = kernel_smem.at[slot, :, columns]
            plgpu.wgmma(acc, x_smem.at[slot, rows], kernel)

    shapes = [(config.rows, config.wgmma_n)] * (config.block_n // config.wgmma_n)
    return accumulated(issue, shapes, ring, first_step, steps)


def accumulated(
    issue: Callable[[Sequence[Any], Array, Array], None],
    shapes: Sequence[tuple[int, int]],
    ring: Ring,
    first_step: Array,
    steps: Array | int,
) -> tuple[Array, ...]:
    """Sums, float32, of the wgmmas that `issue` issues for each step: one into each accumulator. It
    gets these, the step, and the ring's slot, which is freed one step later.
    """

    def accumulate(*sums: Any) -> tuple[Array, ...]:
        @pl.loop(0, steps)
        def _step(step: Array) -> None:
            issue(sums, step, ring.filled(first_step + step))
            plgpu.wgmma_wait(len(sums))

            @pl.when(step > 0)
            def _free_previous() -> None:
                ring.free(first_step + step - 1)

        plgpu.wgmma_wait(0)
        ring.free(first_step + steps - 1)
        return tuple([acc[...] for acc in sums])

    return pl.run_scoped(accumulate, *map(plgpu.WGMMAAccumulatorRef, shapes))


def check(x: Array, kernel: Kernel, bias: Array, activation: str) -> None:
    """Raises ValueError for operands that `dense` does not take."""
    if isinstance(kernel, Float8Kernel):
        if str(x.dtype) not in (*DTYPES, FLOAT8):
            raise ValueError(f"x is {x.dtype}, the kernel {FLOAT8}: that, bfloat16 or float16")
    elif str(x.dtype) not in DTYPES or x.dtype != kernel.dtype:
        raise ValueError(f"x is {x.dtype}, kernel {kernel.dtype}: both bfloat16 or both float16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    inputs, outputs = kernel.shape
    if not inputs - inputs_step(kernel) < x.shape[1] <= inputs:
        raise ValueError(f"x has {x.shape[1]} inputs, the kernel {inputs}")
    if not outputs - PADDED_TO < len(bias) <= outputs:
        raise ValueError(f"the bias has {len(bias)} outputs, the kernel {outputs}")
