"""Which back end a device gets, and how the mosaic one falls back to XLA for single layers."""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import embedding, reference
from pallas_kernels.float8 import quantise_kernel
from recflow_jax.backend import BackendError, choose_backend
from recflow_jax.calibration import calibrate
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.data.workloads import generate
from recflow_jax.layout import Layout
from recflow_jax.model import Params, forward, to_device
from recflow_jax.tiles import Chain, DenseShape, TileTable
from small_models import params_of

CONFIG = DLRMConfig(
    name="small",
    tables=(TableConfig(name="t", rows=9, dim=8),),
    features=(FeatureConfig(name="f", table="t"),),
    dense_width=13,
    bottom_mlp=(20, 8),
    interaction="dot",
    top_mlp=(70, 1),
    compute_dtype="bfloat16",
)


def gpu(capability: str) -> SimpleNamespace:
    """What choose_backend looks at of a JAX device."""
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA Test", compute_capability=capability)


def test_hopper_gets_the_kernels() -> None:
    backend = choose_backend("auto", gpu("9.0"))
    assert (backend.name, backend.reason) == ("mosaic", "compute capability 9.0")
    assert backend.ops.pooled_gather is embedding.pooled_gather


@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0", "12.0"])
def test_gpus_without_wgmma_get_xla(capability: str) -> None:
    backend = choose_backend("auto", gpu(capability))
    assert backend.name == "xla"
    assert backend.reason == f"compute capability {capability} is not 9.0, Hopper's"


def test_a_cpu_gets_xla() -> None:
    assert choose_backend().name == "xla"
    assert choose_backend("xla", gpu("9.0")).reason == "asked for"


def test_only_the_kernels_executables_become_graphs_however_short() -> None:
    kernels = choose_backend("auto", gpu("9.0"))
    assert kernels.compiler_options == {"xla_gpu_graph_min_graph_size": 1}
    apart = dataclasses.replace(kernels, graphs=False)
    assert apart.compiler_options["xla_gpu_graph_min_graph_size"] > 10**9
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=apart.compiler_options)
    assert not choose_backend("xla", gpu("9.0")).compiler_options


def test_mosaic_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(BackendError, match="cannot run here: cpu is no GPU; use 'xla' or 'auto'"):
        choose_backend("mosaic")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, xla, mosaic"):
        choose_backend("cuda")


def test_weights_are_padded_once_but_the_last_layers() -> None:
    params = choose_backend("auto", gpu("9.0")).prepare(params_of(CONFIG), CONFIG)
    assert [layer.kernel.shape for layer in params.bottom] == [(64, 64), (64, 64)]
    assert [layer.kernel.shape for layer in params.top] == [(64, 128), (70, 1)]
    assert [len(layer.bias) for layer in (*params.bottom, *params.top)] == [20, 8, 70, 1]
    assert params.top[0].kernel.dtype == jnp.bfloat16


def test_float32_layers_are_left_as_they_are() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="float32")
    params = choose_backend("auto", gpu("9.0")).prepare(params_of(config), config)
    assert params.bottom[0].kernel.shape == (13, 20)


@pytest.mark.parametrize(("dtype", "inputs"), [("float32", 13), ("bfloat16", 2500)])
def test_what_the_kernel_does_not_take_runs_on_xla(dtype: str, inputs: int) -> None:
    """float32, and few tiles with deep K, the kernel padded or not."""
    dense = choose_backend("auto", gpu("9.0")).ops.dense
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, inputs)).astype(dtype)
    kernel = jax.random.normal(keys[1], (inputs, 7)).astype(dtype)
    bias = jax.random.normal(keys[2], (7,))
    expected = reference.dense(x, kernel, bias, activation="relu")
    for weights in (kernel, jnp.pad(kernel, ((0, -inputs % 64), (0, 57)))):
        out = dense(x, weights, bias, activation="relu", precision=None)
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize(("name", "constant"), [("mosaic", True), ("xla", False)])
def test_small_weights_are_constants_of_the_kernels_executables(name: str, constant: bool) -> None:
    backend = choose_backend("auto" if name == "mosaic" else "xla", gpu("9.0"))
    weights = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    function, arguments = backend.bind(lambda w, x: x @ w["kernel"], weights)
    assert arguments == (() if constant else (weights,))
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(jax.jit(function)(*arguments, x), [[3, 5, 7]])


def test_large_weights_stay_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recflow_jax.backend.MOST_CONSTANT_BYTES", 20)
    backend = choose_backend("auto", gpu("9.0"))
    weights = jnp.zeros(6)
    assert backend.bind(lambda w: w, weights)[1] == (weights,)


def launches(config: DLRMConfig, params: Params) -> int:
    """Different kernels of a whole forward pass, lowered for CUDA."""
    backend, layout = choose_backend("auto", gpu("9.0")), Layout.of(config)
    batch = generate(config, 300, seed=0)
    inputs = to_device(layout, batch, ids=len(batch.values))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (backend.prepare(params, config), inputs),
    )
    run = partial(forward, config=config, layout=layout, ops=backend.ops)
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("mosaic_gpu_v2(")


KAGGLE = DLRMConfig.shipped("dlrm-kaggle").with_max_rows(100)
V2 = DLRMConfig.shipped("dlrm-v2").with_max_rows(100)


@pytest.mark.parametrize("chained", [False, True])
def test_whole_models_become_kernels(chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, bags and dot, two layers, of which one is like one before; or two chains."""
    widths = [((64, 512, 256, 64), 0), ((448, 512, 256), 1)]
    chains = {Chain(m=300, widths=own, scores=scores): True for own, scores in widths}
    table = TileTable(device="", choices={}, chains=chains if chained else {})
    monkeypatch.setattr("recflow_jax.backend._tiles", lambda: table)
    assert launches(KAGGLE, params_of(KAGGLE)) == (3 if chained else 5)


def test_longer_bags_are_pooled_before_their_dots() -> None:
    longer = dataclasses.replace(KAGGLE.features[0], bag=BagConfig(mean=3))
    config = dataclasses.replace(KAGGLE, features=(longer, *KAGGLE.features[1:]))
    assert launches(config, params_of(config)) == 1 + launches(KAGGLE, params_of(KAGGLE))


def test_whole_float8_models_become_kernels() -> None:
    """Three layers, gather, three cross layers of two kernels each, four layers; XLA has the first
    narrowing, as 300 samples are few for its depth.
    """
    config = calibrate(V2, params_of(V2), generate(V2, 8, seed=0))
    assert launches(config, params_of(V2)) == 3 + 1 + 5 + 4


def test_float8_layers_get_the_tiles_of_half_as_many_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[DenseShape] = []

    def choose(shape: DenseShape) -> None:
        asked.append(shape)

    monkeypatch.setattr("recflow_jax.backend._tiles", lambda: SimpleNamespace(choose=choose))
    monkeypatch.setattr("pallas_kernels.mlp.dense", reference_dense)
    dense = choose_backend("auto", gpu("9.0")).ops.dense
    kernel = quantise_kernel(jnp.ones((256, 64)), 0.1)
    x = jnp.ones((5, 256), jnp.bfloat16)
    dense(x, kernel, jnp.zeros(64), activation="relu", precision=None)
    assert asked == [DenseShape(m=5, k=128, n=64)]


def reference_dense(*operands: Any, config: None, **options: Any) -> Any:
    return reference.dense(*operands, **options)
