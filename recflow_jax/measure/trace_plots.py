"""Figures of `recflow bench traces`, as PNG, from what its JSON holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from recflow_jax.measure.plots import save

COLORS = {"dnn": "#1f6fb4", "gather": "#e08a1e", "both": "#2e8b57", "other": "#9a9a9a"}
KINDS = {
    "gather": "embedding gather",
    "dnn": "DNN (matmuls)",
    "both": "both, in one kernel",
    "other": "other (copies)",
}
REGION_COLORS = {
    "multiply": COLORS["dnn"],
    "gather": COLORS["gather"],
    "help": "#b5651d",
    "load": "#c9d8e6",
}
REGION_LABELS = {
    "multiply": "multiplies a tile",
    "gather": "gathers",
    "help": "gathers, after its last tile",
    "load": "loads operands",
}
IDLE_COLOR = "#eeeeee"
BAR = 0.7  # of a row's height


def timeline(report: Mapping[str, Any], path: Path) -> None:
    """Draws serial batches above co-run ones, on one time axis; at the right, the HBM traffic."""
    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
    ax = figure.subplots()
    lines = report["timelines"]
    for row, line in enumerate(lines):
        for kind, color in COLORS.items():
            spans = [_span(kernel) for kernel in line["kernels"] if kernel["kind"] == kind]
            ax.broken_barh(spans, (row - BAR / 2, BAR), color=color, linewidth=0)
    batch = f"{report['workload']['batch']:,} samples"
    ax.set_yticks(range(len(lines)), [_line_label(line) for line in lines])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel(f"microseconds; {lines[0]['batches']} batches of {batch} in a row")
    speedup = lines[0]["us_per_batch"] / lines[-1]["us_per_batch"]
    ax.set_title(
        f"{report['model']['name']} on {report['device']}: a batch's embeddings during the DNN of "
        f"the one before, {speedup:.2f} x as fast",
        fontsize=11,
    )
    _hbm_axis(ax, report["hbm"])
    handles = [Patch(color=COLORS[kind], label=label) for kind, label in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    save(figure, path)


def launch(report: Mapping[str, Any], path: Path) -> None:
    """Draws what all SMs do, moment by moment, and the warpgroups of some blocks."""
    traced = report["launch"]
    figure = Figure(figsize=(11, 8), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    _activity(top, traced["activity"])
    _blocks(bottom, traced["shown"], traced["warpgroups"])
    figure.suptitle(
        f"one launch on {report['device']}: {report['model']['name']}, layer {traced['layer']} "
        f"({traced['samples']:,} x {traced['inputs']:,} x {traced['outputs']:,}) with the bags of "
        f"{traced['slice_samples']:,} samples, {traced['kernel_us']:,.0f} us",
        fontsize=11,
    )
    handles = [Patch(color=REGION_COLORS[n], label=label) for n, label in REGION_LABELS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    save(figure, path)


def _span(kernel: Mapping[str, Any]) -> tuple[float, float]:
    return kernel["start_us"], kernel["duration_us"]


def _line_label(line: Mapping[str, Any]) -> str:
    name = line["name"] if line["name"] == "serial" else f"co-run\n{line['name']}"
    return f"{name}\n{line['us_per_batch']:,.0f} us per batch"


def _hbm_axis(ax: Axes, hbm: Mapping[str, Any] | None) -> None:
    """The DNN's traffic beside the serial row, the co-run's beside its own."""
    if hbm is None:
        return
    labels = [
        f"{name}\n{hbm[part]['tb_per_s']:.2f} TB/s of HBM\n{hbm[part]['peak_pct']:.0f} % of peak"
        for name, part in (("DNN alone:", "dnn"), ("co-run:", "co_run"))
    ]
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    right.set_yticks(range(len(labels)), labels, fontsize=9)


def _activity(ax: Axes, activity: Mapping[str, Sequence[float]]) -> None:
    shares = [[100 * share for share in activity[name]] for name in ("multiply", "gather")]
    idle = [max(0.0, 100 - sum(both)) for both in zip(*shares, strict=True)]
    colors = (REGION_COLORS["multiply"], REGION_COLORS["gather"], IDLE_COLOR)
    ax.stackplot(
        activity["us"], *shares, idle, colors=colors, labels=["multiply", "gather", "idle"]
    )
    ax.set_ylim(0, 100)
    ax.set_ylabel("% of the warpgroups\nof all SMs")
    ax.legend(loc="lower left", fontsize=8, ncols=3)


def _blocks(ax: Axes, regions: Sequence[Mapping[str, Any]], warpgroups: int) -> None:
    """A row per warpgroup, the blocks apart."""
    blocks = sorted({region["block"] for region in regions})
    first = {block: place * (warpgroups + 1) for place, block in enumerate(blocks)}
    for region in regions:
        row = first[region["block"]] + region["warpgroup"]
        span = (region["start_us"], region["end_us"] - region["start_us"])
        style = {"facecolor": REGION_COLORS[region["name"]], "edgecolor": "white", "linewidth": 0.5}
        ax.broken_barh([span], (row - 0.45, 0.9), **style)
    middles = [first[block] + (warpgroups - 1) / 2 for block in blocks]
    ax.set_yticks(middles, [f"block {block}" for block in blocks])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("microseconds from the launch's start; a row per warpgroup, a block per SM")
