"""Models of a few thousand parameters with every kind of part, and their reference scores."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
from jax import lax

from recflow_jax.backend import choose_backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch, Params, forward
from recflow_jax.params import init_params

JAGGED = BagConfig(kind="normal", mean=3, sd=3, max=9, coverage=0.7)
TABLES = (
    TableConfig(name="users", rows=50, dim=8),
    TableConfig(name="items", rows=31, dim=8),
    TableConfig(name="words", rows=20, dim=4),
)
ONE = FeatureConfig(name="user", table="users")
HISTORY = FeatureConfig(name="history", table="items", bag=JAGGED)
MEAN = FeatureConfig(name="mean", table="words", pooling="mean", bag=JAGGED)
WEIGHTED = FeatureConfig(name="weighted", table="items", weighted=True, bag=JAGGED)
LAID_OUT = FeatureConfig(
    name="laid_out",
    table="words",
    pooling="none",
    hotness=3,
    bag=BagConfig(kind="normal", mean=2, sd=1, max=3),
)
ALIKE = (ONE, HISTORY, FeatureConfig(name="item", table="items"))

CONCAT = DLRMConfig(
    name="concat",
    tables=TABLES,
    features=(ONE, HISTORY, MEAN, WEIGHTED, LAID_OUT),
    dense_width=5,
    bottom_mlp=(16, 8),
    top_mlp=(24, 16, 2),
)
DOT = DLRMConfig(
    name="dot",
    tables=TABLES,
    features=ALIKE,
    dense_width=5,
    bottom_mlp=(8,),
    interaction="dot",
    top_mlp=(16, 1),
    activation="sigmoid",
)
DCN = DLRMConfig(
    name="dcn",
    tables=TABLES,
    features=(MEAN, *ALIKE),
    dense_width=5,
    interaction="dcn",
    cross_layers=2,
    cross_rank=4,
    top_mlp=(32, 16, 8, 1),
    activation="gelu",
)
NO_DENSE = DLRMConfig(name="no_dense", tables=TABLES, features=ALIKE, top_mlp=(8, 1))
NO_SPARSE = DLRMConfig(name="no_sparse", tables=(), features=(), dense_width=6, top_mlp=(8, 3))
FIXED = DLRMConfig(
    name="fixed",
    tables=TABLES,
    features=(
        ONE,
        FeatureConfig(name="items", table="items", bag=BagConfig(mean=4)),
        FeatureConfig(name="mean", table="words", pooling="mean", bag=BagConfig(mean=2)),
        FeatureConfig(
            name="laid_out", table="words", pooling="none", hotness=3, bag=BagConfig(mean=2)
        ),
    ),
    dense_width=5,
    bottom_mlp=(8,),
    top_mlp=(16, 1),
)
BF16 = DCN.with_dtypes(tables="bfloat16", compute="bfloat16")
FP16 = DOT.with_dtypes(tables="float16", compute="float16")

INT8 = dataclasses.replace(CONCAT.with_dtypes(tables="int8"), name="int8")
FP8 = dataclasses.replace(
    DCN.with_dtypes(tables="float8_e4m3fn", compute="bfloat16"), name="float8"
)

DEEP_DOT = dataclasses.replace(
    DOT, name="deep_dot", bottom_mlp=(12, 8), top_mlp=(32, 16, 1), activation="relu"
)
DEEP_DCN = dataclasses.replace(DCN, name="deep_dcn", bottom_mlp=(12, 8))

FLOAT32_MODELS = (CONCAT, DOT, DCN, NO_DENSE, NO_SPARSE)

SMALL = EngineOptions(
    max_batch=16,
    smallest_batch=4,
    batch_factor=4,
    max_slice=8,
    smallest_slice=2,
    slice_factor=4,
    max_queued_samples=1000,
    compilation_cache=None,
    freeze_heap=False,
)


@cache
def params_of(config: DLRMConfig) -> Params:
    return init_params(config, seed=1)


@cache
def compiled(config: DLRMConfig, options: EngineOptions = SMALL) -> Segments:
    """Segments that tests may share: they hold no state of a run."""
    segments = Segments(config, params_of(config), choose_backend("xla"), options)
    segments.compile_all(progress=False)
    return segments


def device_batch(config: DLRMConfig, batch: JaggedBatch) -> DeviceBatch:
    layout = Layout.of(config)
    return DeviceBatch(
        dense=batch.dense,
        rows=layout.rows(batch),
        offsets=layout.slot_offsets(batch),
        weights=batch.weights,
    )


def reference_scores(config: DLRMConfig, params: Params, batch: JaggedBatch) -> np.ndarray:
    """What model.forward gives, in the precision that the engine promises."""
    exact = lax.Precision.HIGHEST if config.compute_dtype == "float32" else None
    run = partial(forward, config=config, layout=Layout.of(config), precision=exact)
    return np.asarray(jax.jit(run)(params, device_batch(config, batch)))


# By rounding alone: sums in another order. float32 as the engine promises; the 16-bit ones a few
# units in the last place of the largest score.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}


def assert_same_scores(config: DLRMConfig, found: np.ndarray, expected: np.ndarray) -> None:
    """Within rounding of the model's dtype, relative to the score or the mean size of scores."""
    tolerance = TOLERANCE[config.compute_dtype]
    size = np.abs(expected).mean()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * size)
