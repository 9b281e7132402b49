"""Tensors of a request become its samples, or an error that says which of them is wrong."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.config import DLRMConfig, FeatureConfig
from recflow_jax.serving.inputs import ModelInputs
from request_tensors import BOTH_SIDES, Tensors, packed, request
from small_models import CONCAT, DCN, DOT, NO_DENSE, NO_SPARSE, TABLES

ONE_HOT = DLRMConfig(
    name="one_hot",
    tables=TABLES,
    features=(
        FeatureConfig(name="user", table="users", side="user"),
        FeatureConfig(name="item", table="items"),
    ),
    dense_width=2,
)
ITEMS = np.array([5, 6, 7], np.int32)
DENSE = np.arange(6, dtype=np.float32).reshape(3, 2)


def inputs_of(config: DLRMConfig) -> ModelInputs:
    return ModelInputs(config, max_samples=100, max_ids=200, max_ids_in_all=1000)


def assert_same_batch(found: JaggedBatch, expected: JaggedBatch) -> None:
    np.testing.assert_array_equal(found.dense, expected.dense)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert found.offsets.dtype == np.int64
    if expected.weights is None:
        assert found.weights is None
    else:
        np.testing.assert_array_equal(found.weights, expected.weights)


@given(
    config=st.sampled_from([CONCAT, DOT, DCN, NO_DENSE, BOTH_SIDES]),
    samples=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_packed_ids_become_the_samples(config: DLRMConfig, samples: int, seed: int) -> None:
    batch = request(config, samples, seed=seed)
    assert_same_batch(inputs_of(config).batch(packed(config, batch)), batch)


@given(samples=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_user_that_comes_once_is_every_samples(samples: int, seed: int) -> None:
    batch = request(BOTH_SIDES, samples, seed=seed, one_user=True)
    tensors = packed(BOTH_SIDES, batch, one_user=True)
    assert tensors["user_lengths"].shape == (2, 1)
    assert_same_batch(inputs_of(BOTH_SIDES).batch(tensors), batch)


def test_samples_without_sparse_features() -> None:
    batch = inputs_of(NO_SPARSE).batch({"dense": np.zeros((3, 6), np.float32)})
    assert (batch.samples, batch.offsets.tolist()) == (3, [0])


def test_weights_are_one_unless_given() -> None:
    batch = request(CONCAT, 4, seed=1)
    tensors = packed(CONCAT, batch)
    del tensors["weights"]
    expected = dataclasses.replace(batch, weights=np.ones(len(batch.values), np.float32))
    assert_same_batch(inputs_of(CONCAT).batch(tensors), expected)


@pytest.mark.parametrize("user", [np.array([9]), np.array([[9]]), np.array([9, 9, 9])])
@pytest.mark.parametrize("item", [ITEMS, ITEMS[:, None]])
def test_plain_ids_become_the_samples(user: np.ndarray, item: np.ndarray) -> None:
    found = inputs_of(ONE_HOT).batch({"user": user, "item": item, "dense": DENSE})
    sparse = {"user": np.array([9, 9, 9]), "item": ITEMS}
    assert_same_batch(found, JaggedBatch.from_features(ONE_HOT, DENSE, sparse))


def test_plain_bags_of_several_ids() -> None:
    items = np.array([[1, 2], [3, 4], [5, 6]], np.int64)
    found = inputs_of(ONE_HOT).batch({"user": np.array([9]), "item": items, "dense": DENSE})
    assert [found.bag(s, 1).tolist() for s in range(3)] == items.tolist()


def test_plain_samples_are_counted_by_items_where_nothing_is_dense() -> None:
    config = dataclasses.replace(ONE_HOT, dense_width=0)
    found = inputs_of(config).batch({"user": np.array([9]), "item": ITEMS})
    assert found.values.tolist() == [9, 5, 9, 6, 9, 7]


def test_specs_name_what_a_request_may_have() -> None:
    specs = {s.name: (s.datatype, s.shape, s.optional) for s in inputs_of(ONE_HOT).specs}
    assert specs == {
        "dense": ("FP32", (-1, 2), False),
        "values": ("INT64", (-1,), False),
        "lengths": ("INT32", (2, -1), False),
        "user_values": ("INT64", (-1,), True),
        "user_lengths": ("INT32", (1, 1), True),
        "user": ("INT64", (-1,), True),
        "item": ("INT64", (-1,), True),
    }


def test_jagged_models_are_not_said_to_be_plain() -> None:
    names = [spec.name for spec in inputs_of(CONCAT).specs]
    assert names == ["dense", "values", "lengths", "weights"]


def test_a_feature_named_as_an_input_leaves_the_packed_form() -> None:
    features = (dataclasses.replace(ONE_HOT.features[0], name="lengths"), ONE_HOT.features[1])
    config = dataclasses.replace(ONE_HOT, features=features)
    batch = request(config, 3, seed=1)
    assert_same_batch(inputs_of(config).batch(packed(config, batch)), batch)
    assert "item" not in {spec.name for spec in inputs_of(config).specs}


def changed(**tensors: np.ndarray | None) -> Tensors:
    """Three good packed samples of CONCAT, but for these tensors; None leaves one out."""
    all_of_them = packed(CONCAT, request(CONCAT, 3, seed=2)) | tensors
    return {name: array for name, array in all_of_them.items() if array is not None}


def lengths_with(value: int) -> np.ndarray:
    lengths = np.array(changed()["lengths"])
    lengths[1, 2] = value
    return lengths


GOOD = changed()
LOST_WEIGHTS = np.where(np.arange(len(GOOD["values"])) == 1, 2, GOOD["weights"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(dense=None), "input 'dense' is missing"),
        (changed(values=None), "input 'values' is missing"),
        (changed(lengths=None), "input 'lengths' is missing"),
        (changed(history=ITEMS), "ids come packed or one tensor per feature"),
        (changed(nonsense=ITEMS), "input 'nonsense' is not one of the model's"),
        (
            changed(dense=np.zeros((3, 4), np.float32)),
            r"'dense' has shape \[3, 4\], not \[any, 5\]",
        ),
        (changed(dense=np.zeros((2, 5), np.float32)), "'lengths': 3 columns for 2 samples"),
        (changed(dense=np.zeros((3, 5), np.int32)), "'dense': int32 is not FP32"),
        (changed(values=GOOD["values"][None]), r"'values' has shape \[1, \d+\], not \[any\]"),
        (changed(values=GOOD["values"][1:]), r"'values': (\d+) ids, the lengths add up to \d+"),
        (changed(lengths=GOOD["lengths"][1:]), r"'lengths' has shape \[4, 3\], not \[5, any\]"),
        (changed(lengths=lengths_with(-1)), "feature 'history', sample 2: length -1 is below 0"),
        (changed(lengths=lengths_with(2**31 - 1)), "the lengths add up to"),
        (changed(weights=GOOD["weights"][1:]), r"'weights' has shape"),
        (changed(weights=LOST_WEIGHTS), "feature 'user', sample 1: weight 2.0, the feature takes"),
    ],
)
def test_what_is_wrong_is_named(tensors: Tensors, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs_of(CONCAT).batch(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"user": ITEMS[:1], "dense": DENSE}, "'item' is missing"),
        ({"user": ITEMS[:2], "item": ITEMS, "dense": DENSE}, "'user': 2 bags for 3 samples"),
        ({"user": ITEMS, "item": ITEMS[:1], "dense": DENSE}, "'item': 1 bags for 3 samples"),
        ({"user": ITEMS, "item": ITEMS * 0.5, "dense": DENSE}, "float64 is not INT32 or INT64"),
    ],
)
def test_what_is_wrong_with_plain_ids_is_named(tensors: Tensors, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs_of(ONE_HOT).batch(tensors)


def test_lengths_that_wrap_around_are_no_lengths() -> None:
    lengths = np.array([[2**62, 2**62], [2**62, 2**62 + 2]], np.int64)
    with pytest.raises(InputError, match="add up to"):
        inputs_of(ONE_HOT).batch({"values": ITEMS[:2], "lengths": lengths, "dense": DENSE[:2]})


def test_a_users_long_bag_is_not_copied_for_many_samples() -> None:
    tensors = {
        "dense": DENSE,
        "values": ITEMS,
        "lengths": np.ones((1, 3), np.int32),
        "user_values": np.zeros(1000, np.int64),
        "user_lengths": np.array([[1000]], np.int32),
    }
    with pytest.raises(InputError, match="sample 0 has 1001 ids in all, more than 200"):
        inputs_of(ONE_HOT).batch(tensors)


def test_a_users_bag_is_counted_for_every_sample() -> None:
    tensors = {
        "dense": np.zeros((10, 2), np.float32),
        "values": np.zeros(10, np.int64),
        "lengths": np.ones((1, 10), np.int32),
        "user_values": np.zeros(99, np.int64),
        "user_lengths": np.array([[99]], np.int32),
    }
    assert len(inputs_of(ONE_HOT).batch(tensors).values) == 1000
    tensors |= {"user_values": np.zeros(100, np.int64), "user_lengths": np.array([[100]])}
    with pytest.raises(InputError, match="1010 ids, .* a request may have 1000"):
        inputs_of(ONE_HOT).batch(tensors)


def test_too_many_samples_are_refused_before_they_are_laid_out() -> None:
    tensors = {"dense": np.zeros((101, 2), np.float32), "values": ITEMS, "lengths": ITEMS}
    with pytest.raises(InputError, match="101 samples, a request may have 100"):
        inputs_of(ONE_HOT).batch(tensors)
