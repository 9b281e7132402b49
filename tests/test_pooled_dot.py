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
from pallas_kernels.interaction import DotShape
from pallas_kernels.pooled_dot import Bags, pooled_dot, pooled_dot_warp, takes
from pallas_kernels.slots import Slot
from pallas_kernels.tables import QuantisedTable

RELATIVE_ERROR = {"bfloat16": 4e-3, "float16": 5e-4}
ROWS = 50
ONE_HOT = (1,)
LENGTHS = [ONE_HOT, (0, 1, 2, 7), (0,)]
CASES = [(5, 26, 64, 64), (1, 1, 32, 32), (3, 28, 128, 512), (4, 8, 32, 0)]


def slots_of(count: int, dim: int) -> tuple[Slot, ...]:
    return tuple(Slot(group=0, dim=dim, column=i * dim) for i in range(count))


def operands(
    samples: int, slots: int, dim: int, keep: int, dtype: str, lengths: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """left, table, rows, offsets; one id at least."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((samples, keep)).astype(jnp.dtype(dtype))
    table = rng.standard_normal((ROWS, dim)).astype(jnp.dtype(dtype))
    counts = rng.choice(lengths, samples * slots)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = rng.integers(0, ROWS, max(int(offsets[-1]), 1)).astype(np.int32)
    return left, table, rows, offsets


def expected(left: Any, table: Any, rows: Any, offsets: Any, slots: tuple[Slot, ...]) -> np.ndarray:
    """By the reference; the pooled rows are rounded, as the kernel's are."""
    run = functools.partial(reference.pooled_dot, slots=slots, precision=lax.Precision.HIGHEST)
    pooled = reference.pooled_gather(
        (table,), rows, offsets, None, slots=slots, out_dtype=left.dtype, left=left
    )
    exact = reference.dot(
        pooled.astype(jnp.float32),
        vectors=reference.vectors_of(left, slots),
        keep=left.shape[1],
        precision=lax.Precision.HIGHEST,
    )
    assert run(left, (table,), rows, offsets, None).shape == exact.shape
    return np.asarray(exact)


def assert_agrees(out: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    own = np.asarray(out, np.float64)
    np.testing.assert_array_equal(own[:, exact.shape[1] :], 0)
    difference = np.linalg.norm(own[:, : exact.shape[1]] - exact)
    assert difference <= RELATIVE_ERROR[dtype] * np.linalg.norm(exact)


def run_on_host(arrays: tuple[np.ndarray, ...], shape: DotShape) -> np.ndarray:
    """Every warp of the launch, one after the other; the output starts poisoned."""
    memory = Memory()
    out = np.full((shape.samples, shape.columns), np.nan, arrays[0].dtype)
    names = ("left", "table", "ids", "offsets", "out")
    at = Bags(
        **{
            name: np.full(LANES, memory.place(array))
            for name, array in zip(names, (*arrays, out), strict=True)
        }
    )
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
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), CASES)
def test_warps_load_pool_and_multiply(
    samples: int, slots: int, dim: int, keep: int, dtype: str, lengths: tuple[int, ...]
) -> None:
    arrays = operands(samples, slots, dim, keep, dtype, lengths)
    own = slots_of(slots, dim)
    shape = DotShape(
        samples=samples,
        vectors=reference.vectors_of(jnp.asarray(arrays[0]), own),
        dim=dim,
        keep=keep,
        dtype=dtype,
        warpgroups=1,
        blocks=1,
    )
    exact = expected(*map(jnp.asarray, arrays), slots=own)
    assert_agrees(run_on_host(arrays, shape), exact, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), CASES)
def test_lowers_to_cuda(samples: int, slots: int, dim: int, keep: int, dtype: str) -> None:
    left, table, rows, offsets = operands(samples, slots, dim, keep, dtype, ONE_HOT)
    run = jax.jit(functools.partial(pooled_dot, slots=slots_of(slots, dim)))
    lowered = run.trace(left, (table,), rows, offsets).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_no_samples() -> None:
    left, table, rows, offsets = map(jnp.asarray, operands(0, 26, 64, 64, "bfloat16", ONE_HOT))
    out = pooled_dot(left, (table,), rows, offsets, slots=slots_of(26, 64))
    assert out.shape == (0, 448)


def test_what_it_is_not_made_for() -> None:
    left, table, *bags = map(jnp.asarray, operands(2, 4, 32, 32, "bfloat16", ONE_HOT))
    slots = slots_of(4, 32)
    assert takes(left, (table,), None, slots)
    quantised = QuantisedTable(values=table.astype(jnp.int8), scales=jnp.ones(ROWS))
    longer = (*slots[:-1], Slot(group=0, dim=32, column=96, expected_ids=1.5))
    mean = (*slots[:-1], Slot(group=0, dim=32, column=96, mean=True))
    others = [
        (left, (table, table), None, slots),
        (left, (quantised,), None, slots),
        (left, (table.astype(jnp.float32),), None, slots),
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
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "slots", "dim", "keep"), [*CASES, (8191, 26, 64, 64)])
def test_gpu_agrees_with_the_reference(
    samples: int, slots: int, dim: int, keep: int, dtype: str, lengths: tuple[int, ...]
) -> None:
    arrays = [jnp.asarray(a) for a in operands(samples, slots, dim, keep, dtype, lengths)]
    left, table, *bags = arrays
    own = slots_of(slots, dim)
    out = jax.jit(functools.partial(pooled_dot, slots=own))(left, (table,), *bags)
    assert_agrees(np.asarray(out), expected(*arrays, slots=own), dtype)
