"""Parameters drawn, saved and loaded: nothing lost, nothing twice in memory, errors by name."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pallas_kernels.tables import quantise_rows
from recflow_jax import params as params_module
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.layout import Layout
from recflow_jax.model import Params
from recflow_jax.params import FORMAT, ParamsError, init_params, load_params, save_params

# Groups of one and of several tables, tables smaller and larger than a chunk, all dtypes.
MIXED = DLRMConfig(
    name="mixed",
    tables=(
        TableConfig(name="a", rows=7, dim=4),
        TableConfig(name="b", rows=300, dim=8, dtype="bfloat16"),
        TableConfig(name="c, d", rows=50, dim=4),
        TableConfig(name="e", rows=1, dim=8, dtype="bfloat16"),
        TableConfig(name="f", rows=33, dim=8, dtype="float16"),
        TableConfig(name="g", rows=20, dim=8, dtype="bfloat16"),
    ),
    features=tuple(
        FeatureConfig(name=name, table=name) for name in ("a", "b", "c, d", "e", "f", "g")
    ),
    dense_width=3,
    bottom_mlp=(6, 4),
    interaction="dcn",
    cross_layers=2,
    cross_rank=3,
    top_mlp=(5, 2),
    compute_dtype="bfloat16",
)


# The same with groups of both quantised dtypes beside one that is not.
QUANTISED = dataclasses.replace(
    MIXED,
    tables=tuple(
        dataclasses.replace(t, dtype={"float32": "int8", "bfloat16": "float8_e4m3fn"}[t.dtype])
        if t.dtype != "float16"
        else t
        for t in MIXED.tables
    ),
)


@pytest.fixture(params=[16 * 2**20, 100, 1], ids=lambda size: f"chunks of {size} B")
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(params_module, "CHUNK_BYTES", request.param)
    return request.param


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_params(tmp_path / "mixed.safetensors", MIXED, init_params(MIXED))
    return tmp_path / "mixed.safetensors"


def assert_same(left: Params, right: Params) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
                 left, right)  # fmt: skip
    assert [leaf.dtype for leaf in jax.tree.leaves(left)] == [
        leaf.dtype for leaf in jax.tree.leaves(right)
    ]


@pytest.mark.parametrize("model", [MIXED, QUANTISED], ids=["floats", "quantised"])
def test_saved_and_loaded(tmp_path: Path, chunk_bytes: int, model: DLRMConfig):
    params = init_params(model, seed=3)
    save_params(tmp_path / "m.safetensors", model, params)
    config, loaded = load_params(tmp_path / "m.safetensors")
    assert config == model
    assert_same(loaded, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_the_file_is_one_that_the_safetensors_library_reads(saved: Path, chunk_bytes: int):
    tensors = load_file(saved)
    params = load_params(saved)[1]
    for table, (group, base) in zip(MIXED.tables, Layout.of(MIXED).table_places, strict=True):
        rows = np.asarray(params.groups[group])[base : base + table.rows]
        np.testing.assert_array_equal(tensors.pop(f"tables.{table.name}"), rows)
    np.testing.assert_array_equal(tensors["cross.1.up"], params.cross[1].up)
    np.testing.assert_array_equal(tensors["top.0.bias"], params.top[0].bias)
    assert sorted(tensors) == [
        "bottom.0.bias", "bottom.0.kernel", "bottom.1.bias", "bottom.1.kernel",
        "cross.0.bias", "cross.0.down", "cross.0.up",
        "cross.1.bias", "cross.1.down", "cross.1.up",
        "top.0.bias", "top.0.kernel", "top.1.bias", "top.1.kernel",
    ]  # fmt: skip


def test_the_safetensors_library_reads_quantised_tables_and_their_scales(
    tmp_path: Path, chunk_bytes: int
):
    params = init_params(QUANTISED)
    save_params(tmp_path / "m.safetensors", QUANTISED, params)
    tensors = load_file(tmp_path / "m.safetensors")
    for table, (group, base) in zip(QUANTISED.tables, Layout.of(MIXED).table_places, strict=True):
        if table.dtype == "float16":
            assert f"scales.{table.name}" not in tensors
            continue
        found = tensors[f"tables.{table.name}"], tensors[f"scales.{table.name}"]
        assert found[0].dtype == {"int8": np.int8, "float8_e4m3fn": np.uint8}[table.dtype]
        own = jax.tree.map(lambda a, b=base, t=table: np.asarray(a)[b : b + t.rows],
                           params.groups[group])  # fmt: skip
        np.testing.assert_array_equal(found[0], own.values.view(found[0].dtype))
        np.testing.assert_array_equal(found[1], own.scales)


def test_float_tables_are_quantised_when_they_are_loaded(saved: Path, chunk_bytes: int):
    floats = load_params(saved)[1]
    config, params = load_params(saved, config=QUANTISED)
    assert config == QUANTISED
    expected = [
        quantise_rows(floats.groups[0], "int8"),
        quantise_rows(floats.groups[1], "float8_e4m3fn"),
        floats.groups[2],
    ]
    assert_same(params, dataclasses.replace(floats, groups=tuple(expected)))


def test_float_tables_of_several_dtypes_become_one_quantised_group(saved: Path, chunk_bytes: int):
    floats = load_params(saved)[1]
    config = MIXED.with_dtypes(tables="int8")
    group = load_params(saved, config=config)[1].groups[1]  # b, e, f and g, of which f is float16
    rows = [*floats.groups[1][:301], *floats.groups[2], *floats.groups[1][301:]]
    expected = quantise_rows(jnp.stack([row.astype(jnp.float32) for row in rows]), "int8")
    jax.tree.map(np.testing.assert_array_equal, group, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_quantised_tables_become_nothing_else(tmp_path: Path, dtype: Any):
    path = tmp_path / "m.safetensors"
    save_params(path, QUANTISED, init_params(QUANTISED))
    with pytest.raises(ParamsError, match="was saved for another model .*: tables: TableConfig"):
        load_params(path, config=MIXED.with_dtypes(tables=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales__a": None}, "tensor 'scales.a' is missing"),
        ({"scales__a": np.zeros(8, "f4")}, "tensor 'scales.a' is F32[8], not F32[7]"),
        ({"tables__a": np.zeros((7, 4), "u1")}, "'tables.a' is U8[7, 4], not I8[7, 4]"),
        ({"tables__b": np.zeros((300, 8), "i1")}, "'tables.b' is I8[300, 8], not U8[300, 8]"),
    ],
)
def test_quantised_tensors_that_are_not_the_model_s(
    tmp_path: Path, change: dict[str, Any], message: str
):
    save_params(tmp_path / "good", QUANTISED, init_params(QUANTISED))
    metadata = {"format": FORMAT, "config": QUANTISED.to_toml()}
    rewrite(tmp_path / "good", tmp_path / "bad", metadata, **change)
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "bad")
    assert message in str(error.value)


def test_quantised_init_is_that_of_floats_rounded():
    floats, quantised = init_params(MIXED).groups[0], init_params(QUANTISED).groups[0]
    jax.tree.map(np.testing.assert_array_equal, quantised, quantise_rows(floats, "int8"))


def test_quantised_init_draws_every_row_of_its_own(chunk_bytes: int):
    quantised = init_params(QUANTISED).groups[0]
    table = np.asarray(quantised.values, np.float64) * np.asarray(quantised.scales)[:, None]
    assert len(np.unique(table, axis=0)) == len(table)
    assert 0.9 < np.abs(table).max() * 2 <= 1 + 1e-6


def test_a_file_that_the_safetensors_library_wrote(saved: Path, tmp_path: Path):
    rewrite(saved, tmp_path / "other.safetensors")
    assert_same(load_params(tmp_path / "other.safetensors")[1], load_params(saved)[1])


def test_init_is_repeatable_and_follows_the_seed():
    assert_same(init_params(MIXED, seed=1), init_params(MIXED, seed=1))
    one, other = init_params(MIXED, seed=1), init_params(MIXED, seed=2)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (np.asarray(a) != np.asarray(b)).all(axis=-1).any()


def test_init_draws_every_row_of_its_own_within_the_bound(chunk_bytes: int):
    for group in init_params(MIXED).groups:
        table = np.asarray(group, np.float64) * group.shape[1] ** 0.5
        assert len(np.unique(table, axis=0)) == len(table)
        assert 0.9 < np.abs(table).max() <= 1
        assert abs(table.mean()) < 0.1
        np.testing.assert_allclose(table.std(), 3**-0.5, rtol=0.1)
    narrow = init_params(MIXED, table_bound=0.01)
    assert 0.009 < np.abs(np.asarray(narrow.groups[0])).max() <= 0.01


def test_init_of_layers():
    wide = dataclasses.replace(MIXED, dense_width=200, bottom_mlp=(300,))
    layer = init_params(wide).bottom[0]
    np.testing.assert_allclose(np.std(layer.kernel), (2 / 500) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(layer.bias), 300**-0.5, rtol=0.2)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(params_module, "_write_rows", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_params(saved, MIXED, init_params(MIXED, seed=9))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_in_use_is_replaced_not_overwritten(saved: Path):
    with open(saved, "rb") as reader:
        before = reader.read()
        save_params(saved, MIXED, init_params(MIXED, seed=9))
        reader.seek(0)
        assert reader.read() == before
    assert saved.read_bytes() != before


def test_saving_another_model_s_parameters(tmp_path: Path):
    with pytest.raises(ParamsError, match="have not the shapes and dtypes of 'mixed'"):
        save_params(tmp_path / "m", MIXED, init_params(MIXED.with_dtypes(tables="float32")))
    assert list(tmp_path.iterdir()) == []


def rewrite(source: Path, target: Path, metadata: Any = None, **changes: Any) -> None:
    """The same tensors with some changed or, if None, left out. Dots are double underscores."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {n: t for n, t in {**load_file(source), **changes}.items() if t is not None}
    default = {"format": FORMAT, "config": MIXED.to_toml()}
    save_file(tensors, target, metadata=default if metadata is None else metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables__e": None}, "tensor 'tables.e' is missing"),
        ({"cross__1__bias": None}, "tensor 'cross.1.bias' is missing"),
        ({"extra": np.zeros(3)}, "tensor 'extra' is not in the model"),
        ({"tables__a": np.zeros((7, 8), "f4")}, "'tables.a' is F32[7, 8], not F32[7, 4]"),
        ({"tables__a": np.zeros((8, 4), "f4")}, "'tables.a' is F32[8, 4], not F32[7, 4]"),
        ({"tables__b": np.zeros((300, 8), "f2")}, "'tables.b' is F16[300, 8], not BF16[300, 8]"),
        ({"top__1__bias": np.zeros(2)}, "tensor 'top.1.bias' is F64[2], not F32[2]"),
        ({"metadata": {}}, "format is None, not 'recflow-jax/1'"),
        ({"metadata": {"format": "pt"}}, "format is 'pt', not 'recflow-jax/1'"),
        ({"metadata": {"format": FORMAT}}, "config: "),
        ({"metadata": {"format": FORMAT, "config": "name = 3 +"}}, "config: not TOML"),
    ],
)
def test_files_that_are_not_the_model_s(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    bad = tmp_path / "bad.safetensors"
    rewrite(saved, bad, **changes)
    with pytest.raises(ParamsError) as error:
        load_params(bad)
    assert str(error.value).startswith(f"{bad}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(saved: Path, keep: int):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ParamsError, match=r"mixed.safetensors: is no whole safetensors file"):
        load_params(saved)


def test_no_safetensors_file(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("nothing of the kind" * 10)
    with pytest.raises(ParamsError, match=r"notes.txt: is no whole safetensors file"):
        load_params(tmp_path / "notes.txt")
    with pytest.raises(ParamsError, match=r"nowhere: cannot be read"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(ParamsError, match="cannot be read"):
        load_params(tmp_path)


def test_a_config_that_only_looks_at_the_parameters_otherwise(saved: Path):
    features = tuple(
        dataclasses.replace(f, side="user", bag=BagConfig(mean=2)) for f in MIXED.features
    )
    renamed = dataclasses.replace(MIXED, name="new", compute_dtype="float32", features=features)
    config, params = load_params(saved, config=renamed)
    assert config == renamed
    assert_same(params, load_params(saved)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_mlp": (6, 2)}, "top_mlp: 5 in the file, 6 in the model"),
        ({"top_mlp": (5, 4, 2)}, "top_mlp: 2 in the file, 3 in the model"),
        ({"activation": "gelu"}, "activation: relu in the file, gelu in the model"),
        ({"cross_rank": 4}, "cross_rank: 3 in the file, 4 in the model"),
        ({"tables": (TableConfig(name="a", rows=8, dim=4), *MIXED.tables[1:])}, "tables: Table"),
        ({"features": MIXED.features[::-1]}, "features: FeatureConfig(name='a'"),
    ],
)
def test_a_config_of_another_model(saved: Path, changes: dict[str, Any], message: str):
    other = dataclasses.replace(MIXED, name="other", **changes)
    with pytest.raises(ParamsError) as error:
        load_params(saved, config=other)
    assert message in str(error.value)
    assert "mixed.safetensors: was saved for another model than 'other'" in str(error.value)


# What a model of RECFLOW_TEST_MODEL_MB megabytes takes while it is loaded: for 5 GB, run
# RECFLOW_TEST_MODEL_MB=5000 python -m pytest tests/test_params.py -k memory
MODEL_MB = int(os.environ.get("RECFLOW_TEST_MODEL_MB", "400"))
FIXED_MB = 100  # a few chunks, and what compiling the copy takes
LOAD = """
import sys, jax
from recflow_jax.params import load_params
jax.block_until_ready(jax.numpy.zeros(3) + 1)
print("ready", flush=True)
sys.stdin.readline()
config, params = load_params(sys.argv[1])
jax.block_until_ready(params)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.timeout(120 + MODEL_MB // 10)
def test_loading_holds_no_second_copy_in_memory(tmp_path: Path):
    path = tmp_path / "large.safetensors"
    size = write_large_model(path)
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        before = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        peak = peak_until_output(process)
        assert int(process.stdout.readline()) == size
        assert anonymous_bytes(process.pid) - before > 0.9 * size  # it is there, and was seen
        process.stdin.close()
    assert peak - before < 1.3 * size + FIXED_MB * 1e6


def write_large_model(path: Path) -> int:
    """A file of five tables, mostly a hole in the disk; the bytes of its parameters."""
    rows = MODEL_MB * 10**6 // (5 * 256)
    tables = tuple(
        TableConfig(name=f"t{i}", rows=rows, dim=128, dtype="bfloat16") for i in range(5)
    )
    features = tuple(FeatureConfig(name=t.name, table=t.name) for t in tables)
    config = DLRMConfig(name="large", tables=tables, features=features)
    layers = [("top.0.kernel", "F32", [640, 1], 4 * 640), ("top.0.bias", "F32", [1], 4)]
    parts = [*layers, *((f"tables.{t.name}", "BF16", [rows, 128], rows * 256) for t in tables)]
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "config": config.to_toml()}}
    end = 0
    for name, dtype, shape, size in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is its own, not pages of a file."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def peak_until_output(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    peak = 0
    while not select.select([process.stdout], [], [], 0)[0]:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.002)
    return peak
