"""An MLP layer and a pooled gather in one launch, for Hopper GPUs: intra-SM co-running.

While the tensor cores of an SM multiply, its memory pipeline fetches embedding rows. A persistent
kernel whose blocks have the roles of `mlp`, warpgroups that multiply and one that loads their
operands by TMA, and others that gather. Units of embedding work are claimed from a counter in
GMEM, so that SMs with fewer tiles gather more; warpgroups that have multiplied their last tile help
(`helps`), with the operand buffers, which nobody needs any more, as their rings.

Both parts are computed by the tile functions of the serial kernels, in the same order of
operations: outputs have the bits that `mlp.dense` and `embedding.pooled_gather` give with the same
configs. The idea: RecFlow (BUPT and Meituan), intra-SM co-running of MLP and embedding.

Grid: `blocks` (one per SM). FLOP and bytes: those of both parts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.embedding import Gather, addresses, gather_all
from pallas_kernels.float8 import Kernel
from pallas_kernels.gather_bags import bag_plan
from pallas_kernels.gather_rows import zero_right
from pallas_kernels.gather_shape import VECTOR_BYTES, WARPGROUP, GatherConfig, GatherShape
from pallas_kernels.mlp import (
    SHARED_BYTES,
    Layer,
    LayerRefs,
    MlpConfig,
    check,
    load_layer,
    multiply_layer,
)
from pallas_kernels.simt import MosaicSimt
from pallas_kernels.slots import Slot
from pallas_kernels.tables import Table

KERNEL_NAME = "mlp_layer_with_gather"
REGIONS = ("load", "multiply", "help", "gather")
BARRIER_BYTES = 1024  # what barriers and alignment take of SMEM, at most
REGISTERS = 512  # of the threads at one place of all warpgroups of an SM together
REGISTER_STEP = 8


@dataclass(frozen=True, kw_only=True)
class CorunConfig:
    """mlp, gather: the configs of the parts, with as many blocks; the gather does not share bags
    among warps. helps: whether warpgroups without tiles left gather too.
    multiply_registers and the like: of a thread in these roles.
    """

    mlp: MlpConfig = MlpConfig(out_slots=1, wgmma_columns=128)
    gather: GatherConfig = GatherConfig(
        warpgroups=2, ring_rows=4, rows_per_turn=4, units_per_stream=16, shares_bags=False
    )
    helps: bool = True
    multiply_registers: int = 160
    gather_registers: int = 64
    load_registers: int = 24

    def __post_init__(self) -> None:
        owner = f"co-run config {self}"
        if self.mlp.blocks != self.gather.blocks:
            raise ValueError(f"{owner}: as many blocks multiply as gather")
        if self.gather.shares_bags:
            raise ValueError(f"{owner}: warps that claim their work share no bags")
        used = self.mlp.warpgroups * self.multiply_registers + self.load_registers
        used += self.gather.warpgroups * self.gather_registers
        if used > self.launch_registers * self.warpgroups:
            raise ValueError(
                f"{owner}: {used} registers, above {self.launch_registers * self.warpgroups}"
            )
        self._check_shared(factors=0)

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block: those that multiply, one that loads, those that gather."""
        return self.mlp.warpgroups + 1 + self.gather.warpgroups

    @property
    def launch_registers(self) -> int:
        """Registers that each thread has before the roles change it."""
        return REGISTERS // self.warpgroups // REGISTER_STEP * REGISTER_STEP

    def _check_shared(self, *, factors: int) -> None:
        size = self.mlp.shared_bytes + self.ring_bytes(factors) + BARRIER_BYTES
        if size > SHARED_BYTES:
            raise ValueError(f"co-run config {self}: {size} bytes of SMEM, above {SHARED_BYTES}")

    def ring_bytes(self, factors: int) -> int:
        """Of the warpgroups that gather; some, as Mosaic takes no empty buffer."""
        streams = self.gather.schedule == "streams"
        return self.gather.ring_bytes(factors) if streams else WARPGROUP * VECTOR_BYTES

    def check_rings(self, shape: GatherShape) -> None:
        """Raises ValueError if SMEM is too small for the rings of this gather."""
        self._check_shared(factors=shape.factors)
        room = 2 * self.mlp.stages * self.mlp.block_k * self.mlp.block_n
        rings = -(-self.mlp.warpgroups // self.gather.warpgroups)
        needed = rings * self.ring_bytes(shape.factors)
        if self.helps and needed > room:
            raise ValueError(
                f"co-run config {self}: helpers' rings of {needed} bytes, above {room}"
            )


CONFIG = CorunConfig()
_BAGS = GatherConfig(schedule="bags", warpgroups=2, shares_bags=False)
CONFIGS = {
    "deep": CONFIG,
    "shallow": replace(
        CONFIG, mlp=replace(CONFIG.mlp, stages=3), gather=replace(CONFIG.gather, ring_rows=8)
    ),
    "narrow": replace(
        CONFIG, mlp=replace(CONFIG.mlp, block_n=128), gather=replace(CONFIG.gather, ring_rows=8)
    ),
    "bags": replace(CONFIG, gather=_BAGS),
    "long bags": replace(
        CONFIG,
        gather=replace(_BAGS, warpgroups=1, rows_at_once=8, ids_per_stream=4),
        multiply_registers=168,
        gather_registers=136,
        load_registers=40,
    ),
}
"""Tiles of 128 x 256 with operands far ahead, or with rows far ahead; tiles of 128 x 128 with both;
rows in registers, as short rows and jagged bags want it, fewer or more at once.
"""


def dense_with_gather(
    x: Float[Array, "samples inputs"],
    kernel: Kernel,
    bias: Float[Array, " outputs"],
    vectors: Float[Array, "most columns"],
    first_row: Int32[Array, ""],
    groups: Sequence[Table],
    rows: Int32[Array, " ids"],
    offsets: Int32[Array, " bags_and_one"],
    weights: Float[Array, " ids"] | None,
    *,
    activation: str,
    slots: tuple[Slot, ...],
    left: int,
    span: tuple[int, int] | None = None,
    out_scale: float | None = None,
    config: CorunConfig = CONFIG,
    trace_dir: str = "",
) -> tuple[Float[Array, "samples outputs"], Float[Array, "most columns"]]:
    """`mlp.dense` of one batch and `embedding.gather_into` of another, in one launch.

    trace_dir: where the launch writes, in Chrome's format, when each warpgroup was in which of
    REGIONS; for that it needs SMEM. Both batches have samples. Raises ValueError like these two,
    for a batch without samples, for rings that do not fit the config, and for columns before or
    behind the pooled ones that are no multiple of four.
    """
    check(x, kernel, bias, activation)
    layer = Layer.of(x, kernel, bias, activation, out_scale, config.mlp)
    gather = Gather.into(
        *(vectors, first_row, groups, rows, offsets, weights),
        slots=slots,
        left=left,
        span=span,
        config=config.gather,
    )
    if not len(x) or not gather.shape.samples:
        raise ValueError(f"{len(x)} samples to multiply, {gather.shape.samples} to gather: no pair")
    config.check_rings(gather.shape)
    out, vectors = _launch(layer, gather, vectors, config, trace_dir)
    return layer.finished(out), vectors


def _launch(
    layer: Layer, gather: Gather, vectors: Array, config: CorunConfig, trace_dir: str
) -> tuple[Array, Array]:
    ring_words = config.ring_bytes(gather.shape.factors) // 4
    launch = plgpu.kernel(
        functools.partial(_body, layer=layer, gather=gather, config=config),
        out_type=layer.out_type,
        scratch_types={
            "gather_ring": plgpu.SMEM((ring_words,), jnp.int32),
            "multiplied": plgpu.Barrier(num_arrivals=config.mlp.warpgroups),
            **layer.scratch_types,
        },
        grid=(config.mlp.blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=_traced(layer, trace_dir) if trace_dir else None,
    )
    # A reference, not an array: XLA would count on its never being written to.
    counters = jax.new_ref(jnp.zeros(_counters(gather.shape), jnp.int32))
    target = jax.new_ref(vectors)
    out = launch(*layer.operands, counters, *gather.operands, target)
    return out, jax.freeze(target)


def _traced(layer: Layer, trace_dir: str) -> plgpu.CompilerParams:
    """Room for what a warpgroup records: a region per tile, one for its gather, Mosaic's `Init`,
    and a header.
    """
    return plgpu.CompilerParams(profile_space=layer.tiles_per_block + 3, profile_dir=trace_dir)


def _counters(shape: GatherShape) -> int:
    """How many counters the claims of a launch need."""
    return len(shape.rows if shape.config.schedule == "streams" else bag_plan(shape).classes)


def _body(
    x: Any,
    kernel: Any,
    columns: Any,
    counters: Any,
    *refs: Any,
    gather_ring: Any,
    multiplied: Any,
    layer: Layer,
    gather: Gather,
    config: CorunConfig,
    **scratch: Any,
) -> None:
    """Warpgroups before `config.mlp.warpgroups` multiply, that one loads, the others gather."""
    warpgroup = lax.axis_index("warpgroup")
    multiplying = config.mlp.warpgroups
    *operands, vectors, out = refs
    layer_refs = LayerRefs(
        x=x, kernel=kernel, columns=columns, out=out, config=layer.config, **scratch
    )
    gather_refs = (counters, *operands, vectors)

    @pl.when(warpgroup == multiplying)
    def _load() -> None:
        _set_registers(config, config.load_registers)
        load_layer(layer_refs)

    @pl.when(warpgroup < multiplying)
    def _multiply() -> None:
        _set_registers(config, config.multiply_registers)
        multiply_layer(layer_refs, warpgroup, layer.finish)
        if config.helps:
            plgpu.barrier_arrive(multiplied)
            plgpu.barrier_wait(multiplied)
            with jax.named_scope("help"):
                gather_claimed(
                    gather, gather_refs, layer_refs.kernel_smem, layer.transforms, first_role=0
                )

    @pl.when(warpgroup > multiplying)
    def _gather() -> None:
        _set_registers(config, config.gather_registers)
        with jax.named_scope("gather"):
            gather_claimed(gather, gather_refs, gather_ring, (), first_role=multiplying + 1)


def _set_registers(config: CorunConfig, registers: int) -> None:
    if registers != config.launch_registers:
        action = "increase" if registers > config.launch_registers else "decrease"
        plgpu.set_max_registers(registers, action=action)


def gather_claimed(
    gather: Gather, gmem: Sequence[Any], smem: Any, transforms: tuple[Any, ...], *, first_role: int
) -> None:
    """What warpgroups from `first_role` on do that gather: units that they claim, with their rings
    side by side in `smem`. Helpers, which start at warpgroup 0, leave zeros on the right to others.
    """

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(gmem), plgpu.RefType(transforms)))
    def per_thread(_, counters, *refs):
        simt = MosaicSimt()
        *gmem, smem = refs
        config = gather.shape.config
        role_thread, block = simt.thread() - first_role * WARPGROUP, simt.block()
        thread, owner = role_thread % config.threads, role_thread // config.threads
        ring_bytes = config.ring_bytes(gather.shape.factors)
        at = addresses(
            *(simt, gather, gmem),
            thread=thread,
            shared=simt.shared_address(smem) + owner * ring_bytes,
            counters=simt.global_address(counters),
        )
        gather_all(simt, gather.shape, at, thread=thread, block=block)
        if first_role:
            zero_right(simt, gather.shape, at, thread=thread, block=block)

    per_thread(*gmem, smem)
