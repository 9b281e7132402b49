"""Pooled gather over all tables of a model in one launch, for Hopper GPUs.

    out[s, column:column + dim] = scale * sum_i w_i * group[row_i]     over the ids i of a bag

A row of a quantised group is its values times its own float32 scale, dequantised in registers.

Work is laid out by one of two schedules: `gather_streams` and `gather_bags` say how, `gather_shape`
says which. A row is read by a *stream* of 1 to 32 lanes, one per 16 bytes. Groups, ids, offsets,
weights, plans and the output lie in GMEM. Sums are float32 in registers.

Per id: row bytes + 4 read (4 more for a weight, 4 for a scale: a sector of 32), 2 * dim FLOP; per
sample: 4 bytes per bag read and the output's width written. Bound by memory everywhere.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.gather_bags import bag_plan, gather_bags, partial_bytes
from pallas_kernels.gather_rows import Addresses, zero_right
from pallas_kernels.gather_shape import (
    FACTOR_BYTES,
    VECTOR_BYTES,
    WARPGROUP,
    GatherConfig,
    GatherShape,
    RowShape,
    choose_config,
)
from pallas_kernels.gather_streams import gather_streams, stream_spans
from pallas_kernels.simt import MosaicSimt, Value
from pallas_kernels.slots import Slot, offsets_of, width
from pallas_kernels.tables import LIMITS, QuantisedTable, Table

DTYPES = ("float32", "bfloat16", "float16")


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
    config: GatherConfig | None = None,
) -> Float[Array, "samples left_width_and_right"]:
    """Pools every bag of every sample in one launch; see reference.pooled_gather.

    The launch writes behind the columns that `left` then fills, and zeros the `right` ones: nothing
    is concatenated, unless one of them is no multiple of four columns, which would break the
    alignment of stores.

    Groups are [rows, dim] of float32, bfloat16 or float16, or quantised tables of int8 or
    float8_e4m3fn; dim is a multiple of 4 up to 256. `rows` holds at least one element. Ids are
    trusted: they must be rows of their slot's group. Raises ValueError for shapes, dtypes or slots
    that the kernel cannot take.
    """
    left_width = 0 if left is None else left.shape[1]
    gather = Gather.of(
        *(groups, rows, offsets, weights),
        slots=slots,
        out_dtype=out_dtype,
        left=0 if left_width % 4 else left_width,
        right=0 if right % 4 else right,
        config=config,
    )
    if gather.shape.samples == 0:
        return jnp.zeros((0, left_width + width(slots) + right), out_dtype)
    out = _kernel(gather, out_type=gather.out_type)(*gather.operands)
    if right != gather.shape.right:
        out = jnp.pad(out, ((0, 0), (0, right)))
    if left is None:
        return out
    left = left.astype(out.dtype)
    if not gather.shape.left:
        return jnp.concatenate([left, out], axis=1)
    return lax.dynamic_update_slice(out, left, (0, 0))


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
    config: GatherConfig | None = None,
) -> Float[Array, "most columns"]:
    """Pools every bag into rows of `vectors`, in place where these are donated or made in the same
    executable; see reference.gather_into. Raises ValueError like `pooled_gather`.

    Rows beyond those of `vectors` would be written too, wherever that is: make sure they fit.
    Columns before or behind the pooled ones that are no multiple of four cost copies.
    """
    right = vectors.shape[1] - left - width(slots)
    bags = (groups, rows, offsets, weights)
    span = span or (0, (len(offsets) - 1) // len(slots))
    if not span[1]:
        return vectors
    if not lands_in_place(left, right):
        bags = (groups, rows, offsets_of(offsets, len(slots), span), weights)
        options = {"slots": slots, "out_dtype": vectors.dtype, "right": right, "config": config}
        pooled = pooled_gather(*bags, **options)
        return lax.dynamic_update_slice(vectors, pooled, (first_row + span[0], jnp.int32(left)))
    options = {"slots": slots, "left": left, "span": span, "config": config}
    gather = Gather.into(vectors, first_row, *bags, **options)
    target = jax.new_ref(vectors)
    _kernel(gather, out_type=())(*gather.operands, target)
    return jax.freeze(target)


def lands_in_place(left: int, right: int) -> bool:
    """Whether a launch can write between so many columns: the alignment of its stores."""
    return left % 4 == right % 4 == 0


@dataclass(frozen=True, kw_only=True)
class Gather:
    """A pooled gather as one launch takes it: `operands`, tables first, then the plans, then the
    first row that is written if it is not 0, all in GMEM. It begins with sample `first_sample`.
    """

    shape: GatherShape
    operands: tuple[Array | np.ndarray, ...]
    plans: tuple[str, ...]
    from_row: bool = False
    first_sample: int = 0

    @classmethod
    def of(
        cls,
        groups: Sequence[Table],
        rows: Array,
        offsets: Array,
        weights: Array | None,
        *,
        slots: tuple[Slot, ...],
        out_dtype: DTypeLike,
        left: int,
        right: int,
        config: GatherConfig | None,
        span: tuple[int, int] | None = None,
    ) -> "Gather":
        """The launch for operands of `pooled_gather`, and the columns to leave and to make zero;
        span: the first sample, and how many. Raises ValueError like that.
        """
        _check(groups, rows, offsets, slots)
        first_sample, samples = span or (0, (len(offsets) - 1) // len(slots))
        row_shapes = tuple(
            RowShape(dim=v.shape[1], dtype=str(v.dtype)) for v in map(_values, groups)
        )
        shape = GatherShape(
            samples=samples,
            slots=slots,
            rows=row_shapes,
            out_dtype=str(jnp.dtype(out_dtype)),
            weighted=weights is not None,
            config=config or choose_config(samples, slots, row_shapes),
            left=left,
            right=right,
        )
        optional = [] if weights is None else [weights]
        scales = [group.scales for group in groups if isinstance(group, QuantisedTable)]
        plans = _plans(shape)
        operands = (*map(_values, groups), *scales, rows, offsets, *optional, *plans.values())
        return cls(shape=shape, operands=operands, plans=tuple(plans), first_sample=first_sample)

    @classmethod
    def into(
        cls,
        vectors: Array,
        first_row: Array,
        *bags: Any,
        slots: tuple[Slot, ...],
        left: int,
        config: GatherConfig | None,
        span: tuple[int, int] | None = None,
    ) -> "Gather":
        """The launch for operands of `gather_into`. Raises ValueError like that, and for columns
        that no launch can write between.
        """
        right = vectors.shape[1] - left - width(slots)
        if right < 0 or not lands_in_place(left, right):
            raise ValueError(f"no gather writes behind {left} columns and before {right}")
        shape = {"left": left, "right": right, "out_dtype": vectors.dtype}
        gather = cls.of(*bags, slots=slots, config=config, span=span, **shape)
        row = first_row.reshape(1)
        return replace(gather, operands=(*gather.operands, row), from_row=True)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes, if not into rows of an array that is there."""
        shape = (self.shape.samples, self.shape.width)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.shape.out_dtype))


def _values(group: Table) -> Array:
    return group.values if isinstance(group, QuantisedTable) else group


def _kernel(gather: Gather, *, out_type: Any) -> Any:
    config = gather.shape.config
    return plgpu.kernel(
        functools.partial(_body, gather=gather),
        out_type=out_type,
        scratch_types=[plgpu.SMEM((_shared_bytes(gather.shape) // 4,), jnp.int32)],
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        kernel_name="pooled_gather",
    )


def _plans(shape: GatherShape) -> dict[str, np.ndarray]:
    """What the schedule reads besides the operands, by its name among the addresses."""
    if shape.config.schedule == "bags":
        plan = bag_plan(shape)
        return {"bag_spans": plan.spans, "bag_slots": plan.slots}
    spans, _ = stream_spans(shape)
    means = {"means": np.array([slot.mean for slot in shape.slots], np.int32)}
    return {"spans": spans} | (means if shape.any_mean else {})


def _shared_bytes(shape: GatherShape) -> int:
    """Shared memory of a block; some, as Mosaic takes no empty buffer."""
    if shape.config.schedule == "streams":
        return shape.config.ring_bytes(shape.factors)
    return max(partial_bytes(shape) * shape.config.warpgroups, WARPGROUP * FACTOR_BYTES)


def _body(*refs: Any, gather: Gather) -> None:
    """Hands per-thread code its refs: the operands, the output, SMEM."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def per_thread(_, *refs):
        simt = MosaicSimt()
        *gmem, smem = refs
        thread, shared = simt.thread(), simt.shared_address(smem)
        partial = shared + thread // WARPGROUP * partial_bytes(gather.shape)
        at = addresses(simt, gather, gmem, thread=thread, shared=shared, partial=partial)
        place = {"thread": thread, "block": simt.block()}
        gather_all(simt, gather.shape, at, **place)
        zero_right(simt, gather.shape, at, **place)

    per_thread(*refs)


def gather_all(
    simt: MosaicSimt, shape: GatherShape, at: Addresses, *, thread: Value, block: Value
) -> None:
    """One thread's share of all bags, by the schedule of the launch."""
    schedule = gather_streams if shape.config.schedule == "streams" else gather_bags
    schedule(simt, shape, at, thread=thread, block=block)


def addresses(
    simt: MosaicSimt,
    gather: Gather,
    gmem: Sequence[Any],
    *,
    thread: Value,
    shared: Value,
    partial: Value = None,
    counters: Value = None,
) -> Addresses:
    """Where things are for one thread: `gmem` are the refs of the operands and the output; `thread`
    is its number among those whose ring starts at `shared`.
    """
    shape = gather.shape
    inputs = iter([simt.global_address(ref) for ref in gmem])
    groups = tuple(next(inputs) for _ in shape.rows)
    scales = tuple(next(inputs) if row.quantised else None for row in shape.rows)
    ids, offsets = next(inputs), next(inputs)
    weights = next(inputs) if shape.weighted else None
    plan = {name: next(inputs) for name in gather.plans}
    first_row = simt.load_word(next(inputs)) if gather.from_row else None
    (out,) = inputs
    if first_row is not None:
        row = first_row + gather.first_sample
        out = out + simt.wide(row) * (shape.width * shape.out_item_bytes)
    offsets = offsets + 4 * len(shape.slots) * gather.first_sample
    factor_ring = shared + shape.config.ring_slots * VECTOR_BYTES
    return Addresses(
        groups=groups,
        scales=scales,
        ids=ids,
        offsets=offsets,
        weights=weights,
        spans=plan.get("spans"),
        means=plan.get("means"),
        bag_spans=plan.get("bag_spans"),
        bag_slots=plan.get("bag_slots"),
        out=out,
        ring=shared + thread * VECTOR_BYTES,
        factor_ring=factor_ring + thread * FACTOR_BYTES,
        partial=partial,
        counters=counters,
    )


def _check(groups: Sequence[Table], rows: Array, offsets: Array, slots: tuple[Slot, ...]) -> None:
    for index, group in enumerate(groups):
        _check_group(index, group)
    if not slots or (len(offsets) - 1) % len(slots):
        raise ValueError(f"{len(offsets)} offsets do not fit {len(slots)} slots per sample")
    if not len(rows):
        raise ValueError("ids are empty: pad them to one element at least")
    column = 0
    for index, slot in enumerate(slots):
        if slot.column != column or slot.dim != _values(groups[slot.group]).shape[1]:
            raise ValueError(f"slot {index} is {slot}, not dim {slot.dim} at column {column}")
        column += slot.dim


def _check_group(index: int, group: Table) -> None:
    values, quantised = _values(group), isinstance(group, QuantisedTable)
    dim, dtype = values.shape[1], str(values.dtype)
    if dtype not in (LIMITS if quantised else DTYPES) or dim % 4 or not 4 <= dim <= 256:
        kind = "quantised " if quantised else ""
        raise ValueError(f"group {index} is {kind}{dtype}[rows, {dim}]: not a gatherable table")
    if isinstance(group, QuantisedTable):
        found = f"{group.scales.dtype}{list(group.scales.shape)}"
        if found != f"float32[{len(values)}]":
            raise ValueError(f"group {index}: scales are {found}, not float32[{len(values)}]")
