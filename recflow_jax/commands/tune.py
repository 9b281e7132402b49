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
from recflow_jax.measure.tiles import layer_shapes, try_shapes
from recflow_jax.tiles import SCHEMA, XLA, entry_of, path_of, shapes_in

BATCHES = (256, 512, 1024, 2048, 4096, 8192)


def tune(
    *,
    out: Path,
    models: Sequence[DLRMConfig] = (),
    batches: Sequence[int] = BATCHES,
    resume: bool = True,
) -> Path:
    """Measures the layers of these models (none: all shipped ones) and writes the device's table
    into `out`, shape by shape.

    With resume, shapes that the file has are kept. Raises BackendError where no kernels run.
    """
    kernels_to("tune")
    device = jax.devices()[0].device_kind
    path = path_of(out, device)
    kept = json.loads(path.read_text()) if resume and path.is_file() else {"shapes": []}
    have = set(shapes_in(kept))
    models = models or [DLRMConfig.shipped(name) for name in shipped_models()]
    missing = [shape for shape in layer_shapes(models, batches) if shape not in have]
    found = list(kept["shapes"])
    with progress("tiles", len(missing)) as advance:
        for tried in try_shapes(missing, advance):
            found.append(entry_of(tried.shape, tried.config, tried.tried_us))
            report.save_json(path, _content(device, found))
    report.show(_table(found))
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return path


def _content(device: str, shapes: list[Any]) -> dict[str, Any]:
    ordered = sorted(shapes, key=lambda entry: (entry["k"], entry["n"], entry["m"]))
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": report.command_line(),
        "device": device,
        "versions": versions(),
        "shapes": ordered,
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
