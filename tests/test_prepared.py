"""Samples made ready on their caller's thread: the same rows as plainly, and the same errors."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow_jax.batch import InputError, JaggedBatch, check_batch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine import fixed_bags, jagged_bags
from recflow_jax.engine.prepared import Prepared, Preparer
from recflow_jax.layout import Layout
from recflow_jax.measure.host import by_name
from small_models import CONCAT, DOT, FIXED, NO_DENSE, NO_SPARSE, device_batch

MODELS = (CONCAT, DOT, FIXED, NO_DENSE, NO_SPARSE)
WEIGHTED = dataclasses.replace(
    FIXED, features=tuple(dataclasses.replace(f, weighted=f.bag.mean == 4) for f in FIXED.features)
)
ID_TYPES = ("int8", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">i8")


def preparer(config: DLRMConfig, max_ids: int = 1000) -> Preparer:
    return Preparer(config, Layout.of(config), max_ids=max_ids)


def assert_is(config: DLRMConfig, found: Prepared, batch: JaggedBatch) -> None:
    """The plainly made rows and offsets; fixed bags need no offsets, and have ids for rows."""
    plain = device_batch(config, batch)
    is_fixed = found.slot_offsets is None
    assert found.samples == batch.samples
    assert (found.rows.dtype, found.id_offsets.dtype) == (np.int32, np.int64)
    np.testing.assert_array_equal(found.dense, plain.dense)
    np.testing.assert_array_equal(found.rows, batch.values if is_fixed else plain.rows)
    np.testing.assert_array_equal(found.id_offsets, batch.id_offsets)
    if not is_fixed:
        np.testing.assert_array_equal(found.slot_offsets, plain.offsets)
    if config.weighted:
        assert found.weights is not None
        np.testing.assert_array_equal(found.weights, plain.weights)


@pytest.fixture(params=[1, 25, jagged_bags.BLOCK_IDS])
def block_ids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Ids, or bags, of a block: less than a sample has, those of two samples and some, all of a
    test. What is compiled has no blocks.
    """
    monkeypatch.setattr(jagged_bags, "one_pass", lambda *_, **__: None)
    monkeypatch.setattr(jagged_bags, "BLOCK_IDS", request.param)
    for name in ("COPIED_IDS", "KEPT_BAGS"):
        monkeypatch.setattr(fixed_bags, name, request.param)
    return request.param


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("samples", [0, 1, 2, 7])
def test_samples_are_those_made_plainly(config: DLRMConfig, samples: int, block_ids: int):
    batch = generate(config, samples, seed=samples)
    assert_is(config, preparer(config).prepare(batch), batch)


@pytest.mark.parametrize("config", [CONCAT, FIXED], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ID_TYPES)
def test_ids_of_every_type(config: DLRMConfig, dtype: str):
    batch = generate(config, 5, seed=1)
    other = dataclasses.replace(batch, values=batch.values.astype(dtype))
    strided = dataclasses.replace(batch, values=np.repeat(other.values, 2)[::2])
    for given_as in (other, strided):
        assert_is(config, preparer(config).prepare(given_as), batch)


@pytest.mark.parametrize("config", [CONCAT, FIXED], ids=lambda c: c.name)
@pytest.mark.parametrize("is_large", [False, True])
def test_ids_of_large_requests_are_not_copied_at_the_cost_of_others(
    config: DLRMConfig, is_large: bool, block_ids: int, monkeypatch: pytest.MonkeyPatch
):
    batch, held = generate(config, 7, seed=1), []
    monkeypatch.setattr(fixed_bags, "LARGE_IDS", len(batch.values) + (not is_large))
    monkeypatch.setattr(fixed_bags, "copy", lambda ids, out: held.append(np.copyto(out, ids)))
    batch = dataclasses.replace(batch, values=batch.values.astype(np.int32))
    strided = dataclasses.replace(batch, values=np.repeat(batch.values, 2)[::2])
    for given_as in (batch, strided):
        assert_is(config, preparer(config).prepare(given_as), batch)
    assert bool(held) != is_large


def test_what_is_fixed():
    assert FIXED.fixed_bags == (1, 4, 2, 2)
    assert NO_SPARSE.fixed_bags == ()
    assert CONCAT.fixed_bags is None
    half = FeatureConfig(name="half", table="users", bag=BagConfig(mean=2, coverage=0.5))
    assert dataclasses.replace(FIXED, features=(half,)).fixed_bags is None
    cut = FeatureConfig(name="cut", table="users", pooling="none", bag=BagConfig(mean=2))
    assert dataclasses.replace(FIXED, features=(cut,)).fixed_bags == (1,)


def test_bags_that_are_as_expected_need_no_offsets(block_ids: int):
    batch = generate(FIXED, 7, seed=0)
    assert preparer(FIXED).prepare(batch).slot_offsets is None
    moved = batch.offsets.copy()
    moved[-4] -= 1
    other = dataclasses.replace(batch, offsets=moved)
    found = preparer(FIXED).prepare(other)
    assert found.slot_offsets is not None
    assert_is(FIXED, found, other)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("samples", [1, 7])
def test_features_by_name_are_the_same_samples(config: DLRMConfig, samples: int):
    batch = generate(config, samples, seed=2)
    found = preparer(config).prepare_features(batch.dense, by_name(config, batch))
    assert_is(config, found, batch)


ONE_HOT = dataclasses.replace(
    FIXED,
    features=tuple(
        FeatureConfig(name=name, table=table)
        for name, table in (("a", "users"), ("b", "items"), ("c", "words"))
    ),
)


def column(samples: int, dtype: str) -> np.ndarray:
    return (np.arange(samples) % 20).astype(dtype)


@pytest.mark.parametrize("samples", [1, 3, fixed_bags.UNSEEN, fixed_bags.UNSEEN + 1])
@pytest.mark.parametrize(
    "sparse",
    [
        lambda n: {name: column(n + place, "int32")[place:] for place, name in enumerate("abc")},
        lambda n: {name: column(n + i, "uint64")[i:][::-1] for i, name in enumerate("cab")},
        lambda n: {"a": column(n, "int8"), "b": column(n, ">i4"), "c": column(n, "uint32")},
        lambda n: {
            "a": column(n, "int32"),
            "b": column(n, "int32").tolist(),
            "c": column(n, "<i4"),
        },
        lambda n: {
            "a": column(n, "int64"),
            "b": (column(n, "int64"), np.arange(n + 1)),
            "c": column(n, "int64"),
        },
        lambda n: {
            "a": [[int(i)] for i in column(n, "int64")],
            "b": column(n, "int64"),
            "c": column(n, "int64"),
        },
    ],
    ids=["alike", "other order", "mixed types", "a list", "with offsets", "lists first"],
)
def test_one_id_of_each_feature_by_name(
    sparse: Callable[[int], dict[str, Any]], samples: int
) -> None:
    dense, named = np.ones((samples, 5)), sparse(samples)
    expected = JaggedBatch.from_features(ONE_HOT, dense, named)
    assert_is(ONE_HOT, preparer(ONE_HOT).prepare_features(dense, named), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([1, 2, 50], np.int32), "50"),
        (np.array([1, -2, 3], np.int32), "-2"),
        (np.array([1, 2], np.int32), "b"),
        (np.ones(3, np.float32), "b"),
        (np.ones(3, bool), "b"),
    ],
    ids=["outside", "negative", "too few", "floats", "truths"],
)
def test_bad_ids_of_one_hot_features_are_named(wrong: np.ndarray, message: str) -> None:
    named = {"a": column(3, "int32"), "b": wrong, "c": column(3, "int32")}
    with pytest.raises(InputError, match=message):
        preparer(ONE_HOT).prepare_features(np.ones((3, 5)), named)


@pytest.fixture
def fixed_features() -> dict[str, Any]:
    """Three samples of FIXED by name, of several integer types."""
    sparse = by_name(FIXED, generate(FIXED, 3, seed=2))
    sparse["mean"] = tuple(array.astype(np.uint32) for array in sparse["mean"])
    return sparse


def test_features_of_fixed_bags_need_no_batch(
    fixed_features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    dense = np.ones((3, 5))
    expected = JaggedBatch.from_features(FIXED, dense, fixed_features)
    monkeypatch.delattr(JaggedBatch, "from_features")
    assert_is(FIXED, preparer(FIXED).prepare_features(dense, fixed_features), expected)


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": [[1, 2], [3, 4], [5, 6]]},
        {"mean": [[1], [], [5, 6, 7]]},
        {"mean": (np.arange(6), np.array([0, 1, 4, 6]))},
        {"mean": (np.arange(3), np.array([0, 1, 2, 3]))},
        {"mean": (np.arange(6, dtype=np.uint64), np.array([0, 2, 4, 6], np.uint8))},
        {"items": (np.arange(12), [0, 4, 8, 12])},
        dict.fromkeys(("user", "items", "mean", "laid_out"), np.arange(3)),
    ],
    ids=["lists", "jagged lists", "jagged", "shorter", "other types", "listed offsets", "one each"],
)
def test_features_of_any_form_are_the_same_samples(
    fixed_features: dict[str, Any], changed: dict[str, Any]
):
    dense, sparse = np.ones((3, 5)), fixed_features | changed
    expected = JaggedBatch.from_features(FIXED, dense, sparse)
    assert_is(FIXED, preparer(FIXED).prepare_features(dense, sparse), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user": np.array([1, 2])}, "feature 'user' has 2 bags for 3 samples"),
        ({"user": np.ones(3)}, r"feature 'user': ids are float64\[3\], not integers"),
        ({"user": np.ones(3, bool)}, r"feature 'user': ids are bool\[3\], not integers"),
        ({"user": np.ones((3, 1), int)}, r"ids are int64\[3, 1\]"),
        ({"user": np.array([0, 10**6, 1])}, "feature 'user', sample 1: id 1000000 is not in"),
        ({"user": np.array([0, 2**63, 1], np.uint64)}, "feature 'user', sample 1: id "),
        ({"user": np.array([0, 1, -1])}, "feature 'user', sample 2: id -1 is not in"),
        ({"mean": (np.arange(6), np.array([0, 2, 4, 5]))}, "offsets end at 5, ids at 6"),
        ({"mean": (np.arange(6), np.array([0, 2, 4]))}, r"feature 'mean': offsets are int64\[3\]"),
        ({"mean": (np.arange(6), np.array([[0, 2, 4, 6]]))}, r"offsets are int64\[1, 4\]"),
        ({"mean": (np.arange(6), np.array([0.0, 2, 4, 6]))}, "offsets are float64"),
        ({"mean": (np.arange(6),)}, "feature 'mean': a tuple of 1"),
        ({"mean": (np.arange(6), np.array([0, 2, 4, 6]), np.ones(6))}, "'mean' takes no weights"),
        ({"mean": np.arange(6)}, "feature 'mean' has 6 bags for 3 samples"),
        ({"other": np.array([1, 2, 3])}, "feature 'other' is not in the model"),
    ],
)
def test_bad_features_by_name_are_named(
    fixed_features: dict[str, Any], changed: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        preparer(FIXED).prepare_features(np.ones((3, 5)), fixed_features | changed)


def test_other_bad_features_by_name_are_named(fixed_features: dict[str, Any]):
    with pytest.raises(InputError, match="dense feature 1, sample 2: nan"):
        dense = np.ones((3, 5))
        dense[2, 1] = np.nan
        preparer(FIXED).prepare_features(dense, fixed_features)
    with pytest.raises(InputError, match=r"shape \[3, 4\], not \[n, 5\]"):
        preparer(FIXED).prepare_features(np.ones((3, 4)), fixed_features)
    del fixed_features["user"]
    with pytest.raises(InputError, match="feature 'user' is missing"):
        preparer(FIXED).prepare_features(np.ones((3, 5)), fixed_features)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@given(cuts=st.lists(st.integers(0, 7), max_size=3))
@settings(max_examples=20)
def test_parts_are_those_of_the_batch(config: DLRMConfig, cuts: list[int]):
    batch = generate(config, 7, seed=4)
    whole = preparer(config).prepare(batch)
    for start, stop in pairwise([0, *sorted(cuts), 7]):
        assert_is(config, whole.part(start, stop), batch.part(start, stop))


@pytest.mark.parametrize("config", [CONCAT, DOT, FIXED], ids=lambda c: c.name)
def test_what_the_caller_does_later_changes_nothing(config: DLRMConfig):
    batch = generate(config, 3, seed=0)
    kept = JaggedBatch.join([batch])
    found = preparer(config).prepare(batch)
    for array in (batch.dense, batch.values, batch.offsets, batch.weights):
        if array is not None:
            array[:] = 0
    assert_is(config, found, kept)


def test_dense_features_may_lie_column_by_column():
    batch = generate(FIXED, 300, seed=3)
    other = dataclasses.replace(batch, dense=np.asfortranarray(batch.dense))
    assert_is(FIXED, preparer(FIXED).prepare(other), batch)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
def test_frozen_samples_are_the_same(config: DLRMConfig, block_ids: int):
    batch = generate(config, 7, seed=3)
    assert_is(config, preparer(config).prepare(batch.frozen()), batch)


@pytest.mark.parametrize("checks_later", [False, True])
def test_frozen_samples_of_fixed_bags_are_not_copied(checks_later: bool):
    frozen = generate(FIXED, 3, seed=0).frozen()
    found = preparer(FIXED).prepare(frozen, checks_later=checks_later)
    assert np.shares_memory(found.rows, frozen.values)
    assert np.shares_memory(found.dense, frozen.dense)
    for array in (frozen.dense, frozen.values, frozen.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[:1] = 0


def test_frozen_samples_that_are_not_in_one_piece_are_copied():
    """Whoever copies their bytes later starts at the first and goes on from there."""
    batch = generate(WEIGHTED, 300, seed=3)
    assert batch.weights is not None
    other = dataclasses.replace(
        batch,
        dense=np.asfortranarray(batch.dense),
        values=np.repeat(batch.values.astype(np.int32), 2)[::2],
        weights=np.repeat(batch.weights, 2)[::2],
    )
    found = preparer(WEIGHTED).prepare(other.frozen())
    assert_is(WEIGHTED, found, batch)
    assert found.slot_offsets is None and found.weights is not None
    assert all(a.flags.c_contiguous for a in (found.dense, found.rows, found.weights))


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
def test_begun_samples_are_the_same(config: DLRMConfig):
    batch, makes = generate(config, 7, seed=3), preparer(config)
    for given_as in (batch, batch.frozen()):
        found = makes.prepare(given_as, checks_later=True)
        assert_is(config, found, batch)
        makes.check(found)
        assert_is(config, found.part(2, 5), batch.part(2, 5))
        assert found.part(2, 5).is_checked == found.is_checked


def test_only_what_is_fixed_is_checked_later():
    batch = generate(FIXED, 3, seed=0)
    batch.values[:] = 0
    frozen, moved = batch.frozen(), batch.offsets.copy()
    moved[-4] -= 1
    wide = dataclasses.replace(frozen, values=frozen.values.astype(np.int64)).frozen()
    makes = preparer(FIXED)
    for same in (batch, frozen, wide):
        assert not makes.prepare(same, checks_later=True).is_checked
        assert makes.prepare(same).is_checked
    jagged = dataclasses.replace(frozen, offsets=moved)
    assert makes.prepare(jagged, checks_later=True).is_checked
    dense_alone = generate(NO_SPARSE, 3, seed=0).frozen()
    assert preparer(NO_SPARSE).prepare(dense_alone, checks_later=True).is_checked
    assert (
        preparer(CONCAT).prepare(generate(CONCAT, 3, seed=0).frozen(), checks_later=True).is_checked
    )


def test_the_largest_floats_are_well():
    batch = generate(FIXED, 4, seed=0)
    dense = np.full_like(batch.dense, np.finfo(np.float32).max)
    found = preparer(FIXED).prepare(dataclasses.replace(batch, dense=dense))
    np.testing.assert_array_equal(found.dense, dense)


def test_infinities_of_either_sign_are_named():
    batch = generate(FIXED, 4, seed=0)
    batch.dense[2, :2] = [np.inf, -np.inf]
    assert_refused_alike(FIXED, batch)


@pytest.mark.parametrize("config", [CONCAT, DOT, FIXED], ids=lambda c: c.name)
@pytest.mark.parametrize("value", [-1, 10**6, 2**31, 2**32, 2**32 + 1, -(2**32), -(2**63)])
@given(data=st.data())
@settings(max_examples=10)
def test_any_bad_id_is_found_and_named_as_by_the_full_check(
    config: DLRMConfig, value: int, data: st.DataObject
):
    """Those among them whose low half is a good id."""
    batch = generate(config, 6, seed=data.draw(st.integers(0, 5)))
    values = batch.values.astype(np.int64)
    values[data.draw(st.integers(0, len(values) - 1))] = value
    assert_refused_alike(config, dataclasses.replace(batch, values=values))


def assert_refused_alike(config: DLRMConfig, batch: JaggedBatch) -> None:
    with pytest.raises(InputError) as expected:
        check_batch(config, batch)
    narrow = batch.values.astype(np.int32)
    if np.array_equal(narrow, batch.values):
        batch = dataclasses.replace(batch, values=narrow)
    makes = preparer(config)
    for prepare in (
        makes.prepare,
        lambda same: makes.check(makes.prepare(same, checks_later=True)),
    ):
        for same in (batch, batch.frozen()):
            with pytest.raises(InputError) as found:
                prepare(same)
            assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("config", [CONCAT, FIXED], ids=lambda c: c.name)
def test_the_first_id_past_each_table_is_refused(config: DLRMConfig, block_ids: int):
    batch, makes = generate(config, 4, seed=1), preparer(config)
    for bag in np.flatnonzero(np.diff(batch.offsets)):
        rows = config.feature_rows[bag % batch.features]
        values = batch.values.copy()
        values[batch.offsets[bag]] = rows - 1
        makes.prepare(dataclasses.replace(batch, values=values))
        values[batch.offsets[bag]] = rows
        assert_refused_alike(config, dataclasses.replace(batch, values=values))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("dense", 7, np.nan),
        ("dense", 3, np.inf),
        ("weights", 5, -np.inf),
        ("offsets", 0, 1),
        ("offsets", 3, -1),
        ("offsets", -1, 1000),
    ],
)
@pytest.mark.parametrize("config", [CONCAT, FIXED], ids=lambda c: c.name)
def test_other_bad_elements_are_named_as_by_the_full_check(
    config: DLRMConfig, name: str, place: int, value: float
):
    batch = generate(config, 4, seed=1)
    if getattr(batch, name) is not None:
        array = getattr(batch, name).copy()
        array.reshape(-1)[place] = value
        assert_refused_alike(config, dataclasses.replace(batch, **{name: array}))


def test_a_bag_longer_than_its_hotness_is_named():
    batch = JaggedBatch(
        dense=np.zeros((1, 5), np.float32),
        values=np.zeros(8, np.int32),
        offsets=np.array([0, 1, 2, 4, 8]),
    )
    assert_refused_alike(FIXED, batch)


@pytest.mark.parametrize("config", [DOT, FIXED], ids=lambda c: c.name)
def test_a_sample_with_too_many_ids_is_named(config: DLRMConfig):
    batch = generate(config, 3, seed=0)
    ids = np.diff(batch.id_offsets)
    makes, most = preparer(config, max_ids=int(ids.max())), int(ids.max())
    makes.prepare(batch)
    message = f"sample {ids.argmax()} has {most} ids in all, more than {most - 1}"
    with pytest.raises(InputError, match=message):
        preparer(config, max_ids=most - 1).prepare(batch)
