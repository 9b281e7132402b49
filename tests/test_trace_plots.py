"""Both figures are drawn from a report, with and without counted HBM traffic."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from recflow_jax.measure import trace_plots
from test_plots import drawn


def kernel(kind: str, start_us: float, duration_us: float) -> dict[str, Any]:
    return {"name": kind, "kind": kind, "start_us": start_us, "duration_us": duration_us}


SERIAL = [kernel("gather", 0, 100), kernel("dnn", 101, 150), kernel("other", 252, 3)]
CO_RUN = [kernel("both", 0, 140), kernel("dnn", 141, 30)]
HBM = {"dnn": {"tb_per_s": 0.5, "peak_pct": 15.0}, "co_run": {"tb_per_s": 2.25, "peak_pct": 67.0}}


def region(block: int, warpgroup: int, name: str, start_us: float) -> dict[str, Any]:
    times = {"start_us": start_us, "end_us": start_us + 4}
    return {"block": block, "warpgroup": warpgroup, "name": name} | times


def report(hbm: Any = None) -> dict[str, Any]:
    lines = [("serial", 255.0, SERIAL), ("deep/all", 171.0, CO_RUN)]
    return {
        "device": "abacus",
        "model": {"name": "m"},
        "workload": {"batch": 8192, "slice_samples": 4096},
        "timelines": [
            {"name": name, "batches": 1, "us_per_batch": us, "kernels": kernels}
            for name, us, kernels in lines
        ],
        "hbm": hbm,
        "launch": {
            "layer": "top.0",
            "samples": 8192,
            "inputs": 3456,
            "outputs": 1024,
            "slice_samples": 4096,
            "kernel_us": 80.0,
            "warpgroups": 2,
            "activity": {"us": [1.0, 5.0], "multiply": [0.5, 0.0], "gather": [0.5, 0.25]},
            "shown": [
                region(0, 0, "multiply", 0),
                region(0, 0, "help", 4),
                region(0, 1, "gather", 0),
                region(9, 1, "load", 1),
            ],
        },
    }


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(spans, row's lower end, colour) of all bars that are drawn."""
    found = []
    draw = Axes.broken_barh

    def noted(self: Axes, spans: Any, rows: Any, **style: Any) -> Any:
        found.append(([*spans], rows[0], style.get("color", style.get("facecolor"))))
        return draw(self, spans, rows, **style)

    monkeypatch.setattr(Axes, "broken_barh", noted)
    return found


@pytest.mark.parametrize("hbm", [None, HBM])
def test_a_bar_per_kernel_serial_above_co_run(hbm: Any, bars: list[Any], tmp_path: Path) -> None:
    trace_plots.timeline(report(hbm), tmp_path / "new" / "timeline.png")
    drawn(tmp_path / "new" / "timeline.png")
    colors = trace_plots.COLORS
    assert ([(101, 150)], -0.35, colors["dnn"]) in bars
    assert ([(0, 140)], 0.65, colors["both"]) in bars
    assert sum(len(spans) for spans, *_ in bars) == len(SERIAL) + len(CO_RUN)


def test_hbm_traffic_is_written_beside_the_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = []
    ticks = Axes.set_yticks

    def noted(self: Axes, places: Any, labels: Any, **style: Any) -> Any:
        texts.extend(labels)
        return ticks(self, places, labels, **style)

    monkeypatch.setattr(Axes, "set_yticks", noted)
    trace_plots.timeline(report(HBM), tmp_path / "timeline.png")
    told = "\n".join(texts)
    assert "255 us per batch" in told and "171 us per batch" in told
    assert "2.25 TB/s" in told and "15 % of peak" in told


def test_a_row_per_warpgroup_of_the_blocks_shown(bars: list[Any], tmp_path: Path) -> None:
    trace_plots.launch(report(), tmp_path / "launch.png")
    drawn(tmp_path / "launch.png")
    colors = trace_plots.REGION_COLORS
    rows = [0, 0, 1, 4]  # of two blocks of two warpgroups, a free row between them
    assert [(row, color) for _, row, color in bars] == [
        (rows[0] - 0.45, colors["multiply"]),
        (rows[1] - 0.45, colors["help"]),
        (rows[2] - 0.45, colors["gather"]),
        (rows[3] - 0.45, colors["load"]),
    ]
    assert bars[1][0] == [(4, 4)]
