"""Samples as users hand them over, and what is said about bad ones."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow_jax.batch import InputError, JaggedBatch, bag_features, check_batch
from recflow_jax.config import DLRMConfig, FeatureConfig, TableConfig

TABLES = (TableConfig(name="t", rows=10, dim=4), TableConfig(name="u", rows=6, dim=4))
PLAIN = DLRMConfig(
    name="plain",
    tables=TABLES,
    features=(FeatureConfig(name="f", table="t"), FeatureConfig(name="g", table="u")),
    dense_width=2,
)
WEIGHTED = dataclasses.replace(
    PLAIN, features=(PLAIN.features[0], FeatureConfig(name="g", table="u", weighted=True))
)
SIDE_BY_SIDE = dataclasses.replace(
    PLAIN,
    features=(PLAIN.features[0], FeatureConfig(name="g", table="u", pooling="none", hotness=2)),
)
DENSE = np.array([[0.5, 1], [1.5, 2], [2.5, 3]], np.float32)
BAGS = {"f": [[1, 2], [], [9]], "g": [[5], [0, 0, 3], []]}


def three_samples(config: DLRMConfig = PLAIN) -> JaggedBatch:
    return JaggedBatch.from_features(config, DENSE, BAGS)


def bags_of(batch: JaggedBatch) -> list[list[list[int]]]:
    """Every bag as a list, by sample and feature."""
    return [[batch.bag(s, f).tolist() for f in range(batch.features)] for s in range(batch.samples)]


@pytest.mark.parametrize(
    "sparse",
    [
        BAGS,
        {"f": [np.array([1, 2]), (), [9]], "g": [[5], np.array([0, 0, 3], np.int16), ()]},
        {"f": ([1, 2, 9], [0, 2, 2, 3]), "g": (np.array([5, 0, 0, 3]), np.array([0, 1, 4, 4]))},
        {"f": (np.array([1, 2, 9], np.uint8), np.array([0, 2, 2, 3], np.uint64)), "g": BAGS["g"]},
    ],
)
def test_entries_of_bags(sparse: dict[str, Any]):
    batch = JaggedBatch.from_features(PLAIN, DENSE, sparse)
    assert bags_of(batch) == [[[1, 2], [5]], [[], [0, 0, 3]], [[9], []]]
    assert batch.offsets.tolist() == [0, 2, 3, 3, 6, 7, 7]
    assert batch.id_offsets.tolist() == [0, 3, 6, 7]
    assert bag_features(batch).tolist() == [0, 0, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(batch.dense, DENSE)
    check_batch(PLAIN, batch)


@pytest.mark.parametrize("ids", [[3, 1, 4], np.array([3, 1, 4]), np.array([3, 1, 4], np.uint16)])
def test_entries_of_one_id_per_sample(ids: Any):
    batch = JaggedBatch.from_features(PLAIN, DENSE, {"f": ids, "g": ids})
    assert bags_of(batch) == [[[3], [3]], [[1], [1]], [[4], [4]]]
    check_batch(PLAIN, batch)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("int8", "int32"), ("int32", "int32"), ("uint16", "int32"), ("uint32", "int64")],
)
def test_ids_take_four_bytes_where_that_is_enough(dtype: str, stored: str):
    ids = np.array([1, 2, 3], dtype)
    assert JaggedBatch.from_features(PLAIN, DENSE, {"f": ids, "g": ids}).values.dtype == stored


def test_an_id_past_int32_is_not_wrapped_into_range():
    large = np.array([1, 2**31 + 4, 3], np.uint32)
    batch = JaggedBatch.from_features(PLAIN, DENSE, {**BAGS, "f": large})
    with pytest.raises(InputError, match="feature 'f', sample 1: id 2147483652 is not in"):
        check_batch(PLAIN, batch)


def test_weights_go_with_their_ids_and_are_one_elsewhere():
    sparse = {"f": BAGS["f"], "g": ([5, 0, 0, 3], [0, 1, 4, 4], [0.5, 2, 3, 4])}
    batch = JaggedBatch.from_features(WEIGHTED, DENSE, sparse)
    assert batch.values.tolist() == [1, 2, 5, 0, 0, 3, 9]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 0.5, 2, 3, 4, 1]
    check_batch(WEIGHTED, batch)
    without = JaggedBatch.from_features(WEIGHTED, DENSE, BAGS)
    assert without.weights is not None
    assert without.weights.tolist() == [1] * 7


def test_a_model_without_sparse_features():
    config = DLRMConfig(name="dense", tables=(), features=(), dense_width=2)
    batch = JaggedBatch.from_features(config, DENSE, {})
    assert (batch.samples, batch.features) == (3, 0)
    assert batch.id_offsets.tolist() == [0, 0, 0, 0]
    check_batch(config, batch)
    assert batch.part(1, 3).samples == 2


@pytest.mark.parametrize("config", [PLAIN, SIDE_BY_SIDE])
def test_no_samples(config: DLRMConfig):
    batch = JaggedBatch.from_features(config, np.zeros((0, 2)), {"f": [], "g": []})
    assert (batch.samples, len(batch.values), batch.id_offsets.tolist()) == (0, 0, [0])
    check_batch(config, batch)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"f": [1, 2, 3]}, "feature 'g' is missing"),
        ({**BAGS, "h": [1, 2, 3]}, "feature 'h' is not in the model"),
        ({**BAGS, "f": [1, 2]}, "feature 'f' has 2 bags for 3 samples"),
        ({**BAGS, "f": [[1], [2]]}, "feature 'f' has 2 bags for 3 samples"),
        ({**BAGS, "f": [1.0, 2.0, 3.0]}, "feature 'f': ids are float64[3], not integers"),
        ({**BAGS, "f": [[1], [2.5], []]}, "feature 'f', sample 1: ids are float64[1]"),
        ({**BAGS, "f": [[1], 2, []]}, "feature 'f', sample 1: ids are int64[]"),
        ({**BAGS, "f": [1, [2], [3]]}, "feature 'f': ids are no array"),
        ({**BAGS, "f": [[1], ["x"], []]}, "feature 'f', sample 1: ids are <U1[1]"),
        ({**BAGS, "f": [[1], [[2]], []]}, "feature 'f', sample 1: ids are int64[1, 1]"),
        ({**BAGS, "f": [True, False, True]}, "feature 'f': ids are bool[3]"),
        ({**BAGS, "f": None}, "feature 'f': ids are object[]"),
        ({**BAGS, "f": np.ones((3, 2), int)}, "feature 'f': ids are int64[3, 2]"),
        ({**BAGS, "f": ([1],)}, "feature 'f': a tuple of 1 is not (values, offsets)"),
        ({**BAGS, "f": ([1], [0, 1])}, "feature 'f': offsets are int64[2], not integers [4]"),
        ({**BAGS, "f": ([1], [0, 1.0, 1, 1])}, "feature 'f': offsets are float64[4]"),
        ({**BAGS, "f": ([1], [1, 1, 1, 1])}, "feature 'f', sample 0: offsets start at 1"),
        ({**BAGS, "f": ([1], [0, 1, 0, 1])}, "feature 'f', sample 1: offsets fall from 1 to 0"),
        ({**BAGS, "f": ([1], [0, 1, 1, 2])}, "feature 'f': offsets end at 2, ids at 1"),
        ({**BAGS, "f": ([1.5], [0, 1, 1, 1])}, "feature 'f': ids are float64[1]"),
        ({**BAGS, "f": ([1], [0, 1, 1, 1], [1.0])}, "feature 'f' takes no weights"),
        ({**BAGS, "g": ([1], [0, 1, 1, 1], [1.0, 2])}, "feature 'g': [2] weights for 1 ids"),
        ({**BAGS, "g": ([1], [0, 1, 1, 1], ["x"])}, "feature 'g': weights are not numbers"),
    ],
)
def test_entries_that_are_no_bags(sparse: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        JaggedBatch.from_features(WEIGHTED, DENSE, sparse)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (np.zeros((3, 4)), "dense features have shape [3, 4], not [n, 2]"),
        (np.zeros(3), "dense features have shape [3], not [n, 2]"),
        ([["a", "b"]], "dense features are not numbers"),
        (None, "dense features have shape []"),
    ],
)
def test_dense_features_that_are_none(dense: Any, message: str):
    with pytest.raises(InputError) as error:
        JaggedBatch.from_features(PLAIN, dense, BAGS)
    assert message in str(error.value)


def damaged(config: DLRMConfig = PLAIN, **changes: Any) -> JaggedBatch:
    """Three samples with other arrays; a (place, value) pair changes one element."""
    batch = three_samples(config)
    for name, change in changes.items():
        if isinstance(change, tuple):
            array = getattr(batch, name).copy()
            array[change[0]] = change[1]
            changes[name] = array
    return dataclasses.replace(batch, **changes)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (damaged(values=(0, 10)), "feature 'f', sample 0: id 10 is not in [0, 10)"),
        (damaged(values=(6, -1)), "feature 'f', sample 2: id -1 is not in [0, 10)"),
        (damaged(values=(5, 6)), "feature 'g', sample 1: id 6 is not in [0, 6)"),
        (damaged(values=(2, -7)), "feature 'g', sample 0: id -7 is not in [0, 6)"),
        (damaged(dense=((1, 0), np.nan)), "dense feature 0, sample 1: nan is not finite"),
        (damaged(dense=((2, 1), -np.inf)), "dense feature 1, sample 2: -inf is not finite"),
        (damaged(dense=DENSE.astype(float)), "dense features are float64, not float32"),
        (damaged(dense=DENSE[:, :1]), "dense features have shape [3, 1]"),
        (damaged(dense=DENSE[:2]), "offsets are int64[7], not int64 [2 samples * 2 features + 1]"),
        (damaged(offsets=(3, 2)), "feature 'f', sample 1: offsets fall from 3 to 2"),
        (damaged(offsets=(4, -2)), "feature 'g', sample 1: offsets fall from 3 to -2"),
        (damaged(offsets=(0, -1)), "offsets run from -1 to 7, ids from 0 to 7"),
        (damaged(offsets=(6, 8)), "offsets run from 0 to 8, ids from 0 to 7"),
        (damaged(offsets=np.zeros(7, np.int32)), "offsets are int32[7], not int64"),
        (damaged(values=np.zeros(7)), "ids are float64[7], not integers"),
        (damaged(values=np.zeros((7, 1), int)), "ids are int64[7, 1], not integers"),
        (damaged(weights=np.ones(7, np.float32)), "no feature takes weights"),
    ],
)
def test_bad_batches(batch: JaggedBatch, message: str):
    with pytest.raises(InputError) as error:
        check_batch(PLAIN, batch)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "weights are missing"),
        ((3, np.nan), "feature 'g', sample 1: weight nan is not finite"),
        (np.ones(6, np.float32), "weights are float32[6], not float32 [7]"),
        (np.ones(7), "weights are float64[7], not float32 [7]"),
    ],
)
def test_bad_weights(weights: Any, message: str):
    with pytest.raises(InputError) as error:
        check_batch(WEIGHTED, damaged(WEIGHTED, weights=weights))
    assert message in str(error.value)


def test_a_bag_longer_than_its_hotness():
    with pytest.raises(InputError, match="feature 'g', sample 1: a bag of 3 ids, hotness is 2"):
        check_batch(SIDE_BY_SIDE, three_samples())
    shorter = {**BAGS, "g": [[5], [0, 3], []]}
    check_batch(SIDE_BY_SIDE, JaggedBatch.from_features(SIDE_BY_SIDE, DENSE, shorter))


@st.composite
def batches(draw: st.DrawFn, weighted: bool = False) -> JaggedBatch:
    samples = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, 4), min_size=2 * samples, max_size=2 * samples))
    total = sum(lengths)
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    return JaggedBatch(
        dense=rng.standard_normal((samples, 2), np.float32),
        values=rng.integers(0, 6, total).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        weights=rng.random(total, np.float32) if weighted else None,
    )


def assert_same(left: JaggedBatch, right: JaggedBatch) -> None:
    for name in ("dense", "values", "offsets", "weights"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@given(st.data())
def test_join_undoes_part(data: st.DataObject):
    weighted = data.draw(st.booleans())
    batch = data.draw(batches(weighted))
    inner = data.draw(st.lists(st.integers(0, batch.samples), max_size=4))
    cuts = [0, *sorted(inner), batch.samples]
    parts = [batch.part(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert_same(JaggedBatch.join(parts), batch)
    for part in parts:
        check_batch(WEIGHTED if weighted else PLAIN, part)


@given(st.lists(batches(), min_size=1, max_size=4))
def test_part_undoes_join(members: list[JaggedBatch]):
    joined = JaggedBatch.join(members)
    check_batch(PLAIN, joined)
    start = 0
    for member in members:
        assert_same(joined.part(start, start + member.samples), member)
        start += member.samples


def test_join_of_nothing():
    with pytest.raises(ValueError, match="at least one batch"):
        JaggedBatch.join([])
