"""A process of which `hbm` has launches counted: the DNN of a batch, a boundary, and a co-run.

python -m recflow_jax.measure.counted MODEL.toml BATCH RIDE IDS SEED
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from recflow_jax.backend import kernels_to
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.offline import input_sets
from recflow_jax.measure.timeline import traced_pipeline
from recflow_jax.params import init_params

boundary = jax.jit(lax.cbrt)  # nothing of a model computes it


def main(arguments: Sequence[str]) -> None:
    """Launches everything once before it counts. Raises BackendError, ValueError."""
    model, batch, ride, ids, seed = arguments
    backend, config = kernels_to("trace"), DLRMConfig.load(model)
    params = init_params(config, seed=int(seed))
    sets = input_sets(config, int(batch), ids=ids, seed=int(seed))
    pipeline = traced_pipeline(config, params, backend, sets, [ride])
    co_run, ones = pipeline.contenders()[ride].timed.launch, jnp.ones(1024)

    def launch_all(first: int) -> None:
        jax.block_until_ready(pipeline.run_dnn(first))
        jax.block_until_ready(boundary(ones))
        jax.block_until_ready(co_run(first))

    launch_all(0)
    with counted(ctypes.CDLL("libcuda.so.1")):
        launch_all(1)


@contextmanager
def counted(driver: Any) -> Iterator[None]:
    """Tells a profiler, by the CUDA driver's library, when to count. Raises OSError."""
    context = ctypes.c_void_p()
    _checked(driver.cuInit(0), "cuInit")
    _checked(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
    _checked(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _checked(driver.cuProfilerStart(), "cuProfilerStart")
    try:
        yield
    finally:
        _checked(driver.cuProfilerStop(), "cuProfilerStop")


def _checked(status: int, function: str) -> None:
    if status:
        raise OSError(f"{function} of the CUDA driver gives {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
