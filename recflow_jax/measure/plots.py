"""Figures of results, as PNG. They take what the JSON files hold, so old results can be drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from recflow_jax.measure.schemes import Scheme
from scheduling import ProfileKey, ProfileRow, ProfileTable

COLORS = {
    "recflow": "#1f6fb4",
    "mosaic": "#1f6fb4",
    "xla": "#1f6fb4",
    "HTTP": "#2e8b57",
    "gRPC": "#8a4fa3",
    "jax": "#e08a1e",
    "jax-per-table": "#b9a13a",
    "torch": "#a34a4a",
    "reference": "#e08a1e",
    "incremental": "#1f6fb4",
    "serial": "#e08a1e",
}
RECFLOW = "recflow"
OTHER_COLOR = "#666666"
FLOOR_COLOR = "#222222"
MOST_CELLS_NUMBERED = 400


def bench(report: Mapping[str, Any], path: Path) -> None:
    """Draws every part that a report of `recflow bench` has, one panel each."""
    panels = [
        (part, draw)
        for part, draw in (
            ("offline", _offline),
            ("overlap", _overlap),
            ("numpy", _stream),
            ("online", _online),
            ("online", _waited),
            ("served", _served),
            ("soak", _soak),
            ("gather", _gather),
            ("dense", _dense),
            ("interaction", _interaction),
            ("pooled-dot", _interaction),
        )
        if part in report and not (draw is _waited and _has_no_waits(report[part]))
    ]
    figure, axes = _figure(len(panels), width=9, height=4.4)
    figure.suptitle(_subject(report), fontsize=11)
    for ax, (part, draw) in zip(axes, panels, strict=True):
        draw(ax, report[part])
    save(figure, path)


def profile(table: ProfileTable, schemes: Sequence[Scheme], path: Path) -> None:
    """Heat maps of a profile table: segments by batch size with their sum, slices, and what one
    executable gains over a whole batch and a slice one after the other.
    """
    finest = max((row.segments or 1 for row in table.rows), default=1)
    segments = [row for row in table.rows if row.kind == "segment" and row.segments == finest]
    slices = [row for row in table.rows if row.kind == "slice"]
    whole = [scheme for scheme in schemes if scheme.segments == 1]
    figure, axes = _figure(1, 2 + bool(whole), width=13 if not whole else 18, height=4.6)
    figure.suptitle(
        f"{table.model} on {table.device} ({table.backend}): median microseconds", fontsize=11
    )
    _segments_map(axes[0], segments)
    _slices_map(axes[1], slices)
    if whole:
        _gains_map(axes[2], whole)
    save(figure, path)


def simulation(result: Mapping[str, Any], path: Path) -> None:
    """Latency of one GPU by load, under both policies, as `recflow simulate` foretells it."""
    figure, (ax,) = _figure(1, width=8, height=4.4)
    _latencies(ax, result, {"p50_ms": ":", "p99_ms": "-"})
    ax.set_title(
        f"{result['model']['name']} on one {result['device']}, simulated: "
        f"{result['arrivals']} arrivals",
        fontsize=10,
    )
    save(figure, path)


def batch_sizes(counts: Mapping[str, Mapping[int, int]], path: Path, *, title: str) -> None:
    """Bars of the share of batches that ran at each size, in one colour per name in `counts`."""
    figure, (ax,) = _figure(1, width=8, height=4)
    sizes = sorted({size for of_name in counts.values() for size in of_name})
    width = 0.84 / len(counts)
    shades = np.linspace(0.35, 1, len(counts))
    for index, (name, of_name) in enumerate(counts.items()):
        total = sum(of_name.values())
        places = np.arange(len(sizes)) + (index - (len(counts) - 1) / 2) * width
        shares = [100 * of_name.get(size, 0) / max(total, 1) for size in sizes]
        style = {"color": COLORS[RECFLOW], "alpha": shades[index]}
        ax.bar(places, shares, width * 0.92, label=f"{name}: {total:,} batches", **style)
    ax.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    ax.set_xlabel("rows of the batch, padded")
    ax.set_ylabel("% of batches")
    ax.legend(fontsize=8)
    ax.set_title(title, fontsize=10)
    save(figure, path)


def roc(labels: np.ndarray, scores: Mapping[str, np.ndarray], path: Path, *, title: str) -> None:
    """ROC curves of scores for the same labels."""
    figure, (ax,) = _figure(1, width=5.5, height=5)
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        hits = np.cumsum(labels[order] > 0)
        misses = np.arange(1, len(order) + 1) - hits
        ax.plot(misses / misses[-1], hits / hits[-1], color=_color(name), label=name)
    ax.plot([0, 1], [0, 1], color=FLOOR_COLOR, linewidth=0.6, linestyle=":")
    ax.set_xlabel("false positive rate")
    ax.set_ylabel("true positive rate")
    ax.legend(loc="lower right")
    ax.set_title(title, fontsize=10)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _figure(
    rows: int, columns: int = 1, *, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, `height` inches per row."""
    figure = Figure(figsize=(width, height * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def _subject(report: Mapping[str, Any]) -> str:
    model = report["model"]
    return (
        f"{model['name']} ({model['rows']:,} rows, {model['compute_dtype']}, {report['ids']} ids) "
        f"on {report['device']}, back end {report['backend']['name']}"
    )


def _color(name: str) -> str:
    return COLORS.get(name, OTHER_COLOR)


def _offline(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    _median_bars(ax, results)
    for place, result in enumerate(results):
        floor = result["floor"]["us"]
        label = "floor (bytes, FLOP)" if place == 0 else "_not in the legend"
        ends = (place - 0.42, place + 0.42)
        ax.hlines(floor, *ends, color=FLOOR_COLOR, linewidth=2, label=label)
        if "dispatch" in result:
            us = result["dispatch"]["median_us"]
            label = label.replace("floor (bytes, FLOP)", "empty dispatch (host)")
            ax.hlines(us, *ends, color=FLOOR_COLOR, linestyle=":", label=label)
    _finish_bars(ax, "offline: inputs on the device")


def _overlap(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    times = {"co-run": [result["best_us"] for result in results]}
    for name in results[0]["contenders"]:
        times[name] = [r["contenders"][name]["timing"]["median_us"] for r in results]
    for part in ("embedding", "dnn"):
        times[f"{part} alone"] = [result[part]["median_us"] for result in results]
    _grouped_bars(ax, [result["batch"] for result in results], times)
    _finish_bars(ax, "embeddings during the DNN of the batch before")


def _stream(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    _median_bars(ax, results)
    _finish_bars(ax, "from numpy: packing and copies counted")


def _median_bars(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    medians = {
        name: [r["contenders"][name]["timing"]["median_us"] for r in results]
        for name in results[0]["contenders"]
    }
    _grouped_bars(ax, [r["batch"] for r in results], medians)


def _finish_bars(ax: Axes, title: str) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.margins(y=0.15)
    ax.set_xlabel("samples per batch")
    ax.set_ylabel("microseconds per batch")
    ax.set_title(title, fontsize=10)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 2)  # room for the legend above the bars
    ax.legend(fontsize=8, loc="upper left", ncols=5)


def _grouped_bars(ax: Axes, batches: Sequence[int], values: Mapping[str, Sequence[float]]) -> None:
    width = 0.84 / len(values)
    for index, (name, heights) in enumerate(values.items()):
        places = np.arange(len(batches)) + (index - (len(values) - 1) / 2) * width
        ax.bar(places, heights, width * 0.92, color=_color(name), label=name)
        for place, height in zip(places, heights, strict=True):
            ax.annotate(
                _short(height), (float(place), height), ha="center", va="bottom", fontsize=7
            )
    ax.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])


def _online(ax: Axes, result: Mapping[str, Any]) -> None:
    _latencies(ax, result, {"p50_ms": ":", "p95_ms": "--", "p99_ms": "-"})
    _foretold(ax, result)
    ax.set_title(f"online: open-loop {result.get('arrivals', 'Poisson')} arrivals", fontsize=10)


def _foretold(ax: Axes, result: Mapping[str, Any]) -> None:
    """Hollow marks: the p99 that the profile table foretells."""
    for point in result["points"]:
        for name, told in point.get("foretold", {}).items():
            style = {"color": _color(name), "markerfacecolor": "none", "markersize": 9}
            ax.plot(point["qps"], told["p99_ms"], "o", **style)


def _has_no_waits(result: Mapping[str, Any]) -> bool:
    return not any(point.get("waited") for point in result["points"])


def _waited(ax: Axes, result: Mapping[str, Any]) -> None:
    """Histograms of waits, in steps, one line per load."""
    waited = [(point["qps"], point["waited"]) for point in result["points"] if point.get("waited")]
    for shade, (qps, of_load) in zip(np.linspace(0.35, 1, len(waited)), waited, strict=True):
        steps = of_load["steps"]
        shares = 100 * np.array(steps["counts"]) / max(sum(steps["counts"]), 1)
        label = f"{qps:,.0f} requests/s: {100 * of_load['within_a_step']:.1f} % within a step"
        ax.stairs(shares, steps["edges"], color=COLORS[RECFLOW], alpha=shade, label=label)
    ax.axvline(1.5, color=FLOOR_COLOR, linestyle="--", linewidth=0.8)
    ax.set_xlabel("steps that ended between arrival and launch (the last bar: ten and more)")
    ax.set_ylabel("% of requests")
    ax.legend(fontsize=8)
    ax.set_title("zero queue: how long requests wait for their launch", fontsize=10)


def _served(ax: Axes, result: Mapping[str, Any]) -> None:
    _latencies(ax, result, {"p50_ms": ":", "p99_ms": "-"})
    if result["p99_ms"] is not None:
        ax.axhline(result["p99_ms"], color=FLOOR_COLOR, linestyle="--", linewidth=0.8)
        for name, found in result["sustained"].items():
            ax.axvline(found["qps"], color=_color(name), linestyle="--", linewidth=0.8)
    ax.set_title(f"served: open-loop {result['arrivals']} arrivals", fontsize=10)


def _soak(ax: Axes, result: Mapping[str, Any]) -> None:
    """Resident memory, and the device's where it tells."""
    times = [sample["at_s"] for sample in result["memory"]]
    for kind, label in (("rss_bytes", "resident"), ("device_bytes", "on the device")):
        mib = [sample[kind] / 2**20 for sample in result["memory"]]
        if any(mib):
            ax.plot(times, mib, label=label)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"seconds, {result['qps']:g} requests per second of all kinds")
    ax.set_ylabel("MiB")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    ax.set_title("a server's memory under load, cancellations and bad clients", fontsize=10)


def _latencies(ax: Axes, result: Mapping[str, Any], styles: Mapping[str, str]) -> None:
    """Latency by load, a line per contender and percentile."""
    points = result["points"]
    for name in points[0]["contenders"]:
        loads = [point["qps"] for point in points]
        for percentile, style in styles.items():
            times = [point["contenders"][name][percentile] for point in points]
            label = f"{name} {percentile[:3]}"
            ax.plot(loads, times, style, marker="o", markersize=4, color=_color(name), label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(left=0)
    ax.set_xlabel(
        f"requests per second offered ({result['mean_request_samples']:.0f} samples each)"
    )
    ax.set_ylabel("milliseconds, arrival to answer")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)


def _gather(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    rates = {
        name: [r["row_bytes_per_s"][name] / 1e9 for r in results] for name in results[0]["timings"]
    }
    _grouped_bars(ax, [r["batch"] for r in results], rates)
    ceiling = results[0]["copy_bytes_per_s"] / 1e9
    ax.axhline(ceiling, color=FLOOR_COLOR, linewidth=2, label="copy rate")
    ax.set_xlabel("samples per batch")
    ax.set_ylabel("GB/s of rows asked for")
    ax.set_title("pooled gather alone", fontsize=10)
    ax.margins(y=0.15)
    ax.legend(fontsize=8, loc="lower right")


def _interaction(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    names = [*results[0]["timings"]]
    times = {name: [r["timings"][name]["median_us"] for r in results] for name in names}
    times["floor"] = [r["floor_us"] for r in results]
    _grouped_bars(ax, [r["batch"] for r in results], times)
    ax.set_yscale("log")
    ax.set_xlabel("samples per batch")
    ax.set_ylabel("microseconds")
    ax.set_title(f"interaction alone: {results[0]['interaction']}", fontsize=10)
    ax.legend(fontsize=8, loc="upper left")


def _dense(ax: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    layers = list(dict.fromkeys(r["layer"] for r in results))
    largest = max(r["batch"] for r in results)
    chosen = [r for r in results if r["batch"] == largest]
    rates = {name: [r["flop_per_s"][name] / 1e12 for r in chosen] for name in chosen[0]["timings"]}
    _grouped_bars(ax, range(len(layers)), rates)
    sizes = [f"{r['layer']}\n{r['inputs']}x{r['outputs']}" for r in chosen]
    ax.set_xticks(range(len(layers)), sizes, fontsize=8)
    ceiling = results[0]["matmul_flop_per_s"] / 1e12
    ax.axhline(ceiling, color=FLOOR_COLOR, linewidth=2, label="jnp.dot, large")
    ax.set_ylabel("TFLOP/s")
    ax.set_title(f"dense layers alone, {largest:,} samples", fontsize=10)
    ax.margins(y=0.15)
    ax.legend(fontsize=8)


def _segments_map(ax: Axes, rows: Sequence[ProfileRow]) -> None:
    batches = sorted({row.batch for row in rows if row.batch is not None})
    indices = sorted({row.segment for row in rows if row.segment is not None})
    cells = np.full((len(indices) + 1, len(batches)), np.nan)
    for row in rows:
        if row.batch is not None and row.segment is not None:
            cells[indices.index(row.segment), batches.index(row.batch)] = row.median_us
    cells[-1] = cells[:-1].sum(axis=0)
    names = [*(f"segment {index}" for index in indices), "all"]
    _heat_map(ax, cells, names, [f"{batch:,}" for batch in batches])
    ax.set_xlabel("batch size")
    ax.set_title("segments", fontsize=10)


def _slices_map(ax: Axes, rows: Sequence[ProfileRow]) -> None:
    ordered = sorted(rows, key=lambda row: row.sizes)
    cells = np.array([[row.median_us for row in ordered]], np.float64)
    _heat_map(ax, cells, ["slice"], [_slice_name(row) for row in ordered])
    ax.set_xlabel("slice size (samples / ids)")
    ax.set_title("embedding slices", fontsize=10)


def _gains_map(ax: Axes, schemes: Sequence[Scheme]) -> None:
    """Below 1 the planner takes one after the other."""
    batches = sorted({scheme.batch for scheme in schemes})
    sizes = sorted({scheme.slice_samples for scheme in schemes})
    cells = np.full((len(batches), len(sizes)), np.nan)
    for scheme in schemes:
        place = batches.index(scheme.batch), sizes.index(scheme.slice_samples)
        cells[place] = scheme.gain
    _heat_map(ax, cells, [f"batch {b:,}" for b in batches], [f"{size:,}" for size in sizes])
    ax.set_xlabel("slice size (samples)")
    ax.set_title("serial time / best time in one executable", fontsize=10)


def _slice_name(row: ProfileKey) -> str:
    return f"{row.slice_samples:,}\n{EngFormatter(places=1, sep='')(row.slice_ids or 0)}"


def _heat_map(ax: Axes, cells: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    logs = np.log10(np.where(cells > 0, cells, np.nan))
    ax.imshow(logs, aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    if cells.size > MOST_CELLS_NUMBERED or not np.isfinite(logs).any():
        return
    middle = (np.nanmin(logs) + np.nanmax(logs)) / 2
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            dark = logs[row, column] < middle or np.nanmin(logs) == np.nanmax(logs)
            ink = "white" if dark else "black"
            ax.text(column, row, _short(value), ha="center", va="center", fontsize=8, color=ink)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
