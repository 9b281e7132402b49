"""One kind of work alone: the pooled gather beside the copy rate, dense layers beside jnp.dot, the
interaction beside its floor.
"""

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
from recflow_jax.config import ITEM_BYTES, DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure.ceilings import (
    copy_bytes_per_s,
    matmul_flop_per_s,
    measure_ceilings,
    work_of,
)
from recflow_jax.measure.contenders import (
    Job,
    compile_all,
    device_batches,
    launches,
    precision_of,
)
from recflow_jax.measure.offline import ROTATED_BYTES, input_sets
from recflow_jax.measure.timing import (
    Timed,
    Timing,
    TimingOptions,
    device_us,
    measure_side_by_side,
)
from recflow_jax.model import (
    REFERENCE,
    CrossLayer,
    DenseLayer,
    Ops,
    Params,
    dense_shapes,
    interact,
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
        for name, ops in _contestants(backend).items()
    }
    results = []
    for samples in batches:
        sets = input_sets(config, samples, ids=ids, seed=seed)
        inputs = device_batches(layout, sets)
        compiled = _compiled(gathers, dict.fromkeys(gathers, params.groups), inputs)
        _check_equal({name: c.first() for name, c in compiled.items()}, config.carried_dtype)
        measured = _measured(compiled, options)
        results.append(_gather_result(config, layout, sets, copy_rate, measured))
        advance()
    return results


def _contestants(backend: Backend) -> dict[str, Ops]:
    """The back end's operations and, where they are others, the reference's, as wide."""
    reference = dataclasses.replace(REFERENCE, dense_columns=backend.ops.dense_columns)
    ops = {backend.name: backend.ops}
    return ops if backend.ops == reference else {**ops, "reference": reference}


def _compiled(
    functions: Mapping[str, Callable[..., Any]],
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
) -> dict[str, "_Compiled"]:
    """Each function with its own weights."""
    jobs = {name: Job(function, (weights[name], inputs[0])) for name, function in functions.items()}
    executables = compile_all(jobs)
    return {
        name: _Compiled(executable=executable, weights=weights[name], inputs=inputs)
        for name, (executable, _) in executables.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Compiled:
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


def _measured(
    compiled: Mapping[str, _Compiled], options: TimingOptions | None
) -> dict[str, dict[str, Any]]:
    """Both kinds of time of all contestants, as fields of a result."""
    timed = {name: contestant.timed for name, contestant in compiled.items()}
    on_device = {name: contestant.device_us for name, contestant in compiled.items()}
    return {"timings": measure_side_by_side(timed, options), "device_us": on_device}


def _check_equal(outputs: dict[str, Array], dtype: str, rounded: int = 1) -> None:
    """rounded: how many times in a row the outputs were rounded to `dtype`."""
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


def gather_bytes(config: DLRMConfig, layout: Layout, batch: JaggedBatch) -> int:
    """What a gather moves at least: rows in whole sectors, ids, offsets, weights, the output."""
    work = work_of(config, layout, batch)
    output_bytes = batch.samples * config.pooled_width * ITEM_BYTES[config.carried_dtype]
    return work.row_bytes + work.input_bytes - batch.dense.nbytes + output_bytes


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
        for name, ops in _contestants(backend).items()
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
        name: partial(_run_layer, config, ops) for name, ops in _contestants(backend).items()
    }
    weights = {name: layer.of(params) for name, params in prepared.items()}
    compiled = _compiled(functions, weights, [x])
    _check_equal({name: c.first() for name, c in compiled.items()}, config.carried_dtype)
    return _measured(compiled, options)


def _run_layer(config: DLRMConfig, ops: Ops, layer: DenseLayer, x: Array) -> Array:
    return ops.dense(
        x,
        layer.kernel,
        layer.bias,
        activation=config.activation,
        precision=precision_of(config),
    )


@dataclass(frozen=True, kw_only=True)
class InteractionResult:
    """A model's interaction at one batch size. `floor_us`: what its first input, last output and
    weights take at the copy rate, or its FLOP at the matmul rate, whichever is longer.
    """

    interaction: str
    batch: int
    input_sets: int
    floor_us: float
    timings: dict[str, Timing]
    device_us: dict[str, float | None]

    @property
    def share_of_floor(self) -> dict[str, float]:
        """The floor as a share of each time."""
        return {name: self.floor_us / t.median_us for name, t in self.timings.items()}


def bench_interaction(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    batches: Sequence[int],
    *,
    seed: int,
    options: TimingOptions | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[InteractionResult]:
    """Times the dot interaction or the cross layers on random vectors with the back end's
    operations and the reference's, after comparing what they give.

    Raises WrongKernel; ValueError for a model that concatenates: nothing is computed there.
    """
    if config.interaction == "concat":
        raise ValueError(f"model {config.name!r} concatenates: it has no interaction to time")
    ceilings = measure_ceilings(config.compute_dtype, options)
    cross = backend.prepare(params, config).cross
    functions = {
        name: partial(_interact, config, ops) for name, ops in _contestants(backend).items()
    }
    results = []
    for samples in batches:
        inputs = _vector_sets(config, samples, seed)
        compiled = _compiled(functions, dict.fromkeys(functions, cross), inputs)
        rounded = max(1, config.cross_layers)  # each layer rounds what the one before has rounded
        _check_equal(
            {name: c.first() for name, c in compiled.items()}, config.carried_dtype, rounded
        )
        moved, flop = interaction_work(config, samples)
        results.append(
            InteractionResult(
                interaction=config.interaction,
                batch=samples,
                input_sets=len(inputs),
                floor_us=1e6
                * max(moved / ceilings.copy_bytes_per_s, flop / ceilings.matmul_flop_per_s),
                **_measured(compiled, options),
            )
        )
        advance()
    return results


def _interact(config: DLRMConfig, ops: Ops, cross: tuple[CrossLayer, ...], vectors: Array) -> Array:
    out = interact(cross, vectors, config=config, precision=precision_of(config), ops=ops)
    return out[:, : config.interaction_width]


def _vector_sets(config: DLRMConfig, samples: int, seed: int) -> list[Array]:
    """Random [bottom | pooled] vectors, as many sets as outgrow every cache."""
    width = config.bottom_width + config.pooled_width
    set_bytes = samples * width * ITEM_BYTES[config.carried_dtype]
    keys = jax.random.split(jax.random.key(seed), min(32, max(4, ROTATED_BYTES // set_bytes)))
    return [jax.random.normal(key, (samples, width), config.carried_dtype) for key in keys]


def interaction_work(config: DLRMConfig, samples: int) -> tuple[int, int]:
    """Bytes that must move (the first input, the last output, the weights), and FLOP."""
    width = config.bottom_width + config.pooled_width
    weights = 2 * config.cross_layers * width * config.cross_rank
    items = samples * (width + config.interaction_width) + weights
    if config.interaction == "dot":
        flop = samples * (config.dot_vectors - 1) * width
    else:
        flop = 2 * samples * weights
    return items * ITEM_BYTES[config.carried_dtype], flop
