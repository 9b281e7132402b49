"""When each kernel of a GPU starts and ends: batches in a row, as JAX's profiler saw them.

It needs executables that are launched kernel by kernel (`Backend.graphs`): of a CUDA graph a
profiler may show the graph alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax

from pallas_kernels.corun import KERNEL_NAME
from recflow_jax.backend import Backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.contenders import Lineup
from recflow_jax.measure.overlap import BatchPipeline
from recflow_jax.measure.timing import Timed
from recflow_jax.model import Params

Kind = Literal["gather", "dnn", "both", "other"]

LEAD = 3  # batches before those that are shown: the device's queue fills up
DEVICE, STREAM = "/device:GPU", "Stream"
GATHERS = ("pooled_gather",)
MATMULS = ("mlp_layer", "cross_widen", "dot", "gemm", "gemv", "nvjet", "cutlass", "cublas")


class NoKernels(RuntimeError):
    """The profiler saw no kernel."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch, or a copy; `start_us` counts from the first one of its timeline."""

    name: str
    kind: Kind
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Kernels of so many batches in a row, in the order of their starts."""

    name: str
    batches: int
    kernels: Sequence[Kernel]

    @property
    def us_per_batch(self) -> float:
        """From the start of the first kernel to the end of the last."""
        start = min(kernel.start_us for kernel in self.kernels)
        return (max(kernel.end_us for kernel in self.kernels) - start) / self.batches


def traced_pipeline(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    sets: Sequence[JaggedBatch],
    rides: Sequence[str],
) -> BatchPipeline:
    """The engine's executables for such batches, launched kernel by kernel. Raises ValueError for
    rides that are not there.
    """
    lineup = Lineup(config, params, replace(backend, graphs=False), ())
    return BatchPipeline(lineup, params, sets, rides)


def record(name: str, timed: Timed, *, batches: int) -> Timeline:
    """The kernels of the last so many of `timed`'s launches in a row. Raises NoKernels."""
    timed.wait(timed.launch(0))

    def launch_all() -> None:
        launched = [timed.launch(i) for i in range(LEAD + batches)]
        timed.wait(launched[-1])

    kernels = kernels_during(launch_all)
    shown = kernels[-max(1, len(kernels) * batches // (LEAD + batches)) :]
    return Timeline(name=name, batches=batches, kernels=_from_zero(shown))


def kernels_during(action: Callable[[], None]) -> list[Kernel]:
    """What ran on the GPU during `action`, which waits for it. Raises NoKernels."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the launches down
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            action()
        files = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        seen = [k for file in files for k in kernels_in(jax.profiler.ProfileData.from_file(file))]
    if not seen:
        raise NoKernels("JAX's profiler saw no kernel on the device")
    return _from_zero(sorted(seen, key=lambda kernel: kernel.start_us))


def kernels_in(profile: Any) -> Iterator[Kernel]:
    """The kernels and copies of all streams of GPUs, `start_us` by the profile's clock."""
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith(DEVICE) else ():
            for event in line.events if line.name.startswith(STREAM) else ():
                yield Kernel(
                    name=event.name,
                    kind=kind_of(event.name),
                    start_us=event.start_ns / 1e3,
                    duration_us=event.duration_ns / 1e3,
                )


def kind_of(kernel: str) -> Kind:
    """What a kernel of this name does."""
    if KERNEL_NAME in kernel:
        return "both"
    if any(part in kernel for part in GATHERS):
        return "gather"
    return "dnn" if any(part in kernel.lower() for part in MATMULS) else "other"


def _from_zero(kernels: Sequence[Kernel]) -> list[Kernel]:
    start = kernels[0].start_us
    return [replace(kernel, start_us=kernel.start_us - start) for kernel in kernels]
