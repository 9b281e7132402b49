"""Timelines are what the streams of a GPU had, in order, of the last batches alone."""

from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from recflow_jax.backend import BackendError, kernels_to
from recflow_jax.measure import timeline
from recflow_jax.measure.timeline import LEAD, Kernel, NoKernels, Timeline, kernels_in, record
from recflow_jax.measure.timing import Timed


def event(name: str, start_ns: float, duration_ns: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, start_ns=start_ns, duration_ns=duration_ns)


PROFILE = SimpleNamespace(
    planes=[
        SimpleNamespace(
            name="/host:CPU",
            lines=[SimpleNamespace(name="Stream", events=[event("python", 0, 9)])],
        ),
        SimpleNamespace(
            name="/device:GPU:0",
            lines=[
                SimpleNamespace(name="XLA Modules", events=[event("jit_run", 5000, 9000)]),
                SimpleNamespace(
                    name="Stream #13(Compute)",
                    events=[event("pooled_gather_kernel", 5000, 1500), event("MemcpyD2D", 7000, 1)],
                ),
                SimpleNamespace(
                    name="Stream #14(Compute)", events=[event("mlp_layer_kernel", 6000, 2000)]
                ),
            ],
        ),
    ]
)


def test_kernels_are_those_of_the_streams_of_gpus() -> None:
    assert [*kernels_in(PROFILE)] == [
        Kernel(name="pooled_gather_kernel", kind="gather", start_us=5.0, duration_us=1.5),
        Kernel(name="MemcpyD2D", kind="other", start_us=7.0, duration_us=0.001),
        Kernel(name="mlp_layer_kernel", kind="dnn", start_us=6.0, duration_us=2.0),
    ]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("mlp_layer_with_gather_mosaic_gpu_kernel", "both"),
        ("mlp_layer_mosaic_gpu_kernel", "dnn"),
        ("cross_widen_mosaic_gpu_kernel", "dnn"),
        ("nvjet_tst_128x64_64x8", "dnn"),
        ("pooled_gather_mosaic_gpu_kernel", "gather"),
        ("loop_dynamic_update_slice_fusion", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, kind: str) -> None:
    assert timeline.kind_of(kernel) == kind


def test_a_timeline_has_the_last_batches_from_zero_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    def two_kernels_each(action: Callable[[], None]) -> list[Kernel]:
        launched.clear()
        action()
        starts = [10.0 * place for place in range(2 * len(launched))]
        return [Kernel(name="k", kind="dnn", start_us=us, duration_us=4.0) for us in starts]

    def launch(index: int) -> None:
        launched.append(index)

    monkeypatch.setattr(timeline, "kernels_during", two_kernels_each)
    found = record("serial", Timed(launch=launch), batches=3)
    assert launched == [*range(LEAD + 3)]
    assert [kernel.start_us for kernel in found.kernels] == [0, 10, 20, 30, 40, 50]
    assert found.us_per_batch == 54 / 3


def test_a_batch_ends_with_the_kernel_that_ends_last() -> None:
    kernels = [
        Kernel(name="long", kind="dnn", start_us=2.0, duration_us=10.0),
        Kernel(name="short", kind="gather", start_us=4.0, duration_us=1.0),
    ]
    assert Timeline(name="t", batches=2, kernels=kernels).us_per_batch == 5.0


def test_a_profile_without_kernels_is_an_error() -> None:
    """JAX's profiler runs; a CPU has no stream."""
    with pytest.raises(NoKernels, match="saw no kernel on the device"):
        timeline.kernels_during(lambda: print(jnp.ones(3)))


def test_nothing_is_traced_where_no_kernels_run() -> None:
    with pytest.raises(BackendError, match="nothing to trace on this device: cpu is no GPU"):
        kernels_to("trace")
