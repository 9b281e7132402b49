"""Dense layers with every tile configuration that could be fastest, and with XLA's matmul; and
layers in one launch beside one launch for each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mlp, mlp_chain, reference
from pallas_kernels.mlp import CONFIGS, PADDED_TO, MlpConfig, estimated_cost
from recflow_jax.config import DLRMConfig, dense_shapes
from recflow_jax.measure.timing import device_us
from recflow_jax.model import REFERENCE, DenseLayer, Ops, scores
from recflow_jax.model import mlp as layers_of
from recflow_jax.tiles import XLA, Chain, DenseShape

SPLITS = (1, 2, 4, 8)
LEAST_STEPS = 4  # of k for each split
MARGIN = 1.4
COMPILE_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class TriedShape:
    """Microseconds of device time of all that was tried for one shape, and the fastest config."""

    shape: DenseShape
    tried_us: dict[str, float]
    config: MlpConfig


def layer_shapes(configs: Iterable[DLRMConfig], batches: Sequence[int]) -> list[DenseShape]:
    """The layers of these models, scores apart, at these batch sizes."""
    layers: set[tuple[int, int]] = set()
    for config in configs:
        bottom, top = dense_shapes(config)
        layers |= {*bottom, *top[:-1]} | _narrowing(config)
    padded = {(-(-k // PADDED_TO) * PADDED_TO, -(-n // PADDED_TO) * PADDED_TO) for k, n in layers}
    return sorted(DenseShape(m=m, k=k, n=n) for k, n in padded for m in batches)


def _narrowing(config: DLRMConfig) -> set[tuple[int, int]]:
    return {(config.interaction_width, config.cross_rank)} if config.cross_layers else set()


def chains_of(configs: Iterable[DLRMConfig], batches: Sequence[int]) -> list[Chain]:
    """What could run in one launch of these models at these batch sizes: the bottom MLP and the end
    of the top MLP with its scores, or as much of their ends as there is room for.
    """
    found: set[Chain] = set()
    for config in configs:
        bottom, top = dense_shapes(config)
        for layers, outputs in ((bottom, 0), (top[:-1], config.outputs)):
            chain = _longest(layers, outputs)
            if chain is not None and chain.launches > 1:
                found |= {replace(chain, m=samples) for samples in batches}
    return sorted(found)


def _longest(layers: Sequence[tuple[int, int]], scores: int) -> Chain | None:
    for first in range(len(layers)):
        chain = Chain.of(1, layers[first:], scores)
        if mlp_chain.takes(chain.widths, scores):
            return chain
    return None


def try_chains(
    chains: Sequence[Chain], ops: Ops, advance: Callable[[], None] = lambda: None
) -> Iterator[tuple[Chain, float, float]]:
    """Device microseconds of each in one launch, and in one for each layer, in bfloat16 with relu;
    nothing where no kernels are seen. Compiled as in `try_shapes`.
    """
    apart = replace(ops, chain_from=REFERENCE.chain_from)
    together = replace(ops, chain_from=lambda *_: 0)
    with ThreadPoolExecutor(COMPILE_THREADS) as threads:
        compiled = threads.map(partial(_compile_chain, together), chains)
        for chain, in_one in zip(chains, compiled, strict=True):
            operands = _chain_operands(chain)
            one_us = device_us(in_one, [operands])
            each_us = device_us(_compile_chain(apart, chain), [operands])
            if one_us is not None and each_us is not None:
                yield chain, one_us, each_us
            advance()


def _compile_chain(ops: Ops, chain: Chain) -> Any:
    run = partial(scores if chain.scores else layers_of, activation="relu", ops=ops)
    shapes = jax.eval_shape(partial(_chain_operands, chain))
    return jax.jit(run).lower(*shapes).compile()


def _chain_operands(chain: Chain) -> tuple[tuple[DenseLayer, ...], Any]:
    widths = [*chain.widths, *([chain.scores] if chain.scores else [])]
    keys = jax.random.split(jax.random.key(0), len(widths))
    layers = tuple(
        DenseLayer(
            kernel=jax.random.normal(key, shape, jnp.bfloat16),
            bias=jax.random.normal(key, shape[1:]),
        )
        for key, shape in zip(keys, pairwise(widths), strict=False)
    )
    return layers, jax.random.normal(keys[-1], (chain.m, widths[0]), jnp.bfloat16)


def candidates(shape: DenseShape) -> list[MlpConfig]:
    """Configurations that could be the fastest for a shape: those whose waves, areas and steps of k
    come to no more than `MARGIN` times the least.
    """
    fitting = [replace(base, splits=s) for base in CONFIGS for s in SPLITS if _fits(base, s, shape)]
    costs = {config: estimated_cost(config, shape.m, shape.n, shape.k) for config in fitting}
    least = min(costs.values())
    return [config for config, cost in costs.items() if cost <= MARGIN * least]


def _fits(config: MlpConfig, splits: int, shape: DenseShape) -> bool:
    deep_enough = splits == 1 or shape.k // config.block_k >= LEAST_STEPS * splits
    return shape.n % config.block_n == 0 and deep_enough


def name_of(config: MlpConfig) -> str:
    """A configuration in short."""
    split = f"/{config.splits}" if config.splits > 1 else ""
    return f"{config.block_m}x{config.block_n}x{config.block_k}{split}"


def try_shapes(
    shapes: Sequence[DenseShape], advance: Callable[[], None] = lambda: None
) -> Iterator[TriedShape]:
    """Times each shape in bfloat16, with relu. Kernels are compiled side by side; XLA, which times
    its own candidates on the device while it compiles, alone.
    """
    with ThreadPoolExecutor(COMPILE_THREADS) as threads:
        for shape in shapes:
            operands = _operands(shape)
            configs = {name_of(config): config for config in candidates(shape)}
            compiled = threads.map(partial(_compile, operands), configs.values())
            executables = dict(zip(configs, compiled, strict=True))
            executables[XLA] = _compile(operands, None)
            tried = {name: device_us(run, [operands]) for name, run in executables.items()}
            measured = {name: us for name, us in tried.items() if us is not None}
            fastest = min(measured.keys() & configs.keys(), key=lambda name: measured[name])
            yield TriedShape(shape=shape, tried_us=measured, config=configs[fastest])
            advance()


def _operands(shape: DenseShape) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.m, shape.k), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (shape.k, shape.n), jnp.bfloat16)
    return x, kernel, jax.random.normal(keys[2], (shape.n,))


def _compile(operands: tuple[Any, ...], config: MlpConfig | None) -> Any:
    layer = reference.dense if config is None else partial(mlp.dense, config=config)
    return jax.jit(partial(layer, activation="relu")).lower(*operands).compile()
