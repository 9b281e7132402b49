"""Tile tables: what a shape gets, measured or not, and what a file has to be."""

import json
from pathlib import Path

import pytest

from pallas_kernels.mlp import CONFIGS, MlpConfig, choose_config
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.tiles import candidates, layer_shapes, name_of
from recflow_jax.tiles import (
    Chain,
    DenseShape,
    TileTable,
    TileTableError,
    chain_entry_of,
    entry_of,
    path_of,
)

H100 = "NVIDIA H100 80GB HBM3"
SMALL_TILES = MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=6)
MEASURED = DenseShape(m=1024, k=512, n=256)


def write_table(folder: Path, tried_us: dict[str, float], config: MlpConfig = SMALL_TILES) -> Path:
    path = path_of(folder, H100)
    shapes = [entry_of(MEASURED, config, tried_us)]
    path.write_text(json.dumps({"schema": 1, "device": H100, "shapes": shapes}))
    return path


def test_a_measured_shape_gets_what_was_fastest(tmp_path: Path) -> None:
    table = TileTable.read(write_table(tmp_path, {"64x64x64": 3.0, "xla": 5.0}))
    assert table.device == H100
    assert table.choose(MEASURED) == SMALL_TILES


@pytest.mark.parametrize(("xla_us", "takes_xla"), [(5.0, True), (6.5, False), (8.0, False)])
def test_xla_has_to_be_ahead_by_what_it_costs_the_host(
    tmp_path: Path, xla_us: float, takes_xla: bool
) -> None:
    table = TileTable.read(write_table(tmp_path, {"64x64x64": 8.0, "xla": xla_us}))
    assert (table.choose(MEASURED) is None) == takes_xla


@pytest.mark.parametrize(
    ("shape", "is_near"),
    [((1100, 512, 256), True), ((900, 640, 192), True), ((2048, 512, 256), False)],
)
def test_a_shape_nearby_gets_the_same(
    tmp_path: Path, shape: tuple[int, int, int], is_near: bool
) -> None:
    unlikely = MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=3)
    table = TileTable.read(write_table(tmp_path, {"64x64x64": 3.0}, unlikely))
    m, k, n = shape
    chosen = table.choose(DenseShape(m=m, k=k, n=n))
    assert chosen == (unlikely if is_near else choose_config(m, n, k))


def test_tiles_that_do_not_divide_a_shape_are_not_taken(tmp_path: Path) -> None:
    table = TileTable.read(write_table(tmp_path, {"128x256x64": 3.0}, CONFIGS[0]))
    chosen = table.choose(DenseShape(m=1024, k=512, n=320))
    assert chosen is not None and 320 % chosen.block_n == 0


def test_a_device_without_a_table_gets_the_rule() -> None:
    table = TileTable.of_device("some other card")
    assert table.choices == {}
    assert table.choose(DenseShape(m=256, k=23936, n=1024)) is None  # XLA splits k
    assert table.choose(MEASURED) == choose_config(1024, 256, 512)


LAYERS = [(1024, 512), (512, 250), (250, 64)]


@pytest.mark.parametrize(
    ("samples", "chain_us", "first"),
    [(1024, 9.0, 1), (1024, 11.9, 1), (1024, 12.0, 3), (1400, 9.0, 1), (2048, 9.0, 3)],
)
def test_layers_run_in_one_launch_where_that_was_faster(
    tmp_path: Path, samples: int, chain_us: float, first: int
) -> None:
    """Two layers and a score: 10 us, and 2 between them; as many samples, by a factor of 1.41."""
    chain = Chain.of(1024, LAYERS[1:], 1)
    assert (chain.widths, chain.launches) == ((512, 256, 64), 3)
    entry = chain_entry_of(chain, chain_us, 10.0)
    path = path_of(tmp_path, H100)
    path.write_text(json.dumps({"schema": 1, "device": H100, "shapes": [], "chains": [entry]}))
    table = TileTable.read(path)
    assert table.chain_from(samples, LAYERS, 1) == first
    assert table.chain_from(samples, LAYERS, 2) == table.chain_from(samples, LAYERS, 0) == 3


def test_shipped_tables_can_be_read() -> None:
    table = TileTable.of_device(H100)
    assert table.device == H100
    assert len(table.choices) >= 70
    for shape, config in table.choices.items():
        assert config is None or shape.n % config.block_n == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "device": "x", "shapes": [{"m": 1}]}']
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(TileTableError, match=r"table\.json: no tile table"):
        TileTable.read(path)


def test_layers_of_a_model_are_padded_and_without_scores() -> None:
    shapes = layer_shapes([DLRMConfig.shipped("dlrm-kaggle")], [256])
    assert {(s.k, s.n) for s in shapes} == {(64, 512), (512, 256), (256, 64), (448, 512)}
    cross = layer_shapes([DLRMConfig.shipped("dlrm-v2")], [256, 512])
    assert DenseShape(m=512, k=3456, n=512) in cross


@pytest.mark.parametrize("shape", [(1, 64, 64), (256, 23936, 1024), (32768, 1024, 1024)])
def test_candidates_fit_their_shape(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    configs = candidates(DenseShape(m=m, k=k, n=n))
    assert configs and len({name_of(config) for config in configs}) == len(configs)
    for config in configs:
        assert n % config.block_n == 0
        assert config.splits == 1 or k // config.block_k >= 4 * config.splits
