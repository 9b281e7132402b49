"""The dot interaction kernel: run on the host, lowered for CUDA, held to float64 on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from host_simt import Memory
from host_warp import LANES, HostWarp
from pallas_kernels import reference
from pallas_kernels.interaction import DotShape, dot, dot_warp, takes
from pallas_kernels.simt import WarpSimt

RELATIVE_ERROR = {"bfloat16": 4e-3, "float16": 5e-4}
CASES = [(3, 27, 64, 64), (2, 2, 32, 0), (1, 32, 128, 128), (4, 9, 32, 8), (2, 17, 96, 0)]


def vectors_of(samples: int, vectors: int, dim: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((samples, vectors * dim)).astype(jnp.dtype(dtype))


def exact(x: np.ndarray, vectors: int, keep: int, columns: int) -> np.ndarray:
    """float64, pair by pair; zero columns behind."""
    apart = x.astype(np.float64).reshape(len(x), vectors, -1)
    pairs = [
        (apart[:, i] * apart[:, j]).sum(1) for i, j in itertools.combinations(range(vectors), 2)
    ]
    out = np.zeros((len(x), columns))
    out[:, : keep + len(pairs)] = np.concatenate([x[:, :keep], np.stack(pairs, 1)], axis=1)
    return out


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    difference = np.asarray(out, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def run_on_host(x: np.ndarray, shape: DotShape) -> np.ndarray:
    """Every warp of the launch, one after the other; the output starts poisoned."""
    memory = Memory()
    out = np.full((shape.samples, shape.columns), np.nan, x.dtype)
    x_at, out_at = memory.place(x), memory.place(out)
    for block, warp in itertools.product(range(shape.blocks), range(shape.warps)):
        simt = HostWarp(memory, shape.warps * shape.pairs_bytes)
        dot_warp(
            *(simt, shape),
            x=np.full(LANES, x_at),
            out=np.full(LANES, out_at),
            pairs=np.full(LANES, warp * shape.pairs_bytes),
            first_sample=np.full(LANES, warp * shape.blocks + block),
            lane=np.arange(LANES),
        )
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "vectors", "dim", "keep"), CASES)
def test_warps_put_every_pair_in_its_place(
    samples: int, vectors: int, dim: int, keep: int, dtype: str
) -> None:
    x = vectors_of(samples, vectors, dim, dtype)
    shape = DotShape(
        samples=samples, vectors=vectors, dim=dim, keep=keep, dtype=dtype, warpgroups=1, blocks=1
    )
    out = run_on_host(x, shape)
    expected = exact(x, vectors, keep, shape.columns)
    assert relative_error(out, expected) < RELATIVE_ERROR[dtype]
    np.testing.assert_array_equal(out == 0, expected == 0)


def test_warps_share_the_samples() -> None:
    x = vectors_of(19, 3, 32, "bfloat16")
    shape = DotShape(
        samples=19, vectors=3, dim=32, keep=32, dtype="bfloat16", warpgroups=1, blocks=2
    )
    assert relative_error(run_on_host(x, shape), exact(x, 3, 32, shape.columns)) < 4e-3


def test_the_host_warp_is_a_warp() -> None:
    assert isinstance(HostWarp(Memory(), 0), WarpSimt)


@pytest.mark.parametrize(("samples", "vectors", "dim", "keep"), CASES)
def test_reference_agrees_pair_by_pair(samples: int, vectors: int, dim: int, keep: int) -> None:
    x = vectors_of(samples, vectors, dim, "float32")
    out = reference.dot(jnp.asarray(x), vectors=vectors, keep=keep, precision=lax.Precision.HIGHEST)
    assert relative_error(np.asarray(out), exact(x, vectors, keep, out.shape[1])) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "vectors", "dim", "keep"), CASES)
def test_lowers_to_cuda(samples: int, vectors: int, dim: int, keep: int, dtype: str) -> None:
    x = jax.ShapeDtypeStruct((samples, vectors * dim), jnp.dtype(dtype))
    run = jax.jit(functools.partial(dot, vectors=vectors, keep=keep))
    assert "mosaic_gpu" in run.trace(x).lower(lowering_platforms=("cuda",)).as_text()


def test_no_samples() -> None:
    assert dot(jnp.zeros((0, 27 * 64), jnp.bfloat16), vectors=27, keep=64).shape == (0, 448)


@pytest.mark.parametrize(
    ("vectors", "dim", "keep", "dtype"),
    [
        (33, 64, 64, "bfloat16"),
        (1, 64, 64, "bfloat16"),
        (27, 16, 16, "bfloat16"),
        (27, 160, 0, "bfloat16"),
        (27, 64, 4, "bfloat16"),
        (27, 64, 64, "float32"),
    ],
)
def test_other_shapes_are_refused(vectors: int, dim: int, keep: int, dtype: str) -> None:
    assert not takes(dtype, vectors, dim, keep)
    with pytest.raises(ValueError, match=f"no dot kernel for {vectors} vectors in {dtype}"):
        dot(jnp.zeros((2, vectors * dim), dtype), vectors=vectors, keep=keep)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("samples", "vectors", "dim", "keep"), [*CASES, (8192, 27, 64, 64)])
def test_gpu_dots(samples: int, vectors: int, dim: int, keep: int, dtype: str) -> None:
    x = vectors_of(samples, vectors, dim, dtype)
    out = jax.jit(functools.partial(dot, vectors=vectors, keep=keep))(x)
    expected = exact(x, vectors, keep, out.shape[1])
    assert relative_error(np.asarray(out), expected) < RELATIVE_ERROR[dtype]
    np.testing.assert_array_equal(np.asarray(out)[:, keep + vectors * (vectors - 1) // 2 :], 0)
