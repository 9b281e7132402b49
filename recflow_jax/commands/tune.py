"""`recflow tune`: which tiles are fastest on this device, as a table that the package ships."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from recflow_jax.backend import kernels_to
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig, shipped_models
from recflow_jax.console import console, progress
from recflow_jax.measure import report
from recflow_jax.measure.tiles import chains_of, layer_shapes, try_chains, try_shapes
from recflow_jax.tiles import (
    SCHEMA,
    XLA,
    chain_entry_of,
    chains_in,
    entry_of,
    path_of,
    shapes_in,
)

BATCHES = (256, 512, 1024, 2048, 4096, 8192)


def tune(
    *,
    out: Path,
    models: Sequence[DLRMConfig] = (),
    batches: Sequence[int] = BATCHES,
    resume: bool = True,
) -> Path:
    """Measures the layers of these models (none: all shipped ones), one by one and in chains, and
    writes the device's table into `out`, shape by shape.

    With resume, what the file has is kept. Raises BackendError where no kernels run.
    """
    ops = kernels_to("tune").ops
    device = jax.devices()[0].device_kind
    path = path_of(out, device)
    kept: dict[str, Any] = {"shapes": []}
    if resume and path.is_file():
        kept = json.loads(path.read_text())
    have, have_chains = set(shapes_in(kept)), set(chains_in(kept))
    models = models or [DLRMConfig.shipped(name) for name in shipped_models()]
    missing = [shape for shape in layer_shapes(models, batches) if shape not in have]
    found, chains = list(kept["shapes"]), list(kept.get("chains", ()))
    with progress("tiles", len(missing)) as advance:
        for tried in try_shapes(missing, advance):
            found.append(entry_of(tried.shape, tried.config, tried.tried_us))
            report.save_json(path, _content(device, found, chains))
    report.show(_table(found))
    new_chains = [chain for chain in chains_of(models, batches) if chain not in have_chains]
    with progress("chains", len(new_chains)) as advance:
        for chain, chain_us, layers_us in try_chains(new_chains, ops, advance):
            chains.append(chain_entry_of(chain, chain_us, layers_us))
            report.save_json(path, _content(device, found, chains))
    report.show(_chain_table(chains))
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return path


def _content(device: str, shapes: list[Any], chains: list[Any]) -> dict[str, Any]:
    ordered = sorted(shapes, key=lambda entry: (entry["k"], entry["n"], entry["m"]))
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": report.command_line(),
        "device": device,
        "versions": versions(),
        "shapes": ordered,
        "chains": sorted(chains, key=lambda entry: (entry["widths"], entry["m"])),
    }


def _table(entries: Sequence[Any]) -> Table:
    table = Table(title="fastest tiles, microseconds on the device", title_justify="left")
    for column in ("m", "k", "n", "XLA", "best", "fastest", "x XLA"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        tried = entry["tried_us"]
        best = min(tried, key=lambda name: tried[name])
        xla = tried.get(XLA, float("nan"))
        numbers = (f"{xla:.1f}", f"{tried[best]:.1f}", best, f"{xla / tried[best]:.2f}")
        table.add_row(str(entry["m"]), str(entry["k"]), str(entry["n"]), *numbers)
    return table


def _chain_table(chains: Sequence[Any]) -> Table:
    title = "layers in one launch, and in one each, microseconds on the device"
    table = Table(title=title, title_justify="left")
    for column in ("m", "widths", "scores", "one launch", "launches", "x launches"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in chains:
        one, each = entry["chain_us"], entry["layers_us"]
        widths = "-".join(map(str, entry["widths"]))
        numbers = (f"{one:.1f}", f"{each:.1f}", f"{each / one:.2f}")
        table.add_row(str(entry["m"]), widths, str(entry["scores"]), *numbers)
    return table
