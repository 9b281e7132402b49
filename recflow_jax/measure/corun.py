"""MLP layers with embedding work of other requests in the same launch, beside both one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.corun import CONFIGS, CorunConfig, dense_with_gather
from pallas_kernels.embedding import pooled_gather
from pallas_kernels.mlp import DTYPES, dense
from pallas_kernels.slots import width
from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure.ceilings import Ceilings, measure_ceilings
from recflow_jax.measure.contenders import device_batches
from recflow_jax.measure.kernels import MOST_PROFILED, WrongKernel, gather_bytes, mlp_layers
from recflow_jax.measure.offline import input_sets
from recflow_jax.measure.timing import TimingOptions, device_us
from recflow_jax.model import DeviceBatch, Params, pool


@dataclass(frozen=True, kw_only=True)
class CorunResult:
    """A layer of `batch` samples and the bags of `slice_samples` others: kernel microseconds.

    layer_us, gather_us: the back end's own, one by one. corun_us: of each config. floor_us: all
    bytes of both at the copy rate, or all FLOP at the matmul rate, whichever is longer.
    """

    layer: str
    batch: int
    inputs: int
    outputs: int
    slice_samples: int
    layer_us: float
    gather_us: float
    corun_us: dict[str, float]
    floor_us: float

    @property
    def best(self) -> str:
        """The fastest config."""
        return min(self.corun_us, key=lambda name: self.corun_us[name])

    @property
    def best_us(self) -> float:
        """What the fastest config takes."""
        return self.corun_us[self.best]

    @property
    def sum_us(self) -> float:
        """Layer and gather, one after the other."""
        return self.layer_us + self.gather_us

    @property
    def max_us(self) -> float:
        """The longer one of layer and gather."""
        return max(self.layer_us, self.gather_us)

    @property
    def best_over_sum(self) -> float:
        """Below 1 where the co-run pays."""
        return self.best_us / self.sum_us


def bench_corun(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    batches: Sequence[int],
    *,
    ids: str,
    seed: int,
    options: TimingOptions | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[CorunResult]:
    """Times every MLP layer with slices of as many samples, half of that and a quarter, after
    comparing bits with those of the serial kernels of the same configs, call after call.

    Raises WrongKernel; ValueError where the co-run kernels do not run, and for models without
    features or with layers that are not 16-bit floats.
    """
    if backend.name != "mosaic":
        raise ValueError(f"co-run kernels need back end mosaic: this is {backend.name}")
    check_co_runs(config)
    ceilings = measure_ceilings(config.compute_dtype, options)
    prepared = backend.prepare(params, config)
    results = []
    for samples in batches:
        for slice_samples in [samples // part for part in (1, 2, 4) if samples >= part]:
            slices = _Slices(config, params, backend, slice_samples, ids=ids, seed=seed)
            for layer in mlp_layers(config):
                weights = layer.of(prepared)
                shape = (samples, layer.shape[0])
                x = jax.random.normal(jax.random.key(seed), shape).astype(config.carried_dtype)
                operands = (x, weights.kernel, weights.bias)
                serial = partial(backend.ops.dense, activation=config.activation, precision=None)
                results.append(
                    CorunResult(
                        layer=layer.name,
                        batch=samples,
                        inputs=layer.shape[0],
                        outputs=layer.shape[1],
                        slice_samples=slice_samples,
                        layer_us=_kernel_us(jax.jit(serial), [operands]),
                        gather_us=slices.gather_us,
                        corun_us={
                            name: slices.beside(operands, config.activation, corun)
                            for name, corun in CONFIGS.items()
                        },
                        floor_us=_floor_us(operands, slices.moved_bytes, ceilings),
                    )
                )
        advance()
    return results


def check_co_runs(config: DLRMConfig) -> None:
    """Raises ValueError for a model whose layers take no bags along."""
    if config.compute_dtype not in DTYPES or not config.features:
        raise ValueError(f"model {config.name!r}: co-runs are of 16-bit layers and of features")


class _Slices:
    """Embedding work of some samples: several drawings of it, on the device."""

    def __init__(
        self,
        config: DLRMConfig,
        params: Params,
        backend: Backend,
        samples: int,
        *,
        ids: str,
        seed: int,
    ):
        layout = Layout.of(config)
        sets = input_sets(config, samples, ids=ids, seed=seed)[:MOST_PROFILED]
        self.batches = device_batches(layout, sets)
        self.groups = params.groups
        self.slots, self.out_dtype = layout.slots, config.carried_dtype
        gather = jax.jit(partial(pool, config=config, layout=layout, ops=backend.ops))
        self.gather_us = _kernel_us(gather, [(self.groups, batch) for batch in self.batches])
        self.moved_bytes = gather_bytes(config, layout, sets[0])
        # Compiled once for all layers.
        options = {"slots": self.slots, "out_dtype": self.out_dtype}
        self.serial = {
            corun.gather: jax.jit(partial(pooled_gather, config=corun.gather, **options))
            for corun in CONFIGS.values()
        }

    def _bags(self, batch: DeviceBatch) -> tuple[Any, ...]:
        return self.groups, batch.rows, batch.offsets, batch.weights

    def beside(self, operands: tuple[Array, ...], activation: str, config: CorunConfig) -> float:
        """Microseconds of a layer with this work in its launch. Raises WrongKernel."""
        shape = len(self.batches[0].dense), width(self.slots)

        @jax.jit
        def co_run(*operands: Any) -> Any:
            vectors = lax.empty(shape, jnp.dtype(self.out_dtype))
            operands = (*operands[:3], vectors, jnp.int32(0), *operands[3:])
            options = {"activation": activation, "slots": self.slots, "config": config}
            return dense_with_gather(*operands, left=0, **options)

        layer = jax.jit(partial(dense, activation=activation, config=config.mlp))(*operands)
        gather = self.serial[config.gather]
        calls = [(*operands, *self._bags(batch)) for batch in self.batches]
        for call, batch in zip(calls, self.batches, strict=True):
            for ours, serial in zip(
                co_run(*call), (layer, gather(*self._bags(batch))), strict=True
            ):
                if not bool(jnp.array_equal(ours, serial)):
                    raise WrongKernel(f"co-run {config}: other bits than the serial kernels'")
        return _kernel_us(co_run, calls)


def _kernel_us(executable: Any, calls: Sequence[tuple[Any, ...]]) -> float:
    taken = device_us(executable, calls)
    if taken is None:
        raise WrongKernel("no kernel was seen on the device")
    return taken


def _floor_us(operands: tuple[Array, ...], moved_bytes: int, ceilings: Ceilings) -> float:
    x, kernel, bias = operands
    out_bytes = len(x) * len(bias) * x.dtype.itemsize
    moved = moved_bytes + x.nbytes + kernel.nbytes + out_bytes
    flop = 2 * int(np.prod(x.shape)) * len(bias)
    return ceilings.floor_us(moved, flop)
