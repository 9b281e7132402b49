"""Where tables, rows and bags lie on the device."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.slots import Slot
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import ConfigError, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.layout import Group, Layout

# Two dims, two dtypes, a table that two features share and one that lies behind it.
MIXED = DLRMConfig(
    name="mixed",
    tables=(
        TableConfig(name="a", rows=10, dim=4),
        TableConfig(name="b", rows=20, dim=8, dtype="bfloat16"),
        TableConfig(name="c", rows=30, dim=4),
        TableConfig(name="d", rows=40, dim=4, dtype="float16"),
        TableConfig(name="e", rows=50, dim=4),
    ),
    features=(
        FeatureConfig(name="on_c", table="c", pooling="mean"),
        FeatureConfig(name="on_b", table="b"),
        FeatureConfig(name="on_e", table="e", pooling="none", hotness=3),
        FeatureConfig(name="again_on_c", table="c"),
        FeatureConfig(name="on_d", table="d", pooling="none"),
    ),
    dense_width=1,
)
DENSE = np.zeros((2, 1), np.float32)
BAGS = {
    "on_c": [[29, 0], []],
    "on_b": [[1], [19, 19]],
    "on_e": [[5, 49], [1, 2, 3]],
    "again_on_c": [[], [7]],
    "on_d": [[39], []],
}


def two_samples() -> JaggedBatch:
    return JaggedBatch.from_features(MIXED, DENSE, BAGS)


def test_groups_stack_tables_of_one_dim_and_dtype():
    layout = Layout.of(MIXED)
    assert layout.groups == (
        Group(dim=4, dtype="float32", rows=10 + 30 + 50),
        Group(dim=8, dtype="bfloat16", rows=20),
        Group(dim=4, dtype="float16", rows=40),
    )
    assert layout.table_places == ((0, 0), (1, 0), (0, 10), (2, 0), (0, 40))
    assert layout.feature_bases == (10, 0, 40, 10, 0)
    assert layout.row_bytes == (16, 16, 8)


def test_quantised_rows_are_bytes_and_a_scale():
    layout = Layout.of(MIXED.with_dtypes(tables="int8"))
    assert layout.groups == (
        Group(dim=4, dtype="int8", rows=10 + 30 + 40 + 50),
        Group(dim=8, dtype="int8", rows=20),
    )
    assert [(g.value_bytes, g.scale_bytes) for g in layout.groups] == [(4, 4), (8, 4)]
    assert layout.row_bytes == (8, 12)
    assert [g.scale_bytes for g in Layout.of(MIXED).groups] == [0, 0, 0]


def test_slots():
    layout = Layout.of(MIXED)
    assert layout.slots == (
        Slot(group=0, dim=4, column=0, mean=True),
        Slot(group=1, dim=8, column=4),
        Slot(group=0, dim=4, column=12),
        Slot(group=0, dim=4, column=16),
        Slot(group=0, dim=4, column=20),
        Slot(group=0, dim=4, column=24),
        Slot(group=2, dim=4, column=28),
    )
    assert layout.slot_features == (0, 1, 2, 2, 2, 3, 4)
    assert not layout.one_slot_per_feature


def test_rows_are_ids_behind_their_tables_base():
    rows = Layout.of(MIXED).rows(two_samples())
    assert rows.tolist() == [39, 10, 1, 45, 89, 39, 19, 19, 41, 42, 43, 17]
    assert rows.dtype == np.int32


def test_slot_offsets_give_an_unpooled_bag_one_id_per_slot():
    offsets = Layout.of(MIXED).slot_offsets(two_samples())
    # Sample 0: two ids of on_c, one of on_b, two of on_e's three slots, none of c, one of on_d.
    assert np.diff(offsets).tolist() == [2, 1, 1, 1, 0, 0, 1, 0, 2, 1, 1, 1, 1, 0]
    assert offsets[0] == 0
    assert offsets.dtype == np.int32


def test_slot_offsets_are_the_bags_where_all_are_pooled():
    pooled = tuple(dataclasses.replace(f, pooling="sum", hotness=1) for f in MIXED.features)
    config = dataclasses.replace(MIXED, features=pooled)
    layout = Layout.of(config)
    assert layout.one_slot_per_feature
    np.testing.assert_array_equal(layout.slot_offsets(two_samples()), two_samples().offsets)


def test_one_table_needs_no_base():
    config = dataclasses.replace(
        MIXED, tables=MIXED.tables[:1], features=(FeatureConfig(name="f", table="a"),)
    )
    batch = JaggedBatch.from_features(config, DENSE, {"f": np.array([3, 9])})
    rows = Layout.of(config).rows(batch)
    assert rows.tolist() == [3, 9]
    assert rows.dtype == np.int32


def test_no_samples():
    layout = Layout.of(MIXED)
    empty = two_samples().part(0, 0)
    assert layout.rows(empty).tolist() == []
    assert layout.slot_offsets(empty).tolist() == [0]


@given(st.data())
def test_every_slot_reads_its_features_ids(data: st.DataObject):
    samples = data.draw(st.integers(0, 4))
    longest = [4, 4, 3, 4, 1]
    bags = {
        feature.name: [
            data.draw(st.lists(st.integers(0, 9), max_size=longest[f])) for _ in range(samples)
        ]
        for f, feature in enumerate(MIXED.features)
    }
    batch = JaggedBatch.from_features(MIXED, np.zeros((samples, 1)), bags)
    layout = Layout.of(MIXED)
    rows, offsets = layout.rows(batch), layout.slot_offsets(batch)
    slots = np.split(rows, offsets[1:-1]) if samples else []
    seen = 0
    for s in range(samples):
        for f, feature in enumerate(MIXED.features):
            base = layout.feature_bases[f]
            expected = [base + id for id in bags[feature.name][s]]
            if feature.pooling == "none":
                each = [slot.tolist() for slot in slots[seen : seen + feature.hotness]]
                padding = [[]] * (feature.hotness - len(expected))
                assert each == [[row] for row in expected] + padding
            else:
                assert slots[seen].tolist() == expected
            seen += feature.vectors
    assert seen == len(slots)


def test_a_group_of_too_many_rows():
    tables = tuple(TableConfig(name=name, rows=2**30, dim=4) for name in "ab")
    config = dataclasses.replace(
        MIXED, tables=tables, features=(FeatureConfig(name="f", table="a"),)
    )
    with pytest.raises(ConfigError, match=r"dim 4, float32 have 2147483648 rows together"):
        Layout.of(config)
