"""What this device reaches in this run, and what that makes of a batch: its floor.

The floor of a batch is the larger of its bytes at the copy rate and its FLOP at the matmul rate.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import ITEM_BYTES, DLRMConfig
from recflow_jax.data.workloads import SECTOR_BYTES, flops_per_sample
from recflow_jax.layout import Group, Layout
from recflow_jax.measure.timing import Timed, TimingOptions, measure, measure_side_by_side
from recflow_jax.model import param_shapes


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates measured side by side with the contenders: bytes read and written per second by a
    copy, floating-point operations per second by a matmul in `matmul_dtype`.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_dtype: str

    def floor_us(self, moved_bytes: float, flop: float) -> float:
        """Microseconds for so many bytes or so many operations, whichever take longer."""
        return 1e6 * max(moved_bytes / self.copy_bytes_per_s, flop / self.matmul_flop_per_s)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a batch takes at least. Bytes: rows in whole 32-byte sectors, every time that one is
    asked for, a sector more for the scale of a quantised row; ids, offsets and dense features; the
    layers' parameters; the scores.

    distinct_row_bytes: the same rows counted once each: caches may serve the rest.
    """

    row_bytes: int
    distinct_row_bytes: int
    input_bytes: int
    layer_bytes: int
    output_bytes: int
    flop: float

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.row_bytes + self.input_bytes + self.layer_bytes + self.output_bytes


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Microseconds below which a batch's work does not fit this device."""

    bytes_us: float
    flop_us: float

    @classmethod
    def of(cls, work: Work, ceilings: Ceilings) -> "Floor":
        """The floor of `work` at the measured rates."""
        return cls(
            bytes_us=1e6 * work.bytes / ceilings.copy_bytes_per_s,
            flop_us=1e6 * work.flop / ceilings.matmul_flop_per_s,
        )

    @property
    def us(self) -> float:
        """The floor: bytes and FLOP may overlap perfectly."""
        return max(self.bytes_us, self.flop_us)


def measure_ceilings(dtype: str, options: TimingOptions | None = None) -> Ceilings:
    """Copy and matmul rate of the default device, for float32 in full precision."""
    return Ceilings(
        copy_bytes_per_s=copy_bytes_per_s(options),
        matmul_flop_per_s=matmul_flop_per_s(dtype, options),
        matmul_dtype=dtype,
    )


def copy_bytes_per_s(options: TimingOptions | None = None) -> float:
    """Bytes read and written per second, the better of a copy and an update in place."""
    size = 2**27 if _on_gpu() else 2**24
    source = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1).lower(source).compile()
    update = jax.jit(lambda x: x + 1, donate_argnums=0).lower(source).compile()
    updated = [jnp.zeros(size, jnp.float32)]

    def in_place(_: int) -> Any:
        updated[0] = update(updated[0])
        return updated[0]

    contenders = {"copy": Timed(launch=lambda _: copy(source)), "update": Timed(launch=in_place)}
    timings = measure_side_by_side(contenders, options)
    return max(2 * source.nbytes / timing.median_us * 1e6 for timing in timings.values())


def matmul_flop_per_s(dtype: str, options: TimingOptions | None = None) -> float:
    """FLOP per second of jnp.dot on random square matrices."""
    if _on_gpu():
        side = 8192 if dtype != "float32" else 4096
    else:
        side = 1024
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (side, side), jnp.float32).astype(dtype) for key in keys)
    by_rows = dtype.startswith("float8")  # as tensor cores take both factors then
    product = partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1 if by_rows else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=_product_dtype(dtype),
    )
    dot = jax.jit(product).lower(a, b).compile()
    timing = measure(Timed(launch=lambda _: dot(a, b)), options)
    return 2 * side**3 / timing.median_us * 1e6


def _product_dtype(dtype: str) -> str:
    return "bfloat16" if dtype.startswith("float8") else dtype


def work_of(config: DLRMConfig, layout: Layout, batch: JaggedBatch) -> Work:
    """What one batch takes at least (see Work)."""
    compute_bytes = ITEM_BYTES[config.compute_dtype]
    row_bytes, distinct = _row_bytes(layout, batch)
    offsets = batch.samples * len(layout.slots) + 1
    weight_bytes = 0 if batch.weights is None else batch.weights.nbytes
    return Work(
        row_bytes=row_bytes,
        distinct_row_bytes=distinct,
        input_bytes=4 * (len(batch.values) + offsets) + batch.dense.nbytes + weight_bytes,
        layer_bytes=compute_bytes * layer_parameters(config),
        output_bytes=4 * batch.samples * config.outputs,
        flop=flops_per_sample(config) * batch.samples,
    )


def layer_parameters(config: DLRMConfig) -> int:
    """Parameters of all layers, tables apart."""
    shapes = param_shapes(config)
    leaves = jax.tree.leaves((shapes.bottom, shapes.cross, shapes.top))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def _row_bytes(layout: Layout, batch: JaggedBatch) -> tuple[int, int]:
    """Bytes in whole sectors of all rows asked for, and of the distinct ones."""
    rows, lengths = layout.rows(batch), np.diff(layout.slot_offsets(batch))
    groups = np.array([slot.group for slot in layout.slots], np.int8)
    group_of_id = np.repeat(np.tile(groups, batch.samples), lengths)
    asked = distinct = 0
    for index, group in enumerate(layout.groups):
        own = rows if len(layout.groups) == 1 else rows[group_of_id == index]
        seen = np.zeros(group.rows, bool)
        seen[own] = True
        asked += _sector_bytes(own, group)
        distinct += _sector_bytes(np.flatnonzero(seen), group)
    return asked, distinct


def _sector_bytes(rows: np.ndarray, group: Group) -> int:
    """Bytes of the 32-byte sectors that `rows` of a group lie in, one for each scale."""
    size, scales = group.value_bytes, len(rows) * SECTOR_BYTES * group.quantised
    if size % SECTOR_BYTES == 0:
        return len(rows) * size + scales
    starts = rows.astype(np.int64) * size
    sectors = (starts + size - 1) // SECTOR_BYTES - starts // SECTOR_BYTES + 1
    return int(sectors.sum()) * SECTOR_BYTES + scales


def _on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"
