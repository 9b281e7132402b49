"""Shipped models against the numbers of their sources, and the generators against chances."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.slots import runs
from recflow_jax.batch import check_batch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig, shipped_models
from recflow_jax.data import workloads
from recflow_jax.data.workloads import (
    EXACT_RANKS,
    MLPERF_REQUEST_SIZES,
    WorkloadError,
    expected_ids,
    expected_ids_per_sample,
    flops_per_sample,
    gather_bytes_per_sample,
    generate,
    length_chances,
    parse_ids,
    request_sizes,
    scatter_ranks,
    zipf_ranks,
)
from recflow_jax.layout import Layout

shipped = DLRMConfig.shipped
BYTES = {"float32": 4, "bfloat16": 2}


def total_rows(config: DLRMConfig) -> int:
    return sum(table.rows for table in config.tables)


def table_gb(config: DLRMConfig) -> float:
    return sum(t.rows * t.dim * BYTES[t.dtype] for t in config.tables) / 1e9


def dtypes(config: DLRMConfig) -> tuple[set[str], str]:
    return {table.dtype for table in config.tables}, config.compute_dtype


def test_every_model_is_shipped():
    assert shipped_models() == (
        "dlrm-kaggle", "dlrm-v2", "recflex-a", "recflex-b", "recflex-d", "rm1", "rm2", "w3",
    )  # fmt: skip


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models(name: str):
    config = shipped(name)
    assert config.name == name
    assert DLRMConfig.from_toml(config.to_toml()) == config
    assert len({f.table for f in config.features}) == len(config.features) == len(config.tables)
    assert {f.pooling for f in config.features} == {"sum"}
    # Features that read one group are neighbours: one stream of ids per group for the gather.
    layout = Layout.of(config)
    assert len(runs(layout.slots)) == len(layout.groups)


@pytest.mark.parametrize("name", shipped_models())
@pytest.mark.parametrize("ids", ["uniform", "zipf(1.05)"])
def test_every_shipped_model_generates_under_a_row_cap(name: str, ids: str):
    config = shipped(name).with_max_rows(1000)
    assert max(t.rows for t in config.tables) <= 1000
    batch = generate(config, 3, seed=0, ids=ids)
    check_batch(config, batch)
    assert batch.samples == 3


def test_dlrm_v2():
    config = shipped("dlrm-v2")
    assert round(total_rows(config) / 1e6, 2) == 204.18
    assert round(table_gb(config)) == 52
    assert expected_ids_per_sample(config) == 214
    assert [f.bag.mean for f in config.features][19:23] == [12, 100, 27, 10]
    assert [t.rows for t in config.tables][19:23] == [40000000] * 3 + [590152]
    assert (config.dense_width, config.interaction_width) == (13, 27 * 128)
    assert round(flops_per_sample(config) / 1e6, 1) == 32.1
    assert gather_bytes_per_sample(config).rows == 54784
    assert dtypes(config) == ({"bfloat16"}, "bfloat16")
    assert round(total_rows(config.with_max_rows(2_000_000)) / 1e6, 1) == 13.1


def test_dlrm_kaggle():
    config = shipped("dlrm-kaggle")
    assert total_rows(config) == 33762577  # Criteo Kaggle
    assert (len(config.tables), {t.dim for t in config.tables}) == (26, {64})
    assert expected_ids_per_sample(config) == 26
    assert (config.bottom_mlp, config.top_mlp) == ((512, 256, 64), (512, 256, 1))
    assert config.interaction_width == 64 + 27 * 26 // 2
    assert dtypes(config) == ({"bfloat16"}, "bfloat16")


@pytest.mark.parametrize(
    ("name", "tables", "rows", "dim", "hot", "dense", "bottom", "top"),
    [
        ("rm1", 8, 4_000_000, 32, 80, 128, (64, 32), (256, 64, 1)),
        ("rm2", 32, 500_000, 64, 120, 256, (128, 64), (128, 64, 1)),
    ],
)
def test_rm(name: str, tables: int, rows: int, dim: int, hot: int, dense: int, bottom, top):
    config = shipped(name)
    assert [(t.rows, t.dim) for t in config.tables] == [(rows, dim)] * tables
    assert expected_ids_per_sample(config) == tables * hot
    assert (config.dense_width, config.bottom_mlp, config.top_mlp) == (dense, bottom, top)
    assert (config.interaction, dtypes(config)) == ("concat", ({"float32"}, "bfloat16"))


@pytest.mark.parametrize(
    ("name", "features", "one_hot", "width", "ids"),
    [
        ("recflex-a", 1000, 500, 24_800, 20_300),
        ("recflex-b", 1200, 1000, 22_000, 4_600),
        ("recflex-d", 1000, 500, 8_000, 17_800),
    ],
)
def test_recflex(name: str, features: int, one_hot: int, width: int, ids: int):
    config = shipped(name)
    assert len(config.features) == features
    rows = [t.rows for t in config.tables]
    assert (rows.count(1024), set(rows) <= {1024, 4096, 16384}) == (one_hot, True)
    assert config.pooled_width == pytest.approx(width, rel=0.01)
    assert expected_ids_per_sample(config) == pytest.approx(ids, rel=0.015)
    assert config.top_mlp == (1024, 256, 128, 1)
    assert (config.dense_width, config.interaction) == (0, "concat")
    assert dtypes(config) == ({"float32"}, "bfloat16")


def test_recflex_lines():
    per_line = {
        name: sorted(len(list(members)) for _, members in lines_of(shipped(name)))
        for name in ("recflex-a", "recflex-b", "recflex-d")
    }
    assert per_line == {
        "recflex-a": [50] * 10 + [500],
        "recflex-b": [100] * 2 + [1000],
        "recflex-d": [50] * 10 + [500],
    }
    assert {t.dim for t in shipped("recflex-d").tables} == {8}
    assert {t.dim for t in shipped("recflex-a").tables} == {4, 8, 16, 32, 64, 128}
    never = BagConfig(kind="normal", mean=100, sd=100, max=1024, coverage=0)
    assert sum(f.bag == never for f in shipped("recflex-d").features) == 50


def lines_of(config: DLRMConfig):
    """Features by bag: each line of a RecFlex data configuration has its own."""
    by_bag = sorted(config.features, key=lambda feature: repr(feature.bag))
    return itertools.groupby(by_bag, key=lambda feature: feature.bag)


def test_w3():
    config = shipped("w3")
    assert config.pooled_width == pytest.approx(23_900, rel=0.01)
    assert table_gb(config) == pytest.approx(5.7, rel=0.01)
    assert expected_ids_per_sample(config) == pytest.approx(5250, rel=0.005)
    assert gather_bytes_per_sample(config).rows == pytest.approx(341e3, rel=0.01)
    assert flops_per_sample(config) == pytest.approx(50.3e6, rel=0.01)
    assert sorted(f.bag.mean for f in config.features) == [1] * 500 + [5] * 450 + [50] * 50
    rows = np.array([t.rows for t in config.tables])
    assert (rows.min() >= 10_000, rows.max() <= 500_000) == (True, True)
    assert np.median(rows) == pytest.approx(math.sqrt(10_000 * 500_000), rel=0.1)
    assert dtypes(config) == ({"bfloat16"}, "bfloat16")
    dims = np.array([t.dim for t in config.tables])
    assert all(150 < (dims == dim).sum() < 250 for dim in (4, 8, 16, 32, 64))


def one_feature(rows: int = 1000, **feature: Any) -> DLRMConfig:
    return DLRMConfig(
        name="one",
        tables=(TableConfig(name="t", rows=rows, dim=4),),
        features=(FeatureConfig(name="f", table="t", **feature),),
        dense_width=3,
    )


def test_generate_is_repeatable_and_follows_the_seed():
    config = one_feature(weighted=True)
    one, same, other = (generate(config, 50, seed=seed) for seed in (1, 1, 2))
    for field in ("dense", "values", "offsets", "weights"):
        np.testing.assert_array_equal(getattr(one, field), getattr(same, field))
    assert (one.values != other.values).any()
    assert (one.dense != other.dense).all()
    assert (one.weights != other.weights).all()


@pytest.mark.parametrize("ids", ["uniform", "zipf(1.2)"])
def test_drawing_ids_in_pieces_keeps_them_with_their_features(
    ids: str, monkeypatch: pytest.MonkeyPatch
):
    """Tables of one to a thousand rows: an id of a wrong feature would be out of range."""
    monkeypatch.setattr(workloads, "_CHUNK_IDS", 37)
    tables = tuple(TableConfig(name=str(n), rows=n, dim=4) for n in (1000, 1, 30, 2, 7))
    bag = BagConfig(kind="gamma_poisson", mean=4, max=50)
    features = tuple(FeatureConfig(name=t.name, table=t.name, bag=bag) for t in tables)
    config = DLRMConfig(name="sizes", tables=tables, features=features)
    batch = generate(config, 100, seed=0, ids=ids)
    check_batch(config, batch)
    for f, table in enumerate(tables):
        seen = np.concatenate([batch.bag(s, f) for s in range(100)])
        assert len(np.unique(seen)) > 0.6 * min(table.rows, 100)


def test_generate_nothing():
    config = one_feature()
    assert generate(config, 0, seed=0).samples == 0
    dense_only = DLRMConfig(name="dense", tables=(), features=(), dense_width=3)
    batch = generate(dense_only, 4, seed=0, ids="zipf(1.05)")
    assert (batch.samples, len(batch.values)) == (4, 0)
    with pytest.raises(WorkloadError, match="samples is -1"):
        generate(config, -1, seed=0)


def test_dense_features_and_weights():
    two = dataclasses.replace(
        one_feature(),
        features=(
            FeatureConfig(name="f", table="t", weighted=True),
            FeatureConfig(name="g", table="t"),
        ),
    )
    batch = generate(two, 5000, seed=0)
    assert batch.dense.mean() == pytest.approx(0, abs=0.05)
    assert batch.dense.std() == pytest.approx(1, abs=0.05)
    assert batch.weights is not None
    assert (batch.weights[1::2] == 1).all()
    weights = batch.weights[::2]
    assert (weights.min() >= 0.5, weights.max() < 1.5, len(np.unique(weights)) > 4000) == (
        True,
    ) * 3


def normal_lengths(mean: float, sd: float, high: float, size: int) -> np.ndarray:
    """By rejection, another way than the one under test."""
    draws = np.random.default_rng(0).normal(mean, sd, 4 * size)
    return np.floor(draws[(draws >= 0) & (draws <= high)])[:size]


def gamma_poisson_lengths(mean: float, high: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.minimum(rng.poisson(rng.gamma(1, mean, size)), high)


@pytest.mark.parametrize(
    ("bag", "reference"),
    [
        (BagConfig(kind="fixed", mean=4), np.full(2, 4.0)),
        (BagConfig(kind="normal", mean=5, sd=5, max=25), normal_lengths(5, 5, 25, 200_000)),
        (BagConfig(kind="normal", mean=2, sd=9, max=3), normal_lengths(2, 9, 3, 100_000)),
        (
            BagConfig(kind="one_sided_normal", mean=5, sd=4),
            normal_lengths(5, 4, math.inf, 200_000),
        ),
        (BagConfig(kind="gamma_poisson", mean=5, max=333), gamma_poisson_lengths(5, 333, 400_000)),
        (BagConfig(kind="gamma_poisson", mean=5, max=7), gamma_poisson_lengths(5, 7, 400_000)),
    ],
)
@pytest.mark.parametrize("coverage", [1, 0.3, 0])
def test_bag_lengths(bag: BagConfig, reference: np.ndarray, coverage: float):
    feature = FeatureConfig(name="f", table="t", bag=dataclasses.replace(bag, coverage=coverage))
    chances = np.array(length_chances(feature))
    assert (chances.sum(), chances.min() >= 0) == (pytest.approx(1), True)
    expected = coverage * np.bincount(reference.astype(int), minlength=len(chances))
    expected = expected / len(reference)
    expected[0] += 1 - coverage
    np.testing.assert_allclose(chances, expected[: len(chances)], atol=0.006)
    config = one_feature(bag=feature.bag)
    drawn = np.diff(generate(config, 20_000, seed=3).offsets)
    assert drawn.max() < len(chances)
    counts = np.bincount(drawn, minlength=len(chances)) / 20_000
    np.testing.assert_allclose(counts, chances, atol=0.02)
    assert drawn.mean() == pytest.approx(expected_ids_per_sample(config), abs=0.15)


def test_bags_without_pooling_end_at_their_hotness():
    config = one_feature(
        pooling="none", hotness=3, bag=BagConfig(kind="gamma_poisson", mean=5, max=50)
    )
    batch = generate(config, 2000, seed=0)
    check_batch(config, batch)
    lengths = np.diff(batch.offsets)
    assert lengths.max() == 3
    assert lengths.mean() == pytest.approx(expected_ids(config)[0], abs=0.1)


def test_uniform_ids_cover_the_table_evenly():
    config = one_feature(rows=10, bag=BagConfig(mean=100))
    counts = np.bincount(generate(config, 1000, seed=0).values, minlength=10)
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_uniform_ids_reach_both_ends_of_a_large_table():
    config = one_feature(rows=2**31 - 1, bag=BagConfig(mean=1000))
    values = generate(config, 200, seed=0).values
    assert (values.min() < 100_000, values.max() > 2**31 - 100_000) == (True, True)
    assert len(np.unique(values % 1024)) == 1024


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.05, 2.5])
@pytest.mark.parametrize("rows", [1, 3, EXACT_RANKS, EXACT_RANKS + 1, 3_000_000])
def test_zipf_ranks_invert_the_sum_of_powers(rows: int, exponent: float):
    """Draws just below and above P(rank < k) must give k - 1 and k."""
    ranks = np.unique(np.minimum([1, 2, 3, 7, 500, 1023, 1024, 5000, 20_000, 10**6], rows - 1))
    powers = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    below = np.concatenate([[0], np.cumsum(powers)]) / powers.sum()
    resolved = powers[ranks] / powers.sum() > 1e-12  # what doubles near 1 can tell apart
    for k in ranks[(ranks > 0) & resolved]:
        margin = 0.4 * powers[k] / powers.sum()
        draws = np.array([below[k] - margin, below[k] + margin])
        zeros = np.zeros(2, int)
        found = zipf_ranks(draws, np.array([rows]), exponent, zeros)
        assert found.tolist() == [k - 1, k]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.05, 3.0])
def test_zipf_ranks_stay_in_their_table(exponent: float):
    rows = np.array([1, 2, EXACT_RANKS, EXACT_RANKS + 1, 40_000_000, 2**31 - 1])
    features = np.repeat(np.arange(len(rows)), 3)
    draws = np.tile([0.0, 0.5, np.nextafter(1, 0)], len(rows))
    found = zipf_ranks(draws, rows, exponent, features).reshape(-1, 3)
    assert (found[:, 0] == 0).all()
    assert (found < rows[:, None]).all()
    if exponent < 2:  # a steeper tail is below what doubles near 1 can tell apart
        np.testing.assert_allclose(found[:, 2], rows - 1, rtol=1e-6)


def test_zipf_frequencies():
    config = one_feature(rows=5000, bag=BagConfig(mean=200))
    values = generate(config, 5000, seed=0, ids="zipf(1.05)").values
    counts = np.sort(np.bincount(values, minlength=5000))[::-1] / len(values)
    powers = np.arange(1, 5001) ** -1.05
    np.testing.assert_allclose(counts[:20], (powers / powers.sum())[:20], rtol=0.05)
    tail = (powers / powers.sum())[1024:].sum()
    assert counts[1024:].sum() == pytest.approx(tail, rel=0.03)


@given(st.integers(1, 3000), st.integers(0, 2000))
def test_scattering_is_one_to_one(rows: int, key: int):
    ranks = np.arange(rows)
    found = scatter_ranks(ranks, np.full(rows, rows), np.full(rows, key))
    np.testing.assert_array_equal(np.sort(found), ranks)


@pytest.mark.parametrize("rows", [2**20, 2**20 + 1, 40_000_000, 2**31 - 1])
def test_scattering_large_tables(rows: int):
    ranks = np.arange(min(rows, 100_000))
    found = scatter_ranks(ranks, np.full(len(ranks), rows), np.ones(len(ranks), int))
    assert (found.min() >= 0, found.max() < rows) == (True, True)
    assert len(np.unique(found)) == len(ranks)
    # Popular ranks are spread: each tenth of the table gets about a tenth of them.
    spread = np.histogram(found, bins=10, range=(0, rows))[0]
    np.testing.assert_allclose(spread, len(ranks) / 10, rtol=0.15)


def test_scattering_is_fixed_and_differs_between_tables():
    ranks, rows = np.arange(1000), np.full(1000, 1000)
    one, other = (scatter_ranks(ranks, rows, np.full(1000, key)) for key in (1, 2))
    assert (one == other).mean() < 0.02
    assert (np.diff(one) == np.diff(one)[0]).mean() < 0.05
    assert one[:4].tolist() == [181, 991, 548, 459]  # the same in every process and version


def test_features_of_one_table_have_the_same_hot_rows():
    config = one_feature(rows=10_000, bag=BagConfig(mean=50))
    config = dataclasses.replace(
        config, features=(*config.features, dataclasses.replace(config.features[0], name="g"))
    )
    batch = generate(config, 500, seed=0, ids="zipf(1.5)")
    hottest = [
        np.bincount(np.concatenate([batch.bag(s, f) for s in range(500)])).argmax() for f in (0, 1)
    ]
    assert hottest[0] == hottest[1]


@pytest.mark.parametrize("text", ["uniform", "zipf(1.05)", "zipf(1)", "zipf(0.5)"])
def test_parse_ids(text: str):
    assert str(parse_ids(text)) == text


@pytest.mark.parametrize("text", ["", "zipf", "zipf()", "zipf(0)", "zipf(-1)", "zipf(a)", "normal"])
def test_parse_ids_errors(text: str):
    with pytest.raises(WorkloadError) as error:
        parse_ids(text)
    assert repr(text) in str(error.value)
    with pytest.raises(WorkloadError):
        generate(one_feature(), 1, seed=0, ids=text)


def test_request_sizes():
    assert len(MLPERF_REQUEST_SIZES) == 20
    assert np.mean(MLPERF_REQUEST_SIZES) == 270
    assert [MLPERF_REQUEST_SIZES.count(n) for n in range(100, 800, 100)] == [2, 12, 2, 1, 1, 1, 1]
    sizes = request_sizes(20_000, seed=0)
    assert set(sizes.tolist()) == set(range(100, 800, 100))
    assert sizes.mean() == pytest.approx(270, rel=0.02)
    np.testing.assert_array_equal(sizes, request_sizes(20_000, seed=0))


def test_flops_of_each_interaction():
    tables = (TableConfig(name="t", rows=9, dim=8),)
    features = tuple(FeatureConfig(name=name, table="t") for name in "abc")
    config = DLRMConfig(
        name="small", tables=tables, features=features, dense_width=5, bottom_mlp=(8,), top_mlp=(2,)
    )
    bottom = 2 * 5 * 8
    assert flops_per_sample(config) == bottom + 2 * 32 * 2
    dcn = dataclasses.replace(config, interaction="dcn", cross_layers=3, cross_rank=4)
    assert flops_per_sample(dcn) == bottom + 3 * 2 * (32 * 4 * 2) + 2 * 32 * 2
    dot = dataclasses.replace(config, interaction="dot")
    assert flops_per_sample(dot) == bottom + 6 * 2 * 8 + 2 * (8 + 6) * 2
    alone = dataclasses.replace(dot, features=())
    assert flops_per_sample(alone) == bottom + 2 * 8 * 2


def test_gather_bytes():
    config = DLRMConfig(
        name="bytes",
        tables=(
            TableConfig(name="t", rows=9, dim=4, dtype="bfloat16"),  # 8 bytes: one sector
            TableConfig(name="u", rows=9, dim=12, dtype="float32"),  # 48 bytes: two
        ),
        features=(
            FeatureConfig(name="f", table="u", bag=BagConfig(mean=10)),
            FeatureConfig(name="g", table="t", bag=BagConfig(mean=6, coverage=0.5)),
        ),
        compute_dtype="bfloat16",
    )
    bytes_moved = gather_bytes_per_sample(config)
    assert dataclasses.astuple(bytes_moved) == (10 * 64 + 3 * 32, 13 * 4, 16 * 2)
    assert bytes_moved.total == 736 + 52 + 32
    weighted = dataclasses.replace(
        config.with_dtypes(compute="float32"),
        features=(dataclasses.replace(config.features[0], weighted=True), config.features[1]),
    )
    assert gather_bytes_per_sample(weighted).ids == 13 * 8
    assert gather_bytes_per_sample(weighted).output == 16 * 4
    quantised = gather_bytes_per_sample(config.with_dtypes(tables="float8_e4m3fn"))
    assert quantised.rows == (10 + 3) * (32 + 32)  # values, and the scale in a sector of its own
