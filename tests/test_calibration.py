"""Calibrated float8 layers: scales from inputs that were seen, in the config that a model keeps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import recflow_jax as rf
from pallas_kernels.float8 import LARGEST, input_scale_of
from recflow_jax.backend import choose_backend
from recflow_jax.calibration import calibrate, ready
from recflow_jax.config import ConfigError, DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.segments import Segments
from recflow_jax.model import with_compute_dtype
from recflow_jax.module import DLRM
from small_models import (
    CONCAT,
    DCN,
    DEEP_DCN,
    DEEP_DOT,
    NO_SPARSE,
    SMALL,
    params_of,
    reference_scores,
)

MODELS = (CONCAT, DEEP_DOT, DCN, DEEP_DCN)
BATCH = {config.name: generate(config, 300, seed=3) for config in (*MODELS, NO_SPARSE)}
DOT = DEEP_DOT


@pytest.fixture(params=MODELS, ids=lambda config: config.name)
def config(request: pytest.FixtureRequest) -> DLRMConfig:
    return request.param


@pytest.mark.parametrize(
    ("config", "scales"), [(CONCAT, 2), (DEEP_DOT, 2), (DCN, 6), (DEEP_DCN, 7), (NO_SPARSE, 0)]
)
def test_a_matmul_has_a_scale_if_another_makes_its_input(config: DLRMConfig, scales: int) -> None:
    """All but the last one, the first one, and the first one behind the pooled rows."""
    calibrated = calibrate(config, params_of(config), BATCH[config.name])
    assert len(calibrated.input_scales) == calibrated.float8_matmuls == scales
    assert (calibrated.compute_dtype, calibrated.carried_dtype) == ("float8_e4m3fn", "bfloat16")


def test_a_scale_is_the_largest_input_over_the_largest_float8() -> None:
    calibrated = calibrate(CONCAT, params_of(CONCAT), BATCH["concat"])
    first, hidden = params_of(CONCAT).bottom[0], BATCH["concat"].dense
    hidden = np.maximum(hidden @ np.asarray(first.kernel) + np.asarray(first.bias), 0)
    assert calibrated.input_scales[0] == pytest.approx(hidden.max() / LARGEST, rel=1e-5)


def test_kernels_take_the_scales_in_the_order_in_which_they_run() -> None:
    calibrated = calibrate(DEEP_DCN, params_of(DEEP_DCN), BATCH["deep_dcn"])
    params = with_compute_dtype(params_of(DEEP_DCN), calibrated)
    kernels = [layer.kernel for layer in params.bottom]
    kernels += [kernel for layer in params.cross for kernel in (layer.down, layer.up)]
    kernels += [layer.kernel for layer in params.top]
    found = [input_scale_of(kernel) for kernel in kernels]
    assert tuple(found) == calibrated.matmul_scales
    wide = [place for place, scale in enumerate(found) if scale is None]
    assert wide == [0, 2, len(found) - 1]
    assert {str(kernels[place].dtype) for place in wide} == {"bfloat16"}
    again = with_compute_dtype(params, calibrated)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_float8_scores_are_near_those_in_float32(config: DLRMConfig) -> None:
    params, samples = params_of(config), generate(config, 50, seed=0)
    calibrated = calibrate(config, params, BATCH[config.name])
    exact = reference_scores(config, params, samples)
    found = reference_scores(calibrated, params, samples)
    error = np.sqrt(np.mean((found - exact) ** 2)) / exact.std()
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("config", [DEEP_DOT, DEEP_DCN], ids=lambda config: config.name)
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_an_engine_serves_float8_layers(config: DLRMConfig, segments: int) -> None:
    """Each segment rounds for the first layer of the next."""
    params, samples = params_of(config), generate(config, 20, seed=0)
    calibrated = calibrate(config, params, BATCH[config.name])
    options = dataclasses.replace(SMALL, segments=segments)
    with rf.Engine(calibrated, params, options=options) as engine:
        found = engine.predict(samples)
    expected = reference_scores(calibrated, params, samples)
    np.testing.assert_allclose(found, expected, atol=2**-6 * np.abs(expected).mean(), rtol=2**-6)


def test_segments_hand_on_what_they_have_rounded() -> None:
    params = params_of(DEEP_DCN)
    calibrated = calibrate(DEEP_DCN, params, BATCH["deep_dcn"])
    options = dataclasses.replace(SMALL, segments=4)
    segments = Segments(calibrated, params, choose_backend("xla"), options)
    first, *later = segments.stages.segment_jobs(4, 16)
    handed_on = [str(job.arguments[-1].dtype) for job in later]
    assert handed_on == ["float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"]
    assert {str(leaf.dtype) for leaf in first.arguments[-2:]} == {"bfloat16"}


def test_a_calibrated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    calibrated = calibrate(DOT, params_of(DOT), BATCH["deep_dot"])
    rf.save_params(tmp_path / "m.safetensors", calibrated, params_of(DOT))
    config, params = rf.load_params(tmp_path / "m.safetensors")
    assert config == calibrated
    assert params.top[0].kernel.dtype == "float32"


def test_layers_that_were_not_calibrated_are_refused() -> None:
    config = DOT.with_dtypes(compute="float8_e4m3fn")
    with pytest.raises(ValueError, match="'deep_dot': its float8 layers have no input scales"):
        rf.Engine(config, params_of(DOT), options=SMALL)
    with pytest.raises(ValueError, match="cannot be trained"):
        DLRM(config, params_of(DOT))


def test_random_input_calibrates_what_is_not() -> None:
    config = DOT.with_dtypes(compute="float8_e4m3fn")
    calibrated = ready(config, params_of(DOT), ids="uniform", seed=0)
    assert len(calibrated.input_scales) == 2
    assert ready(calibrated, params_of(DOT), ids="uniform", seed=0) is calibrated
    assert ready(DOT, params_of(DOT), ids="uniform", seed=0) is DOT


def test_no_samples_are_refused() -> None:
    empty = BATCH["deep_dot"].part(0, 0)
    with pytest.raises(ValueError, match="calibrate: no samples"):
        calibrate(DOT, params_of(DOT), empty)


@pytest.mark.parametrize("scales", [(0.1,), (0.1, 0.0), (0.1, float("nan"))])
def test_impossible_scales_are_refused(scales: tuple[float, ...]) -> None:
    config = DOT.with_dtypes(compute="float8_e4m3fn")
    with pytest.raises(ConfigError, match="input scale"):
        config.with_input_scales(scales)


def test_another_dtype_has_no_scales() -> None:
    calibrated = calibrate(DOT, params_of(DOT), BATCH["deep_dot"])
    assert calibrated.with_dtypes(compute="float32") == DOT
    with pytest.raises(ConfigError, match="2 input scales for 0 float8 matmuls"):
        dataclasses.replace(calibrated, compute_dtype="bfloat16")
