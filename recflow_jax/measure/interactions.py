"""The interaction alone, beside its floor; dots also together with the bags that they are of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import reference
from recflow_jax.backend import Backend
from recflow_jax.config import ITEM_BYTES, DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure.ceilings import measure_ceilings
from recflow_jax.measure.contenders import device_batches, precision_of
from recflow_jax.measure.kernels import (
    check_equal,
    compile_for,
    contestants,
    gather_bytes,
    times_of,
)
from recflow_jax.measure.offline import ROTATED_BYTES, input_sets
from recflow_jax.measure.timing import Timing, TimingOptions
from recflow_jax.model import CrossLayer, DeviceBatch, Ops, Params, interact

APART = "apart"


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
        name: partial(_interact, config, ops) for name, ops in contestants(backend).items()
    }
    results = []
    for samples in batches:
        inputs = _vector_sets(config, samples, seed)
        times = _compare_and_time(
            *(config, functions, cross, inputs, options),
            rounded=max(1, config.cross_layers),  # each layer rounds what the one before did
        )
        results.append(
            InteractionResult(
                interaction=config.interaction,
                batch=samples,
                floor_us=ceilings.floor_us(*interaction_work(config, samples)),
                **times,
            )
        )
        advance()
    return results


def bench_pooled_dot(
    config: DLRMConfig,
    params: Params,
    backend: Backend,
    batches: Sequence[int],
    *,
    ids: str,
    seed: int,
    options: TimingOptions | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[InteractionResult]:
    """Times bags and dot interaction together: the back end's operation for both, its gather and
    its dot one after the other (APART) and the reference's, after comparing what they give.

    Raises WrongKernel; ValueError for a model without bags or without dots.
    """
    if config.interaction != "dot" or not config.features:
        raise ValueError(f"model {config.name!r} has no bags whose dots are taken")
    layout = Layout.of(config)
    ceilings = measure_ceilings(config.compute_dtype, options)
    kernels = {"gather": backend.ops.pooled_gather, "interact": backend.ops.dot}
    apart = dataclasses.replace(backend.ops, pooled_dot=partial(reference.pooled_dot, **kernels))
    functions = {
        name: partial(_pooled_dot, config, layout, ops)
        for name, ops in ({APART: apart} | contestants(backend)).items()
    }
    results = []
    for samples in batches:
        sets = input_sets(config, samples, ids=ids, seed=seed)
        keys = jax.random.split(jax.random.key(seed), len(sets))
        shape = (samples, config.bottom_width)
        lefts = [jax.random.normal(key, shape, config.carried_dtype) for key in keys]
        inputs = list(zip(lefts, device_batches(layout, sets), strict=True))
        times = _compare_and_time(config, functions, params.groups, inputs, options)
        width = config.bottom_width + config.interaction_width
        moved = gather_bytes(config, layout, sets[0], width)
        _, flop = interaction_work(config, samples)
        results.append(
            InteractionResult(
                interaction="pooled dot",
                batch=samples,
                floor_us=ceilings.floor_us(moved, flop),
                **times,
            )
        )
        advance()
    return results


def _compare_and_time(
    config: DLRMConfig,
    functions: Mapping[str, Callable[..., Any]],
    weights: Any,
    inputs: Sequence[Any],
    options: TimingOptions | None,
    *,
    rounded: int = 1,
) -> dict[str, Any]:
    """What the functions take, as fields of a result; `rounded` as in `check_equal`."""
    compiled = compile_for(functions, dict.fromkeys(functions, weights), inputs)
    check_equal({name: c.first() for name, c in compiled.items()}, config.carried_dtype, rounded)
    return {"input_sets": len(inputs), **times_of(compiled, options)}


def _pooled_dot(
    config: DLRMConfig, layout: Layout, ops: Ops, groups: Any, given: tuple[Array, DeviceBatch]
) -> Array:
    left, batch = given
    bags = (groups, batch.rows, batch.offsets, batch.weights)
    out = ops.pooled_dot(left, *bags, slots=layout.slots, precision=precision_of(config))
    return out[:, : config.interaction_width]


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
