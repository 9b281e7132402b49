"""What it takes to bring a slice to the GPU: from plain memory, and from pinned memory, in which
the engine packs it.
"""

from dataclasses import dataclass

import jax
import numpy as np

from recflow_jax.config import DLRMConfig
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.pinned import pinned_zeros
from recflow_jax.engine.staging import PackedShape
from recflow_jax.layout import Layout
from recflow_jax.measure.timing import Timed, TimingOptions, launch_us, measure_side_by_side

SIZES = 4  # of slices: the largest, and each time half as large


@dataclass(frozen=True, kw_only=True)
class UploadResult:
    """Calls of an executable that takes a slice of so many samples as numpy and does next to
    nothing. call_us: of the host, for a call alone. each_us: from call to call, many queued. Both
    are by memory, "plain" and "pinned".
    """

    samples: int
    nbytes: int
    call_us: dict[str, float]
    each_us: dict[str, float]


def bench_uploads(config: DLRMConfig, options: TimingOptions) -> list[UploadResult]:
    """For the largest slices of an engine by its default options. None without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    results = []
    slices = EngineOptions(half_steps_from=None).slice_buckets(config)
    for bucket in slices[: -SIZES - 1 : -1]:
        shape = PackedShape.of(config, Layout.of(config), bucket)
        arrays = {"plain": np.zeros(shape.length, np.int32), "pinned": pinned_zeros(shape.length)}
        timed = _timed(arrays)
        each = measure_side_by_side(timed, options)
        results.append(
            UploadResult(
                samples=bucket.samples,
                nbytes=arrays["plain"].nbytes,
                call_us={memory: launch_us(one) for memory, one in timed.items()},
                each_us={memory: timing.median_us for memory, timing in each.items()},
            )
        )
    return results


def _timed(arrays: dict[str, np.ndarray]) -> dict[str, Timed]:
    (shape,) = {array.shape for array in arrays.values()}
    executable = jax.jit(lambda packed: packed[:1] + 1).lower(np.zeros(shape, np.int32)).compile()
    return {
        memory: Timed(launch=lambda _, array=array: executable(array))
        for memory, array in arrays.items()
    }
