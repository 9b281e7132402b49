"""One kind of work alone: the pooled gather beside the copy rate, dense layers beside jnp.dot."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from recflow_jax.backend import Backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import ITEM_BYTES, DLRMConfig, dense_shapes
from recflow_jax.layout import Layout
from recflow_jax.measure.ceilings import (
    copy_bytes_per_s,
    matmul_flop_per_s,
    work_of,
)
from recflow_jax.measure.contenders import (
    Job,
    compile_all,
    device_batches,
    launches,
    precision_of,
)
from recflow_jax.measure.offline import input_sets
from recflow_jax.measure.timing import (
    Timed,
    Timing,
    TimingOptions,
    device_us,
    measure_side_by_side,
)
from recflow_jax.model import (
    REFERENCE,
    DenseLayer,
    Ops,
    Params,
    pool,
)

KERNEL_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest difference of two kernels on one input, as a share of the largest value: sums are
float32 in both, so it is the rounding of the output and, in float32, the order of sums.
"""


MOST_PROFILED = 4  # inputs whose kernels' time is taken


class WrongKernel(RuntimeError):
    """A kernel that does not compute what its reference does."""


@dataclass(frozen=True, kw_only=True)
class GatherResult:
    """The pooled gather of one batch size. `row_bytes`: dim times item size of every id, and 4
    for a scale, which `row_bytes_per_s` counts; `moved_bytes` has whole sectors, ids, offsets and
    the output too. `device_us`: of the kernels alone.
    """

    batch: int
    input_sets: int
    ids: int
    row_bytes: int
    distinct_row_bytes: int
    moved_bytes: int
    copy_bytes_per_s: float
    timings: dict[str, Timing]
    device_us: dict[str, float | None]

    @property
    def row_bytes_per_s(self) -> dict[str, float]:
        """Useful bytes per second."""
        return {n: 1e6 * self.row_bytes / t.median_us for n, t in self.timings.items()}

    @property
    def floor_us(self) -> float:
        """All bytes at the copy rate of this run."""
        return 1e6 * self.moved_bytes / self.copy_bytes_per_s

    @property
    def device_over_floor(self) -> dict[str, float | None]:
        """The kernels' time as a multiple of the floor; below 1 where caches serve rows."""
        return {n: us and us / self.floor_us for n, us in self.device_us.items()}

    @property
    def device_row_bytes_per_s(self) -> dict[str, float | None]:
        """Useful bytes per second of the kernels' time."""
        return {n: us and 1e6 * self.row_bytes / us for n, us in self.device_us.items()}

    @property
    def share_of_copy(self) -> dict[str, float]:
        """Useful bytes per second as a share of the copy rate of this run."""
        return {n: rate / self.copy_bytes_per_s for n, rate in self.row_bytes_per_s.items()}


def bench_gather(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    batches: Sequence[int],
    *,
    ids: str,
    seed: int,
    options: TimingOptions | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[GatherResult]:
    """Times the back end's gather and the reference's, after comparing what they give.

    Raises WrongKernel.
    """
    layout = Layout.of(config)
    copy_rate = copy_bytes_per_s(options)
    gathers = {
        name: partial(pool, config=config, layout=layout, ops=ops)
        for name, ops in contestants(backend).items()
    }
    results = []
    for samples in batches:
        sets = input_sets(config, samples, ids=ids, seed=seed)
        inputs = device_batches(layout, sets)
        compiled = compile_for(gathers, dict.fromkeys(gathers, params.groups), inputs)
        check_equal({name: c.first() for name, c in compiled.items()}, config.carried_dtype)
        measured = times_of(compiled, options)
        results.append(_gather_result(config, layout, sets, copy_rate, measured))
        advance()
    return results


def contestants(backend: Backend) -> dict[str, Ops]:
    """The back end's operations and, where they are others, the reference's, as wide."""
    reference = dataclasses.replace(REFERENCE, dense_columns=backend.ops.dense_columns)
    ops = {backend.name: backend.ops}
    return ops if backend.ops == reference else {**ops, "reference": reference}


def compile_for(
    functions: Mapping[str, Callable[..., Any]],
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
) -> dict[str, "Contestant"]:
    """Each function with its own weights."""
    jobs = {name: Job(function, (weights[name], inputs[0])) for name, function in functions.items()}
    executables = compile_all(jobs)
    return {
        name: Contestant(executable=executable, weights=weights[name], inputs=inputs)
        for name, (executable, _) in executables.items()
    }


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A contestant: an executable of weights and an input, its weights, inputs to rotate among."""

    executable: Any
    weights: Any
    inputs: Sequence[Any]

    def first(self) -> Array:
        """What it gives for the first input."""
        return self.executable(self.weights, self.inputs[0])

    @property
    def timed(self) -> Timed:
        """Its calls, to be timed."""
        return launches(self.executable, (self.weights,), self.inputs)

    @property
    def device_us(self) -> float | None:
        """What its kernels take of a call, without launches and gaps; None but on a GPU."""
        return device_us(self.executable, [(self.weights, x) for x in self.inputs[:MOST_PROFILED]])


def times_of(
    compiled: Mapping[str, Contestant], options: TimingOptions | None
) -> dict[str, dict[str, Any]]:
    """Both kinds of time of all contestants, as fields of a result."""
    timed = {name: contestant.timed for name, contestant in compiled.items()}
    on_device = {name: contestant.device_us for name, contestant in compiled.items()}
    return {"timings": measure_side_by_side(timed, options), "device_us": on_device}


def check_equal(outputs: dict[str, Array], dtype: str, rounded: int = 1) -> None:
    """Raises WrongKernel unless all are within KERNEL_TOLERANCES of the last. rounded: how many
    times in a row the outputs were rounded to `dtype`.
    """
    reference = np.asarray([*outputs.values()][-1].astype(jnp.float32))
    scale = float(np.abs(reference).max()) or 1.0
    for name, output in outputs.items():
        error = float(np.abs(np.asarray(output.astype(jnp.float32)) - reference).max()) / scale
        if not error <= rounded * KERNEL_TOLERANCES[dtype]:
            raise WrongKernel(f"{name} is {error:.2g} of the largest value off the reference")


def _gather_result(
    config: DLRMConfig,
    layout: Layout,
    sets: Sequence[Any],
    copy_rate: float,
    measured: Mapping[str, Any],
) -> GatherResult:
    work = work_of(config, layout, sets[0])
    return GatherResult(
        batch=sets[0].samples,
        input_sets=len(sets),
        ids=len(sets[0].values),
        row_bytes=_useful_bytes(config, layout, sets[0]),
        distinct_row_bytes=work.distinct_row_bytes,
        moved_bytes=gather_bytes(config, layout, sets[0]),
        copy_bytes_per_s=copy_rate,
        **measured,
    )


def gather_bytes(
    config: DLRMConfig, layout: Layout, batch: JaggedBatch, width: int | None = None
) -> int:
    """What a gather moves at least: rows in whole sectors, ids, offsets, weights, and for each
    sample `width` items: the pooled ones, if not given.
    """
    work = work_of(config, layout, batch)
    width = config.pooled_width if width is None else width
    items_bytes = batch.samples * width * ITEM_BYTES[config.carried_dtype]
    return work.row_bytes + work.input_bytes - batch.dense.nbytes + items_bytes


def _useful_bytes(config: DLRMConfig, layout: Layout, batch: Any) -> int:
    per_slot = np.diff(layout.slot_offsets(batch)).reshape(batch.samples, -1).sum(axis=0)
    row_bytes = [layout.row_bytes[slot.group] for slot in layout.slots]
    return int(np.dot(per_slot, row_bytes))


@dataclass(frozen=True, kw_only=True)
class DenseResult:
    """One layer with its activation at one batch size, beside jnp.dot on large square matrices."""

    layer: str
    batch: int
    inputs: int
    outputs: int
    matmul_flop_per_s: float
    timings: dict[str, Timing]
    device_us: dict[str, float | None]

    @property
    def flop_per_s(self) -> dict[str, float]:
        """Floating-point operations per second."""
        flop = 2 * self.batch * self.inputs * self.outputs
        return {name: 1e6 * flop / timing.median_us for name, timing in self.timings.items()}


def bench_dense(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    batches: Sequence[int],
    *,
    options: TimingOptions | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[DenseResult]:
    """Times each MLP layer (but the last, whose output is a score) with the back end's `dense` and
    the reference's, after comparing what they give. Raises WrongKernel.
    """
    rate = matmul_flop_per_s(config.compute_dtype, options)
    prepared = {
        name: Backend(name=backend.name, reason="", ops=ops).prepare(params, config)
        for name, ops in contestants(backend).items()
    }
    results = []
    for samples in batches:
        for layer in mlp_layers(config):
            measured = _time_layer(config, backend, prepared, layer, samples, options)
            inputs, outputs = layer.shape
            results.append(
                DenseResult(
                    layer=layer.name,
                    batch=samples,
                    inputs=inputs,
                    outputs=outputs,
                    matmul_flop_per_s=rate,
                    **measured,
                )
            )
        advance()
    return results


@dataclass(frozen=True, kw_only=True)
class ModelLayer:
    """An MLP layer of a model, by where its parameters are; shape: (inputs, outputs)."""

    part: str
    index: int
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.part}.{self.index}"

    def of(self, params: Params) -> DenseLayer:
        return getattr(params, self.part)[self.index]


def mlp_layers(config: DLRMConfig) -> list[ModelLayer]:
    """All MLP layers but the last, whose output is a score."""
    bottom, top = dense_shapes(config)
    named = [*(("bottom", i, s) for i, s in enumerate(bottom))]
    named += [("top", i, s) for i, s in enumerate(top[:-1])]
    return [ModelLayer(part=part, index=index, shape=shape) for part, index, shape in named]


def _time_layer(
    config: DLRMConfig,
    backend: Backend,
    prepared: Mapping[str, Params],
    layer: ModelLayer,
    samples: int,
    options: TimingOptions | None,
) -> dict[str, dict[str, Any]]:
    x = jax.random.normal(jax.random.key(0), (samples, layer.shape[0]), jnp.float32)
    x = x.astype(config.carried_dtype)
    functions = {
        name: partial(_run_layer, config, ops) for name, ops in contestants(backend).items()
    }
    weights = {name: layer.of(params) for name, params in prepared.items()}
    compiled = compile_for(functions, weights, [x])
    check_equal({name: c.first() for name, c in compiled.items()}, config.carried_dtype)
    return times_of(compiled, options)


def _run_layer(config: DLRMConfig, ops: Ops, layer: DenseLayer, x: Array) -> Array:
    return ops.dense(
        x,
        layer.kernel,
        layer.bias,
        activation=config.activation,
        precision=precision_of(config),
    )
