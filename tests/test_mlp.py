"""The MLP layer kernel: interpreted on the CPU, lowered for CUDA, and held to float64 on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mlp, reference
from pallas_kernels.float8 import Float8Kernel, quantise_kernel, rounded
from pallas_kernels.mlp import CONFIGS, MlpConfig, choose_config, dense, pad_kernel

# Rounding of the 16-bit output; sums are float32.
RELATIVE_ERROR = {"bfloat16": 4e-3, "float16": 5e-4}
INPUT_SCALE = 4 / 448
SMALL = MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=2, blocks=2)
WITH_SPLITS = [
    dataclasses.replace(CONFIGS[1], splits=4),
    dataclasses.replace(CONFIGS[4], splits=3),  # of 54 steps, but not of 4 or 8
]


def operands(
    m: int, k: int, n: int, dtype: str = "bfloat16", seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [m, k], kernel [k, n] scaled to keep the outputs near one, float32 bias [n]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k))
    kernel = rng.standard_normal((k, n)) / np.sqrt(k)
    bias = rng.standard_normal(n)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(bias, jnp.float32)


def float8_operands(
    m: int, k: int, n: int, seed: int = 0
) -> tuple[jax.Array, Float8Kernel, jax.Array]:
    """The same, x and kernel e4m3; inputs beyond four are cut."""
    x, kernel, bias = operands(m, k, n, "float32", seed)
    quantised = quantise_kernel(kernel, INPUT_SCALE)
    return rounded(x, INPUT_SCALE), quantised, bias


def relative_error(out: jax.Array, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> float:
    """Of a relu layer, against float64."""
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    exact = np.maximum(exact, 0)
    return float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("m", "k", "n", "splits"),
    [(70, 100, 70, 1), (129, 64, 200, 1), (70, 330, 70, 3), (70, 100, 70, 3)],
)
def test_interpreted_kernel_equals_the_reference(
    m: int, k: int, n: int, splits: int, capfd: pytest.CaptureFixture[str]
) -> None:
    x, kernel, bias = operands(m, k, n)
    config = dataclasses.replace(SMALL, splits=splits)
    out = dense(x, kernel, bias, activation="relu", config=config)
    expected = reference.dense(x, kernel, bias, activation="relu")
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.02
    )
    assert relative_error(out, x, kernel, bias) < RELATIVE_ERROR["bfloat16"]
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("out_scale", [None, 0.005])
@pytest.mark.parametrize(
    ("m", "k", "n", "splits"), [(70, 100, 70, 1), (129, 128, 200, 1), (70, 700, 70, 3)]
)
def test_interpreted_float8_kernel_equals_the_reference(
    m: int, k: int, n: int, splits: int, out_scale: float | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """An out_scale of 0.005 cuts outputs beyond 2.24."""
    x, kernel, bias = float8_operands(m, k, n)
    config = dataclasses.replace(SMALL, splits=splits)
    options = {"activation": "gelu", "out_scale": out_scale}
    out = dense(x, pad_kernel(kernel), bias, config=config, **options)
    expected = reference.dense(x, kernel, bias, **options)
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-3, atol=2**-6
    )
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("interpreted")
def test_a_layer_of_floats_rounds_for_a_float8_layer_behind_it() -> None:
    x, kernel, bias = operands(70, 100, 70)
    options = {"activation": "relu", "out_scale": 0.005}
    out = dense(x, kernel, bias, config=SMALL, **options)
    expected = reference.dense(x, kernel, bias, **options)
    assert out.dtype == "float8_e4m3fn"
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-3, atol=2**-6
    )


@pytest.mark.usefixtures("interpreted")
def test_floats_are_rounded_for_a_float8_kernel() -> None:
    x, kernel, bias = operands(70, 100, 70, "float32")[0], *float8_operands(70, 100, 70)[1:]
    out = dense(x.astype(jnp.bfloat16), kernel, bias, activation="relu", config=SMALL)
    expected = reference.dense(x.astype(jnp.bfloat16), kernel, bias, activation="relu")
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-3
    )


@pytest.mark.usefixtures("interpreted")
def test_k_that_is_no_multiple_of_a_block_is_padded() -> None:
    x, kernel, bias = operands(70, 150, 70)  # padded to 192 once, to 256 for this config
    config = dataclasses.replace(SMALL, block_k=128)
    out = dense(x, pad_kernel(kernel), bias, activation="relu", config=config)
    assert relative_error(out, x, kernel, bias) < RELATIVE_ERROR["bfloat16"]


@pytest.mark.usefixtures("interpreted")
def test_interpreter_finds_a_planted_race(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the wait for the copy that still reads an output slot, the slot is overwritten."""
    wait = mlp.plgpu.wait_smem_to_gmem
    only_last = lambda n, **kwargs: wait(n, **kwargs) if n == 0 else None  # noqa: E731
    monkeypatch.setattr(mlp.plgpu, "wait_smem_to_gmem", only_last)
    x, kernel, bias = operands(64 * 6, 64, 64)
    raised = ""
    try:
        dense(x, kernel, bias, activation="relu", config=SMALL).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # raised by newer JAX, printed by older
        raised = str(error)
    assert "RACE DETECTED" in raised + "".join(capfd.readouterr())


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [*CONFIGS, *WITH_SPLITS], ids=str)
def test_every_config_lowers_to_cuda(config: MlpConfig, dtype: str, activation: str) -> None:
    layer = functools.partial(dense, activation=activation, config=config)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(99, 100, 130, dtype)]
    lowered = jax.jit(layer).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("out_scale", [None, 0.01])
@pytest.mark.parametrize("config", [*CONFIGS, *WITH_SPLITS], ids=str)
def test_every_config_lowers_float8_to_cuda(config: MlpConfig, out_scale: float | None) -> None:
    layer = functools.partial(dense, activation="relu", out_scale=out_scale, config=config)
    for given in (float8_operands(99, 1000, 130), operands(99, 1000, 130)):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), given)
        lowered = jax.jit(layer).trace(*shapes).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def test_float8_weights_are_padded_to_longer_steps() -> None:
    _, kernel, _ = float8_operands(1, 13, 70)
    padded = pad_kernel(kernel)
    assert isinstance(padded, Float8Kernel)
    assert (padded.shape, padded.values.shape, padded.scales.shape) == (
        (128, 128),
        (128, 128),
        (128,),
    )
    np.testing.assert_array_equal(padded.values[:70, :13], kernel.values)


def test_padding_changes_no_output() -> None:
    _, kernel, _ = operands(1, 13, 70)
    padded = np.asarray(pad_kernel(kernel))
    assert padded.shape == (64, 128)
    np.testing.assert_array_equal(padded[:13, :70], kernel)
    assert not padded[13:].any() and not padded[:, 70:].any()


@pytest.mark.parametrize(("m", "n"), [(1, 64), (256, 1024), (8192, 1024), (300, 192), (9, 320)])
def test_chosen_tiles_divide_the_columns(m: int, n: int) -> None:
    assert n % choose_config(m, n, 512).block_n == 0


def test_full_cards_get_large_tiles_and_small_batches_small_ones() -> None:
    assert choose_config(32768, 1024, 1024).block_n == 256
    small = choose_config(64, 1024, 1024)
    assert small.block_m * small.block_n < 128 * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 96}, "block_m is no multiple of 64 per warpgroup"),
        ({"block_n": 48}, "block_n is no multiple of 64"),
        ({"block_k": 32}, "block_k is no multiple of 64"),
        ({"stages": 1}, "needs two stages"),
        ({"stages": 5}, "bytes of SMEM"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MlpConfig(**change)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, kernel, bias = operands(4, 64, 64)
    with pytest.raises(ValueError, match="x is float32"):
        dense(x.astype(jnp.float32), kernel, bias, activation="relu")
    with pytest.raises(ValueError, match="activation 'swish'"):
        dense(x, kernel, bias, activation="swish")
    with pytest.raises(ValueError, match="x has 200 inputs, the kernel 64"):
        dense(jnp.zeros((4, 200), x.dtype), kernel, bias, activation="relu")
    with pytest.raises(ValueError, match="the bias has 200 outputs"):
        dense(x, kernel, jnp.zeros(200), activation="relu")
    rounded_x, float8_kernel, _ = float8_operands(4, 64, 64)
    with pytest.raises(ValueError, match=r"x is float8_e4m3fn, kernel bfloat16"):
        dense(rounded_x, kernel, bias, activation="relu")
    with pytest.raises(ValueError, match="x is float32, the kernel float8_e4m3fn"):
        dense(x.astype(jnp.float32), float8_kernel, bias, activation="relu")
    with pytest.raises(ValueError, match="x has 200 inputs, the kernel 64"):
        dense(jnp.zeros((4, 200), x.dtype), float8_kernel, bias, activation="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [None, *CONFIGS, *WITH_SPLITS], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 13, 512), (7, 64, 256), (99, 479, 130), (1000, 3456, 1024), (4096, 1024, 512)],
)
def test_gpu_layer(m: int, k: int, n: int, config: MlpConfig | None, dtype: str) -> None:
    x, kernel, bias = operands(m, k, n, dtype)
    layer = jax.jit(functools.partial(dense, activation="relu", config=config))
    out = layer(x, pad_kernel(kernel), bias)
    assert out.shape == (m, n)
    assert relative_error(out, x, kernel, bias) < RELATIVE_ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *CONFIGS, *WITH_SPLITS], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(7, 64, 256), (99, 479, 130), (1000, 3456, 1024)])
def test_gpu_float8_layer(m: int, k: int, n: int, config: MlpConfig | None) -> None:
    """Against float64 of the same e4m3 operands: tensor cores add up with fewer bits, so that some
    results are rounded to the next e4m3.
    """
    x, kernel, bias = float8_operands(m, k, n)
    wide = np.asarray(kernel.values, np.float64).T * np.asarray(kernel.scales, np.float64)
    exact = np.maximum(np.asarray(x, np.float64) @ wide + np.asarray(bias), 0)
    scale = 0.01
    of_scale = {None: (exact, 1e-2), scale: (np.minimum(exact, scale * 448), 5e-2)}
    for out_scale, (expected, bound) in of_scale.items():
        layer = functools.partial(dense, activation="relu", out_scale=out_scale, config=config)
        out = jax.jit(layer)(x, pad_kernel(kernel), bias)
        found = np.asarray(out, np.float64) * (out_scale or 1)
        assert found.shape == (m, n)
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_gpu_activations(activation: str) -> None:
    x, kernel, bias = operands(300, 128, 256)
    out = jax.jit(functools.partial(dense, activation=activation))(x, kernel, bias)
    expected = reference.dense(x, kernel, bias, activation=activation)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.02, rtol=0.01
    )


@pytest.mark.gpu
def test_gpu_same_bits_twice() -> None:
    x, kernel, bias = operands(1111, 512, 1024)
    layer = jax.jit(functools.partial(dense, activation="relu"))
    first, again = layer(x, kernel, bias), layer(x, kernel, bias)
    np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(again, np.float32))
