"""Float8 layers for a float model: what its matmuls' inputs reach, on samples of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import reference
from pallas_kernels.float8 import FLOAT8, LARGEST
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch, Ops, Params, forward, to_device

RANDOM_SAMPLES = 256


def calibrate(config: DLRMConfig, params: Params, batch: JaggedBatch) -> DLRMConfig:
    """`config` with float8 layers for these parameters, which stay float32 until an engine or
    `forward` rounds them.

    The input scale of each matmul that is computed in float8 (see DLRMConfig) is the largest
    magnitude that its input has over the samples of `batch`, in float32, over e4m3's largest.
    Larger ones are cut at run time, so take samples like those to be served: a few hundred or more.
    Raises ValueError for an empty batch.
    """
    if not batch.samples:
        raise ValueError("calibrate: no samples")
    exact = config.with_dtypes(compute="float32")
    layout = Layout.of(exact)
    inputs = jax.device_put(to_device(layout, batch, ids=max(1, len(batch.values))))
    seen = enumerate(_largest_inputs(params, inputs, exact, layout))
    of_float8 = [float(value) for place, value in seen if place not in config.wide_matmuls]
    scales = tuple(value / LARGEST if value else 1.0 for value in of_float8)
    return config.with_dtypes(compute=FLOAT8).with_input_scales(scales)


@partial(jax.jit, static_argnums=(2, 3))
def _largest_inputs(
    params: Params, batch: DeviceBatch, config: DLRMConfig, layout: Layout
) -> list[Array]:
    """The largest magnitude of each matmul's input, in the order in which they run, the last one's
    apart.
    """
    largest: list[Array] = []

    def dense(x, kernel, bias, **options):
        largest.append(jnp.abs(x).max())
        return reference.dense(x, kernel, bias, **options)

    def widen(x0, x, low, up, bias, *, precision):
        largest.append(jnp.abs(low).max())
        return reference.widen(x0, x, low, up, bias, precision=precision)

    forward(
        *(params, batch),
        config=config,
        layout=layout,
        precision=lax.Precision.HIGHEST,
        ops=Ops(dense=dense, widen=widen),
    )
    return largest


def ready(config: DLRMConfig, params: Params, *, ids: str, seed: int) -> DLRMConfig:
    """`config` itself or, if its float8 layers are not calibrated, calibrated on random samples."""
    if len(config.input_scales) == config.float8_matmuls:
        return config
    return calibrate(config, params, generate(config, RANDOM_SAMPLES, seed=seed, ids=ids))
