"""Slices packed on the host and unpacked on the device are the same samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.staging import Staging
from recflow_jax.layout import Layout
from scheduling.request import SliceBucket
from small_models import CONCAT, DOT, NO_DENSE, NO_SPARSE, device_batch

BUCKET = SliceBucket(samples=8, ids=256)
MODELS = (CONCAT, DOT, NO_DENSE, NO_SPARSE)


def staging(config: DLRMConfig) -> Staging:
    return Staging(config, Layout.of(config))


def same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 3, 7), (0, 2, 2, 7), (2, 3)])
def test_parts_arrive_as_one_batch(config: DLRMConfig, cuts: tuple[int, ...]):
    whole = generate(config, 7, seed=3)
    parts = [whole.part(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    joined = whole.part(cuts[0], cuts[-1])
    packer = staging(config)
    row, batch = packer.shape(BUCKET).unpack(jnp.asarray(packer.pack(BUCKET, 5, parts)))
    n, ids, expected = joined.samples, len(joined.values), device_batch(config, joined)
    assert row == 5
    same(batch.dense[:n], expected.dense)
    same(batch.rows[:ids], expected.rows)
    same(batch.offsets[: len(expected.offsets)], expected.offsets)
    if config.weighted:
        same(batch.weights[:ids], expected.weights)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
def test_padding_is_empty_even_in_a_used_buffer(config: DLRMConfig):
    packer = staging(config)
    packer.give_back(packer.pack(BUCKET, 0, [generate(config, 8, seed=1)]))
    few = generate(config, 2, seed=2)
    _, batch = packer.shape(BUCKET).unpack(jnp.asarray(packer.pack(BUCKET, 0, [few])))
    slots = len(Layout.of(config).slots)
    assert not np.any(batch.dense[2:])
    assert np.all(batch.offsets[2 * slots :] == len(few.values))


def test_wide_ids_become_int32():
    config, packer = DOT, staging(DOT)
    few = generate(config, 2, seed=2)
    wide = JaggedBatch(dense=few.dense, values=few.values.astype(np.uint64), offsets=few.offsets)
    buffer = packer.pack(BUCKET, 0, [wide])
    assert buffer.dtype == np.int32
    same(buffer, staging(config).pack(BUCKET, 0, [few]))


def test_a_buffer_is_reused_only_after_it_is_given_back():
    packer, few = staging(DOT), generate(DOT, 2, seed=2)
    first = packer.pack(BUCKET, 0, [few])
    second = packer.pack(BUCKET, 0, [few])
    assert first is not second
    packer.give_back(first)
    larger = SliceBucket(samples=8, ids=384)
    assert packer.pack(larger, 0, [few]) is not first
    assert packer.pack(BUCKET, 0, [few]) is first


def test_bits_survive():
    """Denormals and negative zero travel as they are."""
    dense = np.array([[1e-42, -0.0, 3.4e38, 0.1, -1]], np.float32)
    drawn = generate(CONCAT, 1, seed=0)
    sample = JaggedBatch(
        dense=dense, values=drawn.values, offsets=drawn.offsets, weights=drawn.weights
    )
    packer = staging(CONCAT)
    buffer = packer.pack(BUCKET, 0, [sample])
    place = packer.shape(BUCKET).places["dense"]
    assert buffer[place].tobytes()[:20] == dense.tobytes()
