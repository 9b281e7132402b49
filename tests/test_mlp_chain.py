"""Layers in one launch: interpreted, lowered for CUDA, and held to the reference on a GPU."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.mlp import pad_kernel
from pallas_kernels.mlp_chain import CONFIG, ChainConfig, chain, takes

SMALL = ChainConfig(stages=2, blocks=2)
BOTTOM, TOP = (13, 512, 256, 64), (415, 512, 256)


def operands(
    samples: int, widths: tuple[int, ...], scores: int = 0, dtype: str = "bfloat16"
) -> tuple[Any, ...]:
    """x, kernels, biases and scores with outputs near one."""
    rng = np.random.default_rng(0)

    def layer(inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
        kernel = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        bias = jnp.asarray(rng.standard_normal(outputs), jnp.float32)
        return jnp.asarray(kernel, dtype), bias

    x = jnp.asarray(rng.standard_normal((samples, widths[0])), dtype)
    layers = [layer(*shape) for shape in zip(widths, widths[1:], strict=False)]
    kernels, biases = zip(*layers, strict=True)
    return x, kernels, biases, layer(widths[-1], scores) if scores else None


def run(function: Any, *given: Any, **options: Any) -> np.ndarray:
    out = function(*given, activation="relu", **options)
    return np.asarray(out, np.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("samples", "widths", "scores"),
    [
        (64, (64, 128), 0),
        (70, (13, 128, 64), 0),
        (200, (13, 256, 128, 70), 0),  # more tiles than blocks
        (130, (100, 192, 128), 1),
        (70, (64, 64, 128), 2),
    ],
)
def test_interpreted_chain_equals_the_reference(
    samples: int, widths: tuple[int, ...], scores: int, capfd: pytest.CaptureFixture[str]
) -> None:
    given = operands(samples, widths, scores)
    found, expected = run(chain, *given, config=SMALL), run(reference.chain, *given)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=2**-7)
    assert found.shape == expected.shape
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("interpreted")
def test_padded_kernels_and_wider_inputs_change_nothing() -> None:
    x, kernels, biases, scores = operands(70, (100, 70, 64), 1)
    padded = tuple(pad_kernel(kernel) for kernel in kernels)
    wide = jnp.pad(x, ((0, 0), (0, 28)))
    found = run(chain, wide, padded, biases, scores, config=SMALL)
    np.testing.assert_array_equal(found, run(chain, x, kernels, biases, scores, config=SMALL))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("widths", "scores"), [(BOTTOM, 0), (TOP, 1), ((512, 256, 512), 4), ((512, 512, 512), 0)]
)
def test_lowers_to_cuda(widths: tuple[int, ...], scores: int, dtype: str) -> None:
    given = operands(300, widths, scores, dtype)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), given)

    def together(x: Any, kernels: Any, biases: Any, scores: Any) -> Any:
        return chain(x, kernels, biases, scores, activation="gelu")

    lowered = jax.jit(together).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_no_samples() -> None:
    assert run(chain, *operands(0, BOTTOM)).shape == (0, 64)
    assert run(chain, *operands(0, TOP, 1)).shape == (0, 1)


def test_what_there_is_room_for() -> None:
    assert takes(BOTTOM) and takes(TOP, 1) and takes((512, 512, 512))
    assert not takes((1024, 512)) and not takes((64, 520)) and not takes((64, 64), 5)
    assert not takes((64,), 1) and not takes((512, 512, 512), 1)


def test_what_does_not_fit_is_refused() -> None:
    x, kernels, biases, scores = operands(4, (64, 128, 64), 1)
    unchecked = functools.partial(inspect.unwrap(chain), activation="relu")
    with pytest.raises(ValueError, match="all bfloat16 or all float16"):
        unchecked(x.astype(jnp.float32), kernels, biases)
    with pytest.raises(ValueError, match="activation 'swish'"):
        inspect.unwrap(chain)(x, kernels, biases, activation="swish")
    with pytest.raises(ValueError, match=r"no chain of layers of \[64, 1024\]"):
        unchecked(*operands(4, (64, 1024))[:3])
    with pytest.raises(ValueError, match=r"layers of \[64, 128, 64\], kernels \[\(64, 128\)\]"):
        unchecked(x, kernels[:1], biases)
    with pytest.raises(ValueError, match=r"kernels .*\(32, 1\)"):
        unchecked(x, kernels, biases, (scores[0][:32], scores[1]))
    with pytest.raises(ValueError, match="two stages"):
        dataclasses.replace(CONFIG, stages=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("widths", "scores"), [(BOTTOM, 0), (TOP, 1), ((512, 256, 512), 4), ((512, 512, 512), 0)]
)
@pytest.mark.parametrize("samples", [1, 255, 8192, 20_000])
def test_gpu_chain(samples: int, widths: tuple[int, ...], scores: int, dtype: str) -> None:
    """20,000 samples are more tiles than SMs."""
    x, kernels, biases, last = operands(samples, widths, scores, dtype)
    together, apart = (
        jax.jit(functools.partial(f, activation="relu")) for f in (chain, reference.chain)
    )
    found = np.asarray(together(x, kernels, biases, last), np.float32)
    expected = np.asarray(apart(x, kernels, biases, last), np.float32)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
    again = np.asarray(together(x, kernels, biases, last), np.float32)
    np.testing.assert_array_equal(found, again)
