"""Bags and dot interaction in one kernel: run on the host, lowered for CUDA, held to the reference
on a GPU.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from host_simt import Memory
from host_warp import LANES, HostWarp
from pallas_kernels import reference
from pallas_kernels.pooled_dot import Bags, PooledDotShape, pooled_dot, pooled_dot_warp, takes
from pallas_kernels.slots import Slot
from pallas_kernels.tables import LIMITS, QuantisedTable, Table, quantise_rows

RELATIVE_ERROR = {"bfloat16": 4e-3, "float16": 5e-4}
ROWS = 50
ONE_HOT = (1,)
DTYPES = [
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
    ("bfloat16", "int8"),
    ("float16", "float8_e4m3fn"),
]
LENGTHS = [ONE_HOT, (0, 1, 2, 7), (0,)]
CASES = [(5, 26, 64, 64), (1, 1, 32, 32), (3, 28, 128, 512), (4, 8, 32, 0)]


def slots_of(count: int, dim: int) -> tuple[Slot, ...]:
    return tuple(Slot(group=0, dim=dim, column=i * dim) for i in range(count))


def operands(
    samples: int,
    slots: int,
    dim: int,
    keep: int,
    dtype: str,
    lengths: tuple[int, ...],
    table_dtype: str,
) -> tuple[Any, ...]:
    """left, groups, rows, offsets; one id at least."""
    rng = np.random.default_rng(0)
    left = jnp.asarray(rng.standard_normal((samples, keep)), dtype)
    table = jnp.asarray(rng.standard_normal((ROWS, dim)), jnp.float32)
    counts = rng.choice(lengths, samples * slots)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = rng.integers(0, ROWS, max(int(offsets[-1]), 1)).astype(np.int32)
    group = (
        quantise_rows(table, table_dtype) if table_dtype in LIMITS else table.astype(table_dtype)
    )
    return left, (group,), jnp.asarray(rows), jnp.asarray(offsets)


def expected(left: Any, groups: Any, rows: Any, offsets: Any, slots: tuple[Slot, ...]) -> Any:
    """By the reference, dots in float32; pooled rows are rounded, as the kernel's are."""

    def gather(*bags: Any, **options: Any) -> Any:
        return reference.pooled_gather(*bags, **options).astype(jnp.float32)

    options: dict[str, Any] = {"slots": slots, "precision": lax.Precision.HIGHEST}
    return np.asarray(
        reference.pooled_dot(left, groups, rows, offsets, None, gather=gather, **options)
    )


def assert_agrees(out: Any, exact: np.ndarray, dtype: str) -> None:
    own = np.asarray(out, np.float64)
    np.testing.assert_array_equal(own[:, exact.shape[1] :], 0)
    difference = np.linalg.norm(own[:, : exact.shape[1]] - exact)
    assert difference <= RELATIVE_ERROR[dtype] * np.linalg.norm(exact)


def run_on_host(
    shape: PooledDotShape, left: Any, groups: tuple[Table], rows: Any, offsets: Any
) -> np.ndarray:
    """Every warp of the launch, one after the other; the output starts poisoned."""
    memory, (group,) = Memory(), groups
    out = np.full((shape.samples, shape.columns), np.nan, left.dtype)
    is_quantised = isinstance(group, QuantisedTable)
    arrays = {
        "left": left,
        "table": group.values if is_quantised else group,
        "scales": group.scales if is_quantised else None,
        "ids": rows,
        "offsets": offsets,
    }
    places = {
        name: None if array is None else np.full(LANES, memory.place(np.asarray(array)))
        for name, array in arrays.items()
    }
    at = Bags(**places, out=np.full(LANES, memory.place(out)))
    for block, warp in itertools.product(range(shape.blocks), range(shape.warps)):
        simt = HostWarp(memory, shape.warps * shape.pairs_bytes)
        pooled_dot_warp(
            *(simt, shape),
            at=at,
            pairs=np.full(LANES, warp * shape.pairs_bytes),
            first_sample=np.full(LANES, warp * shape.blocks + block),
            lane=np.arange(LANES),
        )
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), CASES)
def test_warps_load_pool_and_multiply(
    samples: int,
    slots: int,
    dim: int,
    keep: int,
    dtype: str,
    lengths: tuple[int, ...],
    table_dtype: str,
) -> None:
    arrays = operands(samples, slots, dim, keep, dtype, lengths, table_dtype)
    own = slots_of(slots, dim)
    shape = PooledDotShape(
        samples=samples,
        vectors=reference.vectors_of(arrays[0], own),
        dim=dim,
        keep=keep,
        dtype=dtype,
        table_dtype=table_dtype,
        warpgroups=1,
        blocks=1,
    )
    exact = expected(*arrays, slots=own)
    assert_agrees(run_on_host(shape, *arrays), exact, dtype)


@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), CASES)
def test_lowers_to_cuda(
    samples: int, slots: int, dim: int, keep: int, dtype: str, table_dtype: str
) -> None:
    arrays = operands(samples, slots, dim, keep, dtype, ONE_HOT, table_dtype)
    run = jax.jit(functools.partial(pooled_dot, slots=slots_of(slots, dim)))
    lowered = run.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_no_samples() -> None:
    arrays = operands(0, 26, 64, 64, "bfloat16", ONE_HOT, "bfloat16")
    assert pooled_dot(*arrays, slots=slots_of(26, 64)).shape == (0, 448)


def test_what_it_is_not_made_for() -> None:
    left, (table,), *bags = operands(2, 4, 32, 32, "bfloat16", ONE_HOT, "bfloat16")
    slots = slots_of(4, 32)
    assert takes(left, (table,), None, slots)
    longer = (*slots[:-1], Slot(group=0, dim=32, column=96, expected_ids=1.5))
    mean = (*slots[:-1], Slot(group=0, dim=32, column=96, mean=True))
    others = [
        (left, (table, table), None, slots),
        (left.astype(jnp.float32), (table,), None, slots),
        (left, (table.astype(jnp.int32),), None, slots),
        (left, (table,), jnp.ones(8), slots),
        (left, (table,), None, longer),
        (left, (table,), None, mean),
        (left[:, :8], (table,), None, slots),
        (left, (table,), None, slots_of(32, 32)),
    ]
    for other, groups, weights, own in others:
        assert not takes(other, groups, weights, own)
    with pytest.raises(ValueError, match="no pooled dot kernel"):
        pooled_dot(left, (table,), *bags, slots=mean)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), [*CASES, (8191, 26, 64, 64)])
def test_gpu_agrees_with_the_reference(
    samples: int,
    slots: int,
    dim: int,
    keep: int,
    dtype: str,
    lengths: tuple[int, ...],
    table_dtype: str,
) -> None:
    arrays = operands(samples, slots, dim, keep, dtype, lengths, table_dtype)
    own = slots_of(slots, dim)
    out = jax.jit(functools.partial(pooled_dot, slots=own))(*arrays)
    assert_agrees(out, expected(*arrays, slots=own), dtype)
