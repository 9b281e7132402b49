"""A model's description: TOML there and back, and errors that name the culprit."""

import dataclasses
import importlib.util
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recflow_jax.config as checked_config


def _as_users_import_it() -> Any:
    """The module without the tests' type checks, which would answer wrong types before it does."""
    spec = importlib.util.spec_from_file_location("plain_config", checked_config.__file__)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


config = _as_users_import_it()
BagConfig, ConfigError, DLRMConfig = config.BagConfig, config.ConfigError, config.DLRMConfig
FeatureConfig, TableConfig = config.FeatureConfig, config.TableConfig

TWO_FEATURES: dict[str, Any] = {
    "name": "two",
    "tables": (TableConfig(name="t", rows=10, dim=8), TableConfig(name="u", rows=5, dim=4)),
    "features": (FeatureConfig(name="f", table="t"), FeatureConfig(name="g", table="u")),
    "dense_width": 3,
    "bottom_mlp": (8,),
}


def two_features(**changes: Any) -> Any:
    return DLRMConfig(**{**TWO_FEATURES, **changes})


names = st.text(min_size=1, max_size=8)


@st.composite
def bags(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["fixed", "normal", "one_sided_normal", "gamma_poisson"]))
    mean = draw(st.integers(0, 99) if kind == "fixed" else st.floats(0, 1e6))
    return BagConfig(
        kind=kind,
        mean=mean,
        sd=draw(st.floats(0.1, 99)),
        max=draw(st.integers(1, 500)),
        coverage=draw(st.floats(0, 1)),
    )


@st.composite
def features(draw: st.DrawFn, name: str, table: str) -> Any:
    pooling = draw(st.sampled_from(["sum", "mean", "none"]))
    return FeatureConfig(
        name=name,
        table=table,
        pooling=pooling,
        weighted=draw(st.booleans()),
        side=draw(st.sampled_from(["user", "item"])),
        hotness=draw(st.integers(1, 5)) if pooling == "none" else 1,
        bag=draw(bags()),
    )


@st.composite
def models(draw: st.DrawFn) -> Any:
    interaction = draw(st.sampled_from(["dot", "dcn", "concat"]))
    dims = st.just(8) if interaction == "dot" else st.integers(1, 64).map(lambda n: 4 * n)
    tables = [
        TableConfig(
            name=name,
            rows=draw(st.integers(1, 2**31 - 1)),
            dim=draw(dims),
            dtype=draw(st.sampled_from(get_args(config.TableDType))),
        )
        for name in draw(st.lists(names, min_size=1, max_size=4, unique=True))
    ]
    feature_names = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    table_names = st.sampled_from([table.name for table in tables])
    widths = st.lists(st.integers(1, 2000), max_size=3)
    dense_width = draw(st.integers(0, 20))
    bottom = [*draw(widths), 8] if dense_width else []
    return DLRMConfig(
        name=draw(names),
        tables=tuple(tables),
        features=tuple(draw(features(name, draw(table_names))) for name in feature_names),
        dense_width=dense_width,
        bottom_mlp=tuple(bottom),
        interaction=interaction,
        cross_layers=draw(st.integers(1, 5)) if interaction == "dcn" else 0,
        cross_rank=draw(st.integers(1, 600)) if interaction == "dcn" else 0,
        top_mlp=(*draw(widths), draw(st.integers(1, 4))),
        activation=draw(st.sampled_from(get_args(config.Activation))),
        compute_dtype=draw(st.sampled_from(get_args(config.DType))),
    )


@given(models())
def test_toml_there_and_back(model: Any):
    again = DLRMConfig.from_toml(model.to_toml())
    assert again == model
    assert hash(again) == hash(model)
    assert again.fingerprint == model.fingerprint


def test_load_reads_what_was_written(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(two_features().to_toml())
    assert DLRMConfig.load(path) == two_features()


def test_widths():
    model = two_features()
    assert (model.bottom_width, model.pooled_width, model.interaction_width) == (8, 12, 20)
    assert two_features(bottom_mlp=()).interaction_width == 3 + 12
    assert model.feature_rows == (10, 5)
    assert two_features(top_mlp=(7, 3)).outputs == 3


def test_widths_without_pooling():
    side_by_side = FeatureConfig(name="f", table="t", pooling="none", hotness=3)
    assert two_features(features=(side_by_side,)).pooled_width == 24
    assert two_features(features=(side_by_side,), interaction="dot").interaction_width == 8 + 6


def test_groups_stand_for_one_table_and_feature_each():
    model = DLRMConfig.from_toml("""
        name = "grouped"
        tables = [
          { name = "a", rows = [10, 20], dim = 4 },
          { name = "b", rows = [7, 8, 9], dim = [4, 8, 12], dtype = "bfloat16" },
          { name = "c", count = 2, rows = 5, dim = 16 },
          { name = "d", rows = 3, dim = 4 },
        ]
        features = [
          { name = "x", table = "b", bag = { mean = 4 } },
          { name = "y", table = "c", pooling = "mean" },
          { name = "z", table = "a_1" },
          { name = "w", table = "d" },
        ]
    """)
    assert [(t.name, t.rows, t.dim) for t in model.tables] == [
        ("a_0", 10, 4), ("a_1", 20, 4), ("b_0", 7, 4), ("b_1", 8, 8), ("b_2", 9, 12),
        ("c_0", 5, 16), ("c_1", 5, 16), ("d", 3, 4),
    ]  # fmt: skip
    assert [(f.name, f.table) for f in model.features] == [
        ("x_0", "b_0"), ("x_1", "b_1"), ("x_2", "b_2"),
        ("y_0", "c_0"), ("y_1", "c_1"), ("z", "a_1"), ("w", "d"),
    ]  # fmt: skip
    assert {t.dtype for t in model.tables[2:5]} == {"bfloat16"}
    assert [f.bag.mean for f in model.features[:4]] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "model: name is ''"),
        ({"dense_width": -1}, "dense_width is -1"),
        ({"dense_width": 1.5}, "dense_width is 1.5"),
        ({"bottom_mlp": (8, 0)}, "bottom_mlp is 0"),
        ({"top_mlp": ()}, "top_mlp is empty"),
        ({"top_mlp": (2.0,)}, "top_mlp is 2.0"),
        ({"interaction": "sum"}, "interaction is 'sum', not one of dot, dcn, concat"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
        ({"interaction": "dot"}, "needs one dim for all vectors, found [4, 8]"),
        ({"interaction": "dcn", "cross_rank": 2}, "cross_layers is 0"),
        ({"interaction": "dcn", "cross_layers": 2}, "cross_rank is 0"),
        ({"cross_layers": 1}, "cross layers belong to interaction 'dcn' alone"),
        ({"dense_width": 0}, "bottom_mlp (8,) without dense features"),
        ({"dense_width": 0, "bottom_mlp": (), "features": ()}, "neither sparse features nor dense"),
        ({"tables": TWO_FEATURES["tables"] * 2}, "2 tables are named 't'"),
        ({"features": TWO_FEATURES["features"] * 3}, "3 features are named 'f'"),
        ({"tables": TWO_FEATURES["tables"][:1]}, "feature 'g': table 'u' is not in the model"),
    ],
)  # fmt: skip
def test_model_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        two_features(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "table: name is 3"),
        ({"rows": 0}, "table 't': rows is 0"),
        ({"rows": True}, "table 't': rows is True"),
        ({"rows": 2**31}, "rows is 2147483648, more than 2^31 - 1"),
        ({"dim": 6}, "dim is 6, not a multiple of 4 up to 256"),
        ({"dim": 260}, "dim is 260"),
        ({"dim": "8"}, "dim is '8'"),
        (
            {"dtype": "int4"},
            "dtype is 'int4', not one of float32, bfloat16, float16, int8, float8_e4m3fn",
        ),
        ({"dtype": "float8_e5m2"}, "dtype is 'float8_e5m2'"),
    ],
)
def test_table_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        TableConfig(**{"name": "t", "rows": 10, "dim": 8, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "feature: name is ''"),
        ({"pooling": "max"}, "feature 'f': pooling is 'max', not one of sum, mean, none"),
        ({"side": "left"}, "feature 'f': side is 'left'"),
        ({"weighted": "yes"}, "feature 'f': weighted is 'yes'"),
        ({"pooling": "none", "hotness": 0}, "feature 'f': hotness is 0"),
        ({"hotness": 2}, "feature 'f': hotness is 2, which only pooling 'none' uses"),
    ],
)
def test_feature_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        FeatureConfig(**{"name": "f", "table": "t", **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "zipf"}, "kind is 'zipf'"),
        ({"mean": -1}, "mean is -1"),
        ({"mean": 1.5}, "mean is 1.5, not whole"),
        ({"mean": float("inf")}, "mean is inf"),
        ({"sd": -0.5}, "sd is -0.5"),
        ({"coverage": 1.1}, "coverage is 1.1, not in [0, 1]"),
        ({"kind": "normal", "sd": 1}, "normal needs max > 0"),
        ({"kind": "normal", "max": 2.5, "sd": 1}, "max is 2.5"),
        ({"kind": "gamma_poisson"}, "gamma_poisson needs max > 0"),
        ({"kind": "normal", "max": 3}, "normal needs sd > 0"),
        ({"kind": "one_sided_normal"}, "one_sided_normal needs sd > 0"),
    ],
)
def test_bag_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        BagConfig(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("name = ", "my.toml: not TOML"),
        ("name = 'a'\nwidth = 3", "my.toml: DLRMConfig has no field width"),
        ("dense_width = 3", "my.toml: DLRMConfig: "),
        ("name = 'a'\ntables = 3", "my.toml: tables is not a list"),
        ("name = 'a'\nfeatures = [3]", "my.toml: features is not a list"),
        ("name = 'a'\ntop_mlp = 3", "my.toml: top_mlp is 3, not a list"),
        ("name = 'a'\ndense_width = '3'", "dense_width is '3'"),
        ("tables = [{ name = 't', rows = 3, dims = 4 }]", "TableConfig has no field dims"),
        ("tables = [{ name = 't', rows = 3, dim = 5 }]", "my.toml: table 't': dim is 5"),
        ("tables = [{ rows = 3, dim = 4 }]", "table: name is ''"),
        ("tables = [{ rows = [3], dim = 4 }]", "table group: name is ''"),
        ("tables = [{ name = 't', rows = [3, 4], dim = [4] }]", "group 't': of [1, 2] tables"),
        ("tables = [{ name = 't', rows = [3], dim = 4, count = 2 }]", "group 't': of [1, 2]"),
        ("tables = [{ name = 't', rows = 3, dim = 4, count = 0 }]", "'t': count is 0"),
        ("features = [{ name = 'f', table = 't', bag = 3 }]", "feature 'f': bag is not a table"),
        (
            "features = [{ name = 'f', table = 't', bag = { men = 3 } }]",
            "my.toml: feature 'f': BagConfig has no field men",
        ),
        (
            "features = [{ name = 'f', table = 't', bag = { mean = -3 } }]",
            "my.toml: feature 'f': bag: mean is -3",
        ),
        ("features = [{ name = 'f', table = 't', bag = { mean = 'x' } }]", "feature 'f'"),
        ("features = [{ name = 'f', tabel = 't' }]", "FeatureConfig has no field tabel"),
        ("name = 'a'\nfeatures = [{ name = 'f', table = 't' }]", "feature 'f': table 't' is not"),
    ],
)
def test_toml_errors(toml: str, message: str):
    with pytest.raises(ConfigError) as error:
        DLRMConfig.from_toml(toml, source="my.toml")
    assert message in str(error.value)
    assert "my.toml" in str(error.value)


def test_load_names_the_file_that_it_cannot_read(tmp_path):
    with pytest.raises(ConfigError, match="nothing.toml: cannot be read"):
        DLRMConfig.load(tmp_path / "nothing.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="latin.toml: cannot be read"):
        DLRMConfig.load(tmp_path / "latin.toml")


def test_an_unknown_shipped_model_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no model 'dlrm' is shipped.*dlrm-v2"):
        DLRMConfig.shipped("dlrm")


def test_row_cap():
    capped = two_features().with_max_rows(7)
    assert [t.rows for t in capped.tables] == [7, 5]
    assert dataclasses.replace(capped, tables=two_features().tables) == two_features()
    with pytest.raises(ConfigError, match="max_rows is 0"):
        two_features().with_max_rows(0)


def test_with_dtypes():
    model = two_features()
    assert model.with_dtypes() == model
    narrow = model.with_dtypes(tables="bfloat16", compute="float16")
    assert {t.dtype for t in narrow.tables} == {"bfloat16"}
    assert narrow.compute_dtype == "float16"


@pytest.mark.parametrize("dtype", config.QUANTISED)
def test_tables_may_be_quantised(dtype: Any):
    model = two_features().with_dtypes(tables=dtype)
    assert {t.dtype for t in model.tables} == {dtype}
    assert DLRMConfig.from_toml(model.to_toml()) == model
    with pytest.raises(ConfigError, match="dtype is 'int4', not one of float32, .*, int8, float8"):
        model.with_dtypes(tables="int4")  # pyright: ignore[reportArgumentType]


def test_layers_may_be_float8_but_not_int8():
    model = two_features().with_dtypes(compute="float8_e4m3fn")
    assert model.carried_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="compute_dtype is 'int8', not one of float32"):
        model.with_dtypes(compute="int8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"tables": (TableConfig(name="t", rows=11, dim=8), TWO_FEATURES["tables"][1])},
        {"tables": (TableConfig(name="t", rows=10, dim=12), TWO_FEATURES["tables"][1])},
        {"features": TWO_FEATURES["features"][::-1]},
        {"features": (FeatureConfig(name="f", table="t", pooling="mean"),)},
        {"dense_width": 4},
        {"bottom_mlp": (9,)},
        {"top_mlp": (2,)},
        {"activation": "gelu"},
        {"interaction": "dcn", "cross_layers": 1, "cross_rank": 2},
        {"compute_dtype": "bfloat16"},
    ],
)
def test_fingerprint_differs(changes: dict[str, Any]):
    assert two_features(**changes).fingerprint != two_features().fingerprint


def test_fingerprint_is_the_same_in_every_process():
    # A literal, because hash seeds and dict order are what would make it differ.
    assert two_features().fingerprint == "1a7a204e7a147309"
