"""Rows written into tables of every dtype: as loading them would have done, and in place."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from recflow_jax.backend import choose_backend
from recflow_jax.config import DLRMConfig, FeatureConfig, TableConfig, TableDType
from recflow_jax.engine.compilation import compile_jobs
from recflow_jax.engine.live_tables import LiveTables
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.updates import new_rows
from recflow_jax.params import init_params, load_params, save_params
from small_models import CONCAT, NO_DENSE, SMALL

WITH_UPDATES = dataclasses.replace(
    SMALL, max_update_rows=16, max_batch=4, smallest_batch=4, segments=1
)
ONE_BAG = (FeatureConfig(name="f", table="t"),)


def segments(config: DLRMConfig, params=None) -> Segments:
    made = Segments(
        config, params or init_params(config, seed=1), choose_backend("xla"), WITH_UPDATES
    )
    made.compile_all(progress=False)
    return made


def write(into: Segments, table: str, ids, values) -> None:
    sizes = into.options.update_sizes
    landed = into.write_rows(new_rows(into.config, into.layout, table, ids, values, sizes=sizes))
    landed.block_until_ready()


def leaves(groups) -> list[np.ndarray]:
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(groups)]


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_rows_are_what_loading_makes_of_them(dtype: TableDType, tmp_path: Path):
    """The last rows of one table, and all of another, in a group of their own."""
    floats, found = CONCAT, segments(CONCAT.with_dtypes(tables=dtype), None)
    save_params(tmp_path / "new", floats, init_params(floats, seed=2))
    _, new = load_params(tmp_path / "new", config=found.config)
    _, rows = load_params(tmp_path / "new")
    items, words = np.asarray(rows.groups[0])[50:], np.asarray(rows.groups[1])
    before = leaves(found.tables.groups[0])
    write(found, "items", [30, 0, 7], items[[30, 0, 7]])
    write(found, "words", np.arange(10), words[:10])
    write(found, "words", np.arange(10, 20), words[10:])
    written = np.isin(np.arange(81), [80, 50, 57])
    for was, now, loaded in zip(
        before, leaves(found.tables.groups[0]), leaves(new.groups[0]), strict=True
    ):
        shape = (len(written), -1)
        was, now, loaded = was.reshape(shape), now.reshape(shape), loaded.reshape(shape)
        assert np.array_equal(now[~written], was[~written])
        assert np.array_equal(now[written], loaded[written])
    for now, loaded in zip(leaves(found.tables.groups[1]), leaves(new.groups[1]), strict=True):
        assert np.array_equal(now, loaded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_are_rounded_to_the_tables_dtype(dtype: TableDType):
    found = segments(CONCAT.with_dtypes(tables=dtype))
    values = np.random.default_rng(0).standard_normal((3, 4))
    write(found, "words", [0, 19, 4], values)
    words = np.asarray(found.tables.groups[1])
    assert np.array_equal(words[[0, 19, 4]], values.astype(np.float32).astype(words.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_nothing_of_a_tables_size_is_copied(dtype: TableDType):
    """XLA's CPU back end copies float8, which it computes in float16."""
    tables = (TableConfig(name="t", rows=100_000, dim=8, dtype=dtype),)
    groups = init_params(dataclasses.replace(NO_DENSE, tables=tables, features=ONE_BAG)).groups
    live = LiveTables(groups, sizes=(16,))
    (run,) = compile_jobs(live.jobs()).values()
    memory = run.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(groups))
    assert memory.temp_size_in_bytes < 4096


def test_nothing_is_compiled_for_tables_that_do_not_change():
    made = Segments(CONCAT, init_params(CONCAT), choose_backend("xla"), SMALL)
    assert made.tables.jobs() == []


def test_warming_up_writes_nothing():
    made = segments(CONCAT)
    before = leaves(made.tables.groups)
    made.tables.warm_up(made._executables)
    assert all(map(np.array_equal, leaves(made.tables.groups), before))
