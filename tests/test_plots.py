"""Figures come out as PNG files of a readable size, from what the JSON files hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from recflow_jax.measure import plots
from recflow_jax.measure.schemes import Scheme
from scheduling import ProfileRow, ProfileTable


def timing(us: float) -> dict[str, float]:
    return {"median_us": us, "p10_us": 0.9 * us, "p90_us": 1.2 * us, "samples": 5, "calls": 10}


def report(**parts: Any) -> dict[str, Any]:
    return {
        "device": "abacus",
        "backend": {"name": "xla"},
        "ids": "uniform",
        "model": {"name": "m", "rows": 10, "compute_dtype": "float32"},
        **parts,
    }


OFFLINE = [
    {
        "batch": batch,
        "floor": {"us": 0.3 * batch},
        "contenders": {
            name: {"timing": timing(batch * factor)}
            for name, factor in {"recflow": 1.0, "jax": 1.7, "torch": 9.0, "other": 2.0}.items()
        },
    }
    for batch in (256, 1024)
]
ONLINE = {
    "mean_request_samples": 270.0,
    "points": [
        {
            "qps": qps,
            "contenders": {
                name: {"p50_ms": t, "p95_ms": 2 * t, "p99_ms": 5 * t}
                for name, t in {"recflow": qps / 50, "jax": qps / 20}.items()
            },
        }
        for qps in (50.0, 80.0)
    ],
}
GATHER = [
    {"batch": 64, "row_bytes_per_s": {"mosaic": 2e12, "reference": 1e12}, "copy_bytes_per_s": 3e12}
    | {"timings": {"mosaic": timing(5), "reference": timing(10)}}
]
DENSE = [
    {"batch": 64, "layer": f"top.{i}", "inputs": 8, "outputs": 4, "matmul_flop_per_s": 1e12}
    | {"flop_per_s": {"xla": 1e11 * (i + 1)}, "timings": {"xla": timing(5)}}
    for i in range(3)
]
PANELS = {"offline": OFFLINE, "numpy": OFFLINE, "online": ONLINE, "gather": GATHER, "dense": DENSE}


def drawn(path: Path) -> np.ndarray:
    """The picture, if something is drawn on it."""
    image = imread(path)
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50
    return image


@pytest.mark.parametrize("part", PANELS)
def test_each_part_has_a_panel(part: str, tmp_path: Path) -> None:
    plots.bench(report(**{part: PANELS[part]}), tmp_path / "new" / "figure.png")
    assert drawn(tmp_path / "new" / "figure.png").shape[1] >= 1000


def test_panels_are_stacked(tmp_path: Path) -> None:
    plots.bench(report(offline=OFFLINE), tmp_path / "one.png")
    plots.bench(report(**PANELS), tmp_path / "all.png")
    assert drawn(tmp_path / "all.png").shape[0] == 5 * drawn(tmp_path / "one.png").shape[0]


def table(*rows: ProfileRow) -> ProfileTable:
    return ProfileTable(
        device="abacus",
        backend="xla",
        versions={},
        model="m",
        fingerprint="0",
        created="2026-01-01",
        rows=rows,
    )


def row(us: float, **key: Any) -> ProfileRow:
    return ProfileRow(median_us=us, p10_us=us, p90_us=us, samples=3, **key)


SLICES = [row(n, kind="slice", slice_samples=n, slice_ids=9 * n) for n in (8, 64)]
SEGMENTS = [
    row(b * 2, kind="segment", segments=cut, segment=s, batch=b)
    for cut in (1, 2)
    for s in range(cut)
    for b in (8, 64, 512)
]
SCHEMES = [
    Scheme(
        segments=cut,
        segment=0,
        batch=b,
        slice_samples=n,
        slice_ids=9 * n,
        serial_us=b * n,
        co_run_us=cut * n,
        ride="in-turn",
    )
    for cut in (1, 2)
    for b, n in ((8, 8), (512, 8), (512, 64))
]


@pytest.mark.parametrize("schemes", [[], SCHEMES])
def test_heat_map(schemes: list[Scheme], tmp_path: Path) -> None:
    plots.profile(table(*SLICES, *SEGMENTS), schemes, tmp_path / "profile.png")
    drawn(tmp_path / "profile.png")


def test_the_finest_cut_and_the_gains_over_serial_are_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps = []
    monkeypatch.setattr(plots, "_heat_map", lambda ax, cells, *names: maps.append(cells))
    plots.profile(table(*SLICES, *SEGMENTS), SCHEMES, tmp_path / "profile.png")
    segments, slices, gains = maps
    np.testing.assert_array_equal(segments, [[16, 128, 1024]] * 2 + [[32, 256, 2048]])
    np.testing.assert_array_equal(slices, [[8, 64]])
    np.testing.assert_array_equal(gains, [[8, np.nan], [512, 512]])


def test_batch_sizes_and_roc(tmp_path: Path) -> None:
    sizes = {"20% load": {8: 3, 64: 1}, "all at once": {512: 7}, "none": {}}
    plots.batch_sizes(sizes, tmp_path / "sizes.png", title="sizes")
    drawn(tmp_path / "sizes.png")
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.5, 0.4])
    plots.roc(labels, {"served": scores}, tmp_path / "roc.png", title="liked")
    drawn(tmp_path / "roc.png")
