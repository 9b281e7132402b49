"""The sizes that an engine is compiled for."""

from dataclasses import replace

import numpy as np
import pytest

from recflow_jax.config import BagConfig, DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.options import EngineOptions
from scheduling.request import SliceBucket
from scheduling.serial_batching import Collecting
from small_models import CONCAT, DOT, NO_SPARSE


def test_ladders_reach_from_smallest_to_largest():
    options = EngineOptions(max_batch=100, smallest_batch=10, batch_factor=4, max_slice=50)
    assert options.batch_buckets == (10, 40, 100)
    assert [b.samples for b in options.slice_buckets(DOT)] == [8, 16, 32, 50]


def test_large_sizes_have_half_steps():
    options = EngineOptions()
    powers = [8 << n for n in range(11)]
    assert options.batch_buckets == tuple(sorted([*powers, 1536, 3072, 6144]))
    assert [b.samples for b in options.slice_buckets(DOT)] == [*options.batch_buckets]
    assert EngineOptions(half_steps_from=None).batch_buckets == tuple(powers)
    fine = EngineOptions(max_batch=2048, smallest_batch=512, batch_factor=1.5, half_steps_from=1)
    assert fine.batch_buckets == (512, 768, 1152, 1728, 2048)
    wide = EngineOptions(max_batch=64, smallest_batch=4, batch_factor=4, half_steps_from=16)
    assert wide.batch_buckets == (4, 16, 40, 64)


def test_slices_are_cut_to_the_largest_batch():
    options = EngineOptions(max_batch=4)
    assert options.batch_buckets == (4,)
    assert [b.samples for b in options.slice_buckets(DOT)] == [4]


def test_fixed_bags_need_no_headroom():
    options = EngineOptions(max_slice=1024)
    one_hot = DLRMConfig.shipped("dlrm-v2")
    assert options.slice_buckets(one_hot)[-1] == SliceBucket(samples=1024, ids=1024 * 214)


def test_ids_are_as_many_as_told():
    options = EngineOptions(max_slice=8, smallest_slice=2, slice_factor=4, ids_per_sample=100)
    assert options.slice_buckets(DOT) == (
        SliceBucket(samples=2, ids=256),
        SliceBucket(samples=8, ids=896),
    )


def test_largest_slice_holds_the_largest_sample():
    options = EngineOptions(max_slice=8, smallest_slice=4, max_ids_per_sample=1001)
    assert [b.ids for b in options.slice_buckets(DOT)] == [128, 1024]


def test_no_sparse_features_still_make_buckets():
    assert [b.ids for b in EngineOptions(max_slice=16).slice_buckets(NO_SPARSE)] == [128, 128]


@pytest.mark.parametrize("name", ["recflex-a", "w3", "rm1"])
def test_jagged_bags_of_shipped_models_fit(name: str):
    config = DLRMConfig.shipped(name).with_max_rows(100)
    bucket = EngineOptions().slice_buckets(config)[2]
    drawn = generate(config, bucket.samples, seed=0)
    assert 0.5 * bucket.ids < len(drawn.values) <= bucket.ids


def test_truncated_bags_are_expected_as_long_as_they_are():
    bag = BagConfig(kind="normal", mean=2, sd=20, max=50)
    long = replace(CONCAT, features=(replace(CONCAT.features[1], bag=bag),))
    ids = EngineOptions(max_batch=2048).slice_buckets(long)[-1].ids
    drawn = len(generate(long, 2048, seed=0).values)
    np.testing.assert_allclose(ids / drawn, 1.25, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"segments": -1}, "segments is -1"),
        ({"max_queued_samples": True}, "max_queued_samples is True"),
        ({"batch_factor": 1}, "batch_factor is 1"),
        ({"ids_per_sample": -1}, "ids_per_sample is -1"),
        ({"max_ids_per_sample": 0}, "max_ids_per_sample is 0"),
        (
            {"batching": Collecting(wait_ms=1, max_samples=9), "max_batch": 8},
            "collects 9 samples, more than max_batch, 8",
        ),
        ({"batching": Collecting(wait_ms=1), "p99_ms": 5.0}, "p99_ms is for incremental"),
    ],
)
def test_bad_options_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**changes)
