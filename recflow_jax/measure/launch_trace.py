"""Inside one co-run launch: when each warpgroup of each SM multiplies, gathers or is done.

The kernel writes it down itself, by SM clocks; these are brought to the launch's time as the
profiler saw it.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pallas_kernels.corun import CONFIGS, REGIONS, dense_with_gather
from pallas_kernels.slots import width
from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.layout import Layout
from recflow_jax.measure.contenders import device_batches
from recflow_jax.measure.kernels import mlp_layers
from recflow_jax.measure.timeline import NoKernels, kernels_during
from recflow_jax.model import Params

CONFIG_NAME = "deep"
# A loading warpgroup that also writes down its regions needs more registers.
CONFIG = replace(CONFIGS[CONFIG_NAME], load_registers=32)
MULTIPLYING, GATHERING = ("multiply",), ("gather", "help")
MOMENTS = 400
SHOWN_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Region:
    """What a warpgroup of a block did; microseconds from the launch's first region on."""

    block: int
    warpgroup: int
    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Shares of the warpgroups that multiply or gather which do so, moment by moment."""

    us: list[float]
    multiply: list[float]
    gather: list[float]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the SMs' time, from the launch's start to its end: at least one warpgroup multiplies, at
    least one gathers, both at once.
    """

    multiply: float
    gather: float
    both: float


@dataclass(frozen=True, kw_only=True)
class LaunchTrace:
    """One launch of a layer with a slice. warpgroup_us: summed over all warpgroups, by region.
    tail_us: from when the first SM is done to the end. `shown`: the regions of some blocks.
    """

    layer: str
    samples: int
    inputs: int
    outputs: int
    slice_samples: int
    config: str
    blocks: int
    warpgroups: int
    kernel_us: float
    clock_mhz: float
    warpgroup_us: dict[str, float]
    shares: Shares
    tail_us: float
    activity: Activity
    shown: list[Region]

    @property
    def tail_share(self) -> float:
        """Of the launch, at the end of which some SMs idle."""
        return self.tail_us / self.kernel_us


def trace_launch(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    *,
    samples: int,
    slice_samples: int,
    ids: str,
    seed: int,
) -> LaunchTrace:
    """The largest dense layer of a model that co-runs (see `check_co_runs`) with the bags of so
    many other samples.

    Raises ValueError where the layer has too many tiles for its trace to fit in SMEM; NoKernels.
    """
    layer = max(mlp_layers(config), key=lambda layer: layer.shape[0] * layer.shape[1])
    prepared = backend.prepare(params, config)
    weights, layout = layer.of(prepared), Layout.of(config)
    x = jax.random.normal(jax.random.key(seed), (samples, layer.shape[0]))
    (bags,) = device_batches(layout, [generate(config, slice_samples, seed=seed, ids=ids)])
    vectors = jnp.zeros((slice_samples, width(layout.slots)), jnp.dtype(config.carried_dtype))
    operands = (x.astype(config.carried_dtype), weights.kernel, weights.bias, vectors)
    operands += (jnp.int32(0), prepared.groups, bags.rows, bags.offsets, bags.weights)
    options = {"activation": config.activation, "slots": layout.slots, "left": 0, "config": CONFIG}
    with TemporaryDirectory() as folder:
        launch = jax.jit(functools.partial(dense_with_gather, **options, trace_dir=folder))
        trace, kernel_us = _traced(lambda: launch(*operands), Path(folder))
    regions, clock_mhz = regions_of(trace, warpgroups=CONFIG.warpgroups, kernel_us=kernel_us)
    return LaunchTrace(
        layer=layer.name,
        samples=samples,
        inputs=layer.shape[0],
        outputs=layer.shape[1],
        slice_samples=slice_samples,
        config=CONFIG_NAME,
        blocks=CONFIG.mlp.blocks,
        warpgroups=CONFIG.warpgroups,
        kernel_us=kernel_us,
        clock_mhz=clock_mhz,
        **summary(regions, workers=CONFIG.warpgroups - 1),
    )


def _traced(launch: Callable[[], Any], folder: Path) -> tuple[Mapping[str, Any], float]:
    """The trace of a launch that is not the first one, and its microseconds."""

    def run() -> None:
        jax.block_until_ready(launch())
        jax.effects_barrier()

    run()
    for path in folder.iterdir():
        path.unlink()
    kernels = [kernel for kernel in kernels_during(run) if kernel.kind == "both"]
    paths = [*folder.iterdir()]
    if len(kernels) != 1 or len(paths) != 1:
        raise NoKernels(f"{len(kernels)} co-run launches were seen, with {len(paths)} traces")
    return json.loads(paths[0].read_text()), kernels[0].duration_us


def regions_of(
    trace: Mapping[str, Any], *, warpgroups: int, kernel_us: float
) -> tuple[list[Region], float]:
    """The regions of REGIONS of a trace in Chrome's format, in which a thread's start is in
    microseconds and what follows in thousands of clocks; and the clock in MHz, by which the
    longest thread takes `kernel_us`. Raises NoKernels for a trace without regions.
    """
    threads: dict[int, list[Mapping[str, Any]]] = {}
    for event in trace["traceEvents"]:
        threads.setdefault(event["tid"], []).append(event)
    if not threads:
        raise NoKernels("the launch wrote down no regions")
    starts = {thread: events[0]["ts"] for thread, events in threads.items()}
    first = min(starts.values())
    clocks = max(events[-1]["ts"] - starts[thread] for thread, events in threads.items()) * 1e3
    clock_mhz = clocks / kernel_us
    regions = [
        Region(
            block=(thread - 1) // warpgroups,
            warpgroup=(thread - 1) % warpgroups,
            name=name,
            start_us=starts[thread] - first + (begin - starts[thread]) * 1e3 / clock_mhz,
            end_us=starts[thread] - first + (end - starts[thread]) * 1e3 / clock_mhz,
        )
        for thread, events in threads.items()
        for name, begin, end in _spans(events)
        if name in REGIONS
    ]
    return regions, clock_mhz


def _spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(name, begin, end) of a thread's nested begins and ends."""
    spans, begun = [], []
    for event in events:
        if event["ph"] == "B":
            begun.append(event)
        else:
            begin = begun.pop()
            spans.append((begin["name"], begin["ts"], event["ts"]))
    return spans


def summary(regions: Sequence[Region], *, workers: int) -> dict[str, Any]:
    """What LaunchTrace says of all SMs; `workers`: warpgroups of a block that multiply or gather.
    Raises NoKernels for no regions.
    """
    if not regions:
        raise NoKernels("the launch wrote down no regions")
    blocks = sorted({region.block for region in regions})
    ends = [max(r.end_us for r in regions if r.block == block) for block in blocks]
    moments = (np.arange(MOMENTS) + 0.5) / MOMENTS * max(ends)
    multiplying = _busy(regions, MULTIPLYING, blocks, moments, workers)
    gathering = _busy(regions, GATHERING, blocks, moments, workers)
    multiplies, gathers = multiplying.any(axis=1), gathering.any(axis=1)
    shown = {blocks[i] for i in np.linspace(0, len(blocks) - 1, SHOWN_BLOCKS).astype(int)}
    return {
        "warpgroup_us": {
            name: sum(r.end_us - r.start_us for r in regions if r.name == name) for name in REGIONS
        },
        "shares": Shares(
            multiply=float(multiplies.mean()),
            gather=float(gathers.mean()),
            both=float((multiplies & gathers).mean()),
        ),
        "tail_us": max(ends) - min(ends),
        "activity": Activity(
            us=moments.tolist(),
            multiply=(multiplying.sum(axis=(0, 1)) / (len(blocks) * workers)).tolist(),
            gather=(gathering.sum(axis=(0, 1)) / (len(blocks) * workers)).tolist(),
        ),
        "shown": [region for region in regions if region.block in shown],
    }


def _busy(
    regions: Sequence[Region],
    names: Sequence[str],
    blocks: Sequence[int],
    moments: np.ndarray,
    workers: int,
) -> Bool[np.ndarray, "blocks warpgroups moments"]:
    """Whether a warpgroup of a block is in a region of these names, moment by moment."""
    busy = np.zeros((len(blocks), workers + 1, len(moments)), bool)
    places = {block: place for place, block in enumerate(blocks)}
    for region in regions:
        if region.name in names:
            during = (moments >= region.start_us) & (moments < region.end_us)
            busy[places[region.block], region.warpgroup] |= during
    return busy
