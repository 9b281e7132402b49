"""The plain JAX and torch baselines compute what the model says, however they are written."""

import dataclasses
import importlib.util
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

import small_models as models
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig
from recflow_jax.data.workloads import generate
from recflow_jax.measure.baselines import (
    PlainModel,
    padded,
    per_table,
    stacked_variants,
    with_segments,
)
from recflow_jax.model import Params
from recflow_jax.params import init_params

SAMPLES = 7


def with_fixed_bags(config: DLRMConfig) -> DLRMConfig:
    """The same model with bags of 1, 2, 3, 1, ... ids; laid out ones are full."""
    features = [
        dataclasses.replace(f, bag=BagConfig(mean=f.hotness if f.pooling == "none" else 1 + i % 3))
        for i, f in enumerate(config.features)
    ]
    return dataclasses.replace(config, name=f"fixed_{config.name}", features=tuple(features))


def interleaved(config: DLRMConfig) -> DLRMConfig:
    """The same model with features of different dims in turn, so that groups are no runs."""
    return dataclasses.replace(config, features=config.features[::2] + config.features[1::2])


MIXED_DOT = dataclasses.replace(
    models.DOT,
    name="mixed_dot",
    tables=(models.TABLES[0], dataclasses.replace(models.TABLES[1], dtype="float16")),
    features=(*models.ALIKE[1:], models.ALIKE[0]),
)
"""Dots of vectors from two groups, gathered in another order than the config's."""

FIXED = with_fixed_bags(models.CONCAT)
STACKED = (
    *models.FLOAT32_MODELS,
    interleaved(models.CONCAT),
    interleaved(models.DCN),
    MIXED_DOT,
    models.BF16,
    models.FP16,
    models.INT8,
    models.FP8,
    with_fixed_bags(models.INT8),
    FIXED,
    with_fixed_bags(models.DOT),
    interleaved(FIXED),
)
CASES = [
    pytest.param(plain, id=f"{index}-{plain.config.name}-{plain.pooler}")
    for index, plain in enumerate(
        [
            *(plain for config in STACKED for plain in stacked_variants(config)),
            *(per_table(config) for config in (models.CONCAT, models.DCN, FIXED, models.INT8)),
        ]
    )
]


def scores_of(plain: PlainModel, params: Params, batch: Any) -> np.ndarray:
    return np.asarray(jax.jit(plain.forward)(plain.prepare(params), batch))


@cache
def reference_of(config: DLRMConfig) -> tuple[Params, JaggedBatch, np.ndarray]:
    """Parameters, samples and the samples' scores."""
    params, batch = init_params(config, seed=1), generate(config, SAMPLES, seed=2)
    return params, batch, models.reference_scores(config, params, batch)


@pytest.mark.parametrize("plain", CASES)
def test_baseline_is_the_model(plain: PlainModel) -> None:
    params, batch, expected = reference_of(plain.config)
    scores = scores_of(plain, params, plain.pack(batch))
    models.assert_same_scores(plain.config, scores, expected)


@pytest.mark.parametrize("config", [models.CONCAT, FIXED], ids=["jagged", "fixed"])
def test_padding_changes_no_score(config: DLRMConfig) -> None:
    params, batch, expected = reference_of(config)
    plain = stacked_variants(config)[0]
    packed = plain.pack(batch)
    room = [len(piece.rows) + 5 for piece in packed.pieces]
    larger = padded(packed, samples=SAMPLES + 3, ids=room)
    shape = jax.tree.map(np.shape, plain.zeros(samples=SAMPLES + 3, ids=room))
    assert jax.tree.map(np.shape, larger) == shape
    models.assert_same_scores(config, scores_of(plain, params, larger)[:SAMPLES], expected)


def test_ready_segments_change_no_score() -> None:
    (plain,) = stacked_variants(models.CONCAT)
    params, batch, expected = reference_of(models.CONCAT)
    ready = jax.jit(with_segments)(plain.pack(batch))
    assert all(ids.segments is not None for ids in ready.pieces)
    models.assert_same_scores(models.CONCAT, scores_of(plain, params, ready), expected)


def test_variants_follow_the_bags() -> None:
    assert [v.pooler for v in stacked_variants(models.DCN)] == ["segment_sum"]
    fixed = stacked_variants(with_fixed_bags(models.DCN))
    assert [v.pooler for v in fixed] == ["one_gather", "gather_per_hotness"]


def test_a_bag_of_another_length_is_named() -> None:
    config = with_fixed_bags(models.NO_DENSE)
    plain = stacked_variants(config)[0]
    short = dataclasses.replace(
        config, features=(*config.features[:2], FeatureConfig(name="item", table="items"))
    )
    batch = generate(short, SAMPLES, seed=2)
    with pytest.raises(ValueError, match="sample 0, slot 2: 1 ids, not 3"):
        plain.pack(batch)


def test_columns_of_neighbouring_groups_stay_where_they_are() -> None:
    """Shipped models have them: no permutation, not even of kernels."""
    config = DLRMConfig.shipped("w3")
    assert stacked_variants(config)[0].columns is None
    assert stacked_variants(interleaved(models.CONCAT))[0].columns is not None


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("config", [*models.FLOAT32_MODELS, models.BF16], ids=lambda c: c.name)
def test_torch_is_the_model(config: DLRMConfig) -> None:
    from recflow_jax.measure.torch_baseline import TorchModel

    params, batch, expected = reference_of(config)
    torch_model = TorchModel(config, params)
    scores = torch_model(torch_model.load(batch)).numpy()
    models.assert_same_scores(config, scores, expected)


def test_empty_bags_give_zeros() -> None:
    config = models.NO_DENSE
    (plain,) = stacked_variants(config)
    batch = JaggedBatch(
        dense=np.zeros((2, 0), np.float32),
        values=np.zeros(0, np.int32),
        offsets=np.zeros(2 * len(config.features) + 1, np.int64),
    )
    tables = plain.prepare(models.params_of(config)).groups
    pooled = jax.jit(plain.pool)(tables, plain.pack(batch))
    np.testing.assert_array_equal(np.asarray(pooled), 0)
