"""A model whose scores say which version of it, and which of all its rows, they were made with.

The score of a sample, a bag of eight ids, is 1000 * the model's version + the mean of what is in
its rows: a whole number, unless some of them are of one update and some of another.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.model import DenseLayer, Params

ROWS, DIM, IDS = 64, 4, 8
CONFIG = DLRMConfig(
    name="versioned",
    tables=(TableConfig(name="t", rows=ROWS, dim=DIM),),
    features=(FeatureConfig(name="f", table="t", bag=BagConfig(mean=IDS)),),
    top_mlp=(1,),
)
OPTIONS = EngineOptions(
    max_batch=16,
    smallest_batch=4,
    batch_factor=4,
    max_slice=4,
    smallest_slice=4,
    segments=1,
    max_queued_samples=10_000,
    max_update_rows=ROWS,
    backend="xla",
    compilation_cache=None,
    freeze_heap=False,
)


def params(version: int = 0) -> Params:
    """All rows are zero."""
    kernel = jnp.full((DIM, 1), 1 / (IDS * DIM))
    layer = DenseLayer(kernel=kernel, bias=jnp.full(1, 1000.0 * version))
    return Params(groups=(jnp.zeros((ROWS, DIM)),), bottom=(), cross=(), top=(layer,))


def engine(version: int = 0) -> Engine:
    return Engine(CONFIG, params(version), options=OPTIONS)


def batch(samples: int, seed: int = 0) -> JaggedBatch:
    """Each of ids from everywhere in the table."""
    ids = np.random.default_rng(seed).integers(0, ROWS, samples * IDS)
    return JaggedBatch(
        dense=np.zeros((samples, 0), np.float32),
        values=ids,
        offsets=np.arange(samples + 1) * IDS,
    )


def all_rows(of: float) -> dict[str, Any]:
    """An update of the whole table."""
    return {"ids": np.arange(ROWS), "values": np.full((ROWS, DIM), of, np.float32)}


def version_in(scores: np.ndarray) -> int:
    """The one version that all of them were made with."""
    found = {*scores.ravel().tolist()}
    assert len(found) == 1, f"samples of several versions: {found}"
    (version,) = found
    assert version == int(version), f"a sample of several versions: {version}"
    return int(version)
