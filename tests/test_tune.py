"""`recflow tune`: what it writes is what engines choose by; what it has is not measured again."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from recflow_jax.backend import Backend
from recflow_jax.commands import tune
from recflow_jax.config import DLRMConfig
from recflow_jax.measure import tiles
from recflow_jax.model import REFERENCE, Ops
from recflow_jax.tiles import Chain, TileTable

MODEL = DLRMConfig.shipped("dlrm-kaggle")
LAYERS = 4


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A device on which 64x64 tiles take 1 us, other ones 2 and XLA 4; notes what was compiled."""
    compiled: list[Any] = []

    def compile_one(operands: tuple[Any, ...], config: Any) -> Any:
        compiled.append((operands[0].shape, config))
        return config

    def device_us(config: Any, inputs: Any) -> float:
        if isinstance(config, str):
            return 5.0 if config == "together" else 5.5
        if config is None:
            return 4.0
        return 1.0 if (config.block_m, config.block_n) == (64, 64) else 2.0

    mosaic = Backend(name="mosaic", reason="pretended", ops=REFERENCE)
    monkeypatch.setattr(tune, "kernels_to", lambda _: mosaic)

    def compile_chain(ops: Ops, chain: Chain) -> str:
        compiled.append((chain.m, chain))
        return "apart" if ops.chain_from(chain.m, [jnp.zeros((1, 1))], 0) else "together"

    monkeypatch.setattr(tiles, "_compile", compile_one)
    monkeypatch.setattr(tiles, "_compile_chain", compile_chain)
    monkeypatch.setattr(tiles, "device_us", device_us)
    return compiled


def only_shapes(tried: list[Any]) -> list[Any]:
    return [each for each in tried if not isinstance(each[1], Chain)]


def test_the_table_has_the_fastest_tiles(tried: list[Any], tmp_path: Path) -> None:
    path = tune.tune(out=tmp_path, models=[MODEL], batches=[256])
    table = TileTable.read(path)
    assert table.device == jax.devices()[0].device_kind
    assert len(table.choices) == LAYERS
    for config in table.choices.values():
        assert config is not None and (config.block_m, config.block_n) == (64, 64)
    assert all("xla" in entry["tried_us"] for entry in json.loads(path.read_text())["shapes"])


def test_the_table_has_the_chains(tried: list[Any], tmp_path: Path) -> None:
    table = TileTable.read(tune.tune(out=tmp_path, models=[MODEL], batches=[256]))
    assert table.chains == {
        Chain(m=256, widths=(64, 512, 256, 64), scores=0): True,
        Chain(m=256, widths=(448, 512, 256), scores=1): True,
    }
    tried.clear()
    tune.tune(out=tmp_path, models=[MODEL], batches=[256])
    assert tried == []


def test_of_wide_layers_the_end_is_a_chain() -> None:
    chains = tiles.chains_of([DLRMConfig.shipped("dlrm-v2")], [8])
    widths = {chain.widths: chain.scores for chain in chains}
    assert widths == {(64, 512, 256, 128): 0, (512, 256): 1}


def test_measured_shapes_are_kept(tried: list[Any], tmp_path: Path) -> None:
    tune.tune(out=tmp_path, models=[MODEL], batches=[256])
    tried.clear()
    path = tune.tune(out=tmp_path, models=[MODEL], batches=[256, 512])
    assert {shape[0] for shape, _ in only_shapes(tried)} == {512}
    assert len(TileTable.read(path).choices) == 2 * LAYERS
    tried.clear()
    tune.tune(out=tmp_path, models=[MODEL], batches=[256], resume=False)
    assert {shape[0] for shape, _ in only_shapes(tried)} == {256}


def test_xla_is_compiled_once_for_each_shape(tried: list[Any], tmp_path: Path) -> None:
    tune.tune(out=tmp_path, models=[MODEL], batches=[256])
    assert sum(config is None for _, config in tried) == LAYERS
