"""The cross layer's widening kernel: interpreted, lowered for CUDA, held to float64 on a GPU."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.cross import CONFIG, CrossConfig, gate, widen
from pallas_kernels.float8 import Float8Kernel, quantise_kernel, rounded
from pallas_kernels.mlp import MlpConfig

# Rounding of the 16-bit output; all else is float32.
RELATIVE_ERROR = {"bfloat16": 4e-3, "float16": 5e-4}
INPUT_SCALE, OUT_SCALE = 4 / 448, 6 / 448
SMALL = CrossConfig(tile=MlpConfig(block_m=64, block_n=128, warpgroups=1, stages=2, blocks=2))


def operands(samples: int, width: int, rank: int, dtype: str = "bfloat16") -> tuple[jax.Array, ...]:
    """x0, x, low, up, bias with outputs near one."""
    rng = np.random.default_rng(0)
    shapes = [(samples, width), (samples, width), (samples, rank), (rank, width)]
    x0, x, low, up = (rng.standard_normal(shape) for shape in shapes)
    arrays = [jnp.asarray(a, dtype) for a in (x0, x, low, up / np.sqrt(rank))]
    return (*arrays, jnp.asarray(rng.standard_normal(width), jnp.float32))


def gate_operands(
    samples: int, width: int, rank: int, layers: int
) -> tuple[jax.Array, list[jax.Array], Float8Kernel, jax.Array]:
    """x0, lows, up, bias of as many layers."""
    rng = np.random.default_rng(0)
    shapes = [(samples, width), *[(samples, rank)] * layers, (layers * rank, width)]
    x0, *lows, up = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    kernel = quantise_kernel(up / np.sqrt(layers * rank), INPUT_SCALE)
    lows = [rounded(low, INPUT_SCALE) for low in lows]
    bias = jnp.asarray(rng.standard_normal(width), jnp.float32)
    return x0.astype(jnp.bfloat16), lows, kernel, bias


def relative_error(out: jax.Array, *arrays: jax.Array) -> float:
    """Against float64."""
    x0, x, low, up, bias = (np.asarray(array, np.float64) for array in arrays)
    exact = x0 * (low @ up + bias) + x
    return float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("samples", "width", "rank"), [(300, 256, 128), (1, 128, 64)])
def test_interpreted_kernel_is_exact(
    samples: int,
    width: int,
    rank: int,
    same: bool,
    cluster: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    x0, *rest = operands(samples, width, rank)
    x0 = rest[0] if same else x0
    out = widen(x0, *rest, config=dataclasses.replace(SMALL, cluster=cluster))
    assert relative_error(out, x0, *rest) < RELATIVE_ERROR["bfloat16"]
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("samples", "width", "rank", "layers"),
    [(300, 256, 128, 2), (1, 128, 128, 1), (70, 128, 256, 3)],
)
def test_interpreted_gate_equals_the_reference(
    samples: int,
    width: int,
    rank: int,
    layers: int,
    cluster: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Some results are beyond OUT_SCALE and are cut."""
    arrays = gate_operands(samples, width, rank, layers)
    config = dataclasses.replace(SMALL, cluster=cluster)
    out = gate(*arrays, out_scale=OUT_SCALE, config=config)
    expected = reference.gate(*arrays, out_scale=OUT_SCALE)
    assert out.dtype == expected.dtype == "float8_e4m3fn"
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-3, atol=2**-6
    )
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("samples", [128, 129])
def test_gate_lowers_to_cuda(samples: int, layers: int) -> None:
    """In clusters where there are rows for them."""
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), gate_operands(samples, 3456, 512, layers)
    )
    run = functools.partial(gate, out_scale=OUT_SCALE)
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("samples", [128, 200])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lowers_to_cuda(dtype: str, same: bool, samples: int) -> None:
    """In clusters where there are rows for them."""

    def run(x0: jax.Array, x: jax.Array, *rest: jax.Array) -> jax.Array:
        return widen(x if same else x0, x, *rest)

    shapes = jax.eval_shape(functools.partial(operands, samples, 3456, 512, dtype))
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_no_samples() -> None:
    assert widen(*operands(0, 128, 64)).shape == (0, 128)
    assert gate(*gate_operands(0, 128, 128, 2), out_scale=OUT_SCALE).shape == (0, 128)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 200, 64), "bfloat16", "no tiles for width 200 and rank 64"),
        ((3, 128, 96), "bfloat16", "no tiles for width 128 and rank 96"),
        ((3, 128, 64), "float32", "float32.*all bfloat16 or all float16"),
    ],
)
def test_what_no_tile_takes_is_refused(
    shape: tuple[int, int, int], dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        widen(*operands(*shape, dtype=dtype))


def test_shapes_that_do_not_match_are_refused() -> None:
    x0, x, low, up, bias = operands(3, 128, 64)
    unchecked = inspect.unwrap(widen)  # without the type checker that tests run under
    with pytest.raises(ValueError, match=r"are .*\(2, 128\).*, up is \(64, 128\)"):
        unchecked(x0[:2], x, low, up, bias)


def test_gates_that_no_tile_takes_are_refused() -> None:
    unchecked = functools.partial(inspect.unwrap(gate), out_scale=OUT_SCALE)
    with pytest.raises(ValueError, match=r"no tiles for width 128 and ranks \[64, 64\]"):
        unchecked(*gate_operands(3, 128, 64, 2))
    x0, lows, up, bias = gate_operands(3, 128, 128, 2)
    with pytest.raises(ValueError, match=r"x0 is float32, lows are .*float8_e4m3fn"):
        unchecked(x0.astype(jnp.float32), lows, up, bias)
    with pytest.raises(ValueError, match=r"lows are \['bfloat16'\]"):
        unchecked(x0, [low.astype(jnp.bfloat16) for low in lows], up, bias)
    with pytest.raises(ValueError, match=r"lows are \[\(3, 128\)\], up \(256, 128\)"):
        unchecked(x0, lows[:1], up, bias)
    with pytest.raises(ValueError, match=r"bias \(64,\)"):
        unchecked(x0, lows, up, bias[:64])


@pytest.mark.parametrize(
    ("tile", "slots", "message"),
    [
        (MlpConfig(block_n=128), 3, "a tile is one warpgroup's"),
        (CONFIG.tile, 1, "needs two piece slots"),
        (CONFIG.tile, 4, "262144 bytes of SMEM, above 232448"),
    ],
)
def test_impossible_configs_are_refused(tile: MlpConfig, slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossConfig(tile=tile, piece_slots=slots)


def test_clusters_that_are_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole clusters"):
        CrossConfig(cluster=5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("samples", [1, 255, 2048])
def test_gpu_widens_as_float64_does(samples: int, dtype: str) -> None:
    arrays = operands(samples, 3456, 512, dtype)
    assert relative_error(jax.jit(widen)(*arrays), *arrays) < RELATIVE_ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 255, 2048, 8191])
def test_gpu_gate_agrees_with_the_reference(samples: int, layers: int) -> None:
    """XLA may add the products of few samples up in other ways, and so round to the next e4m3."""
    arrays = gate_operands(samples, 3456, 512, layers)
    run, expect = (
        jax.jit(functools.partial(f, out_scale=OUT_SCALE)) for f in (gate, reference.gate)
    )
    out, expected = (np.asarray(f(*arrays), np.float32) for f in (run, expect))
    assert np.linalg.norm(out - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_array_equal(out, np.asarray(run(*arrays), np.float32))


@pytest.mark.gpu
def test_gpu_first_layer_reads_its_input_once() -> None:
    _, *rest = operands(1000, 3456, 512)
    out = jax.jit(lambda x, *others: widen(x, x, *others))(*rest)
    assert relative_error(out, rest[0], *rest) < RELATIVE_ERROR["bfloat16"]


@pytest.mark.gpu
def test_gpu_network_agrees_with_the_reference() -> None:
    from recflow_jax.backend import choose_backend
    from recflow_jax.config import DLRMConfig
    from recflow_jax.model import CrossLayer, Ops, interact

    config = DLRMConfig.shipped("dlrm-v2")
    x0, _, _, up, bias = operands(512, 3456, 512)
    layers = (CrossLayer(down=up.T * 0.4, up=up, bias=bias),)
    out, expected = (
        interact(layers, x0, config=config, ops=ops)
        for ops in (choose_backend("mosaic").ops, Ops())
    )
    difference = np.asarray(out, np.float32) - np.asarray(expected, np.float32)
    assert np.linalg.norm(difference) < 8e-3 * np.linalg.norm(np.asarray(expected, np.float32))
