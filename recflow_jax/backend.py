"""Which kernels run on this device, and why.

`mosaic`: the Pallas kernels, on Hopper GPUs (they use wgmma, which later GPUs do not have). `xla`:
the reference formulations compiled by XLA, anywhere, the CPU included. `auto` takes mosaic where it
runs.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np

from pallas_kernels import (
    corun,
    cross,
    embedding,
    interaction,
    mlp,
    mlp_chain,
    pooled_dot,
    reference,
)
from pallas_kernels.float8 import FLOAT8, Float8Kernel
from pallas_kernels.slots import Slot
from recflow_jax.config import DLRMConfig
from recflow_jax.lowered import lowered_once
from recflow_jax.model import REFERENCE, DenseLayer, Ops, Params, with_compute_dtype
from recflow_jax.tiles import DenseShape, TileTable, table_of

BackendName = Literal["xla", "mosaic"]
HOPPER = "9.0"
MOST_LAUNCHES = 2**31 - 1  # of an executable: from so many on it would become a graph
MOST_CONSTANT_BYTES = 64 * 2**20  # each executable has its own copy of its constants


class BackendError(RuntimeError):
    """A back end that cannot run on this device; the message says which can."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The operations of one back end. `reason` says why it was chosen. graphs: whether the kernels'
    executables become CUDA graphs, of which profilers may show less than of launches.
    """

    name: BackendName
    reason: str
    ops: Ops
    graphs: bool = True

    @property
    def compiler_options(self) -> dict[str, Any]:
        """For XLA: with the kernels, a whole executable becomes one CUDA graph, however short,
        since its launches one by one take the host longer than the device.
        """
        if self.name != "mosaic":
            return {}
        return {"xla_gpu_graph_min_graph_size": 1 if self.graphs else MOST_LAUNCHES}

    @property
    def compile_workers(self) -> int:
        """How many executables to compile at a time. On a GPU, XLA times its matmuls while it
        compiles: two at once would choose by noise. The kernels' tiles are chosen already.
        """
        by_timing = self.name == "xla" and jax.default_backend() == "gpu"
        return 1 if by_timing else os.cpu_count() or 1

    def bind(
        self, function: Callable[..., Any], weights: Any
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """`function(weights, ...)` as a function to be compiled, and its first arguments.

        Each argument of a call costs the host about two microseconds, so that on a GPU small
        weights become constants of the executable; no arguments are left then.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        if self.name != "mosaic" or size > MOST_CONSTANT_BYTES:
            return function, (weights,)
        return partial(function, jax.tree.map(np.asarray, weights)), ()

    def prepare(self, params: Params, config: DLRMConfig) -> Params:
        """The parameters as the kernels want them: layers in the compute dtype, padded once."""
        params = with_compute_dtype(params, config)
        if self.name != "mosaic" or config.compute_dtype not in (*mlp.DTYPES, FLOAT8):
            return params
        *hidden, last = params.top
        return dataclasses.replace(
            params, bottom=_padded(params.bottom), top=(*_padded(tuple(hidden)), last)
        )


def choose_backend(requested: str = "auto", device: Any = None) -> Backend:
    """The back end for `device` (default: the first one). Raises BackendError, ValueError."""
    names = ("auto", *get_args(BackendName))
    if requested not in names:
        raise ValueError(f"back end {requested!r} is not one of {', '.join(names)}")
    device = device or jax.devices()[0]
    can_mosaic, reason = _mosaic_runs_on(device)
    if requested == "mosaic" and not can_mosaic:
        raise BackendError(f"back end 'mosaic' cannot run here: {reason}; use 'xla' or 'auto'")
    if requested == "xla":
        return Backend(name="xla", reason="asked for", ops=REFERENCE)
    if not can_mosaic:
        return Backend(name="xla", reason=reason, ops=REFERENCE)
    ops = Ops(
        pooled_gather=embedding.pooled_gather,
        gather_into=lowered_once(embedding.gather_into),
        dense=lowered_once(_mosaic_dense),
        dense_with_gather=lowered_once(_mosaic_dense_with_gather),
        widen=lowered_once(_mosaic_widen),
        gate=lowered_once(_mosaic_gate),
        dot=lowered_once(_mosaic_dot),
        pooled_dot=lowered_once(_mosaic_pooled_dot),
        chain=lowered_once(_mosaic_chain),
        chain_from=_mosaic_chain_from,
        dense_columns=mlp.PADDED_TO,
        corun_configs=tuple(corun.CONFIGS),
    )
    return Backend(name="mosaic", reason=reason, ops=ops)


def kernels_to(act: str) -> Backend:
    """The back end of the kernels, without which there is nothing to tune, trace or the like.
    Raises BackendError where they do not run.
    """
    backend = choose_backend()
    if backend.name != "mosaic":
        raise BackendError(f"there is nothing to {act} on this device: {backend.reason}")
    return backend


def _padded(layers: tuple[DenseLayer, ...]) -> tuple[DenseLayer, ...]:
    return tuple(
        dataclasses.replace(layer, kernel=mlp.pad_kernel(layer.kernel)) for layer in layers
    )


def _mosaic_dense(x: Any, kernel: Any, bias: Any, *, precision: Any, **options: Any) -> Any:
    """The kernel with the tiles measured as fastest, or XLA: where that is faster, and for the
    dtypes that the kernel does not take.
    """
    is_float8 = isinstance(kernel, Float8Kernel)
    config = None
    if is_float8 or str(x.dtype) in mlp.DTYPES:
        (samples, _), (inputs, outputs) = x.shape, kernel.shape
        # A step has twice as many float8 inputs: tiles are as fast as with half of them in 16 bits.
        k = inputs // 2 if is_float8 else inputs
        config = _tiles().choose(DenseShape(m=max(1, samples), k=k, n=outputs))
    if is_float8 or config is not None:
        return mlp.dense(x, kernel, bias, config=config, **options)
    inputs = min(x.shape[1], len(kernel))  # either may have zeros behind
    x, kernel = x[:, :inputs], kernel[:inputs, : len(bias)]
    return reference.dense(x, kernel, bias, precision=precision, **options)


def _mosaic_dense_with_gather(*operands: Any, config: str, precision: Any, **options: Any) -> Any:
    """The co-run kernel, which multiplies 16-bit floats alone."""
    return corun.dense_with_gather(*operands, config=corun.CONFIGS[config], **options)  # pyright: ignore


def _tiles() -> TileTable:
    return table_of(jax.devices()[0].device_kind)


def _mosaic_widen(x0: Any, x: Any, low: Any, up: Any, bias: Any, *, precision: Any) -> Any:
    """The kernel where it has tiles, else XLA."""
    rank, width = up.shape
    if not cross.CONFIG.takes(width, rank, x.dtype):
        return reference.widen(x0, x, low, up, bias, precision=precision)
    return cross.widen(x0, x, low, up, bias)


def _mosaic_gate(x0: Any, lows: Any, up: Any, bias: Any, *, out_scale: Any) -> Any:
    """The kernel where it has tiles and the result is e4m3, else XLA."""
    ranks = [low.shape[1] for low in lows]
    fits = all(cross.CONFIG.takes(x0.shape[1], rank, FLOAT8) for rank in ranks)
    if out_scale is None or not fits:
        return reference.gate(x0, lows, up, bias, out_scale=out_scale)
    return cross.gate(x0, lows, up, bias, out_scale=out_scale)


def _mosaic_chain(*operands: Any, precision: Any, **options: Any) -> Any:
    return mlp_chain.chain(*operands, **options)


def _mosaic_chain_from(samples: int, kernels: Sequence[Any], scores: int) -> int:
    """Where the tile table has a chain of 16-bit layers."""
    dtypes = {FLOAT8 if isinstance(own, Float8Kernel) else str(own.dtype) for own in kernels}
    if not dtypes <= {*mlp.DTYPES}:
        return len(kernels)
    return _tiles().chain_from(samples, [own.shape for own in kernels], scores)


def _mosaic_dot(x: Any, *, vectors: int, keep: int, precision: Any) -> Any:
    """The kernel for the shapes it takes, else XLA."""
    fits = interaction.takes(x.dtype, vectors, x.shape[1] // vectors, keep)
    dot = interaction.dot if fits else reference.dot
    return dot(x, vectors=vectors, keep=keep, precision=precision)


def _mosaic_pooled_dot(
    left: Any, groups: Any, *bags: Any, slots: tuple[Slot, ...], precision: Any
) -> Any:
    """One kernel for the bags that it is made for, else two."""
    rows, offsets, weights = bags
    if pooled_dot.takes(left, groups, weights, slots):
        return pooled_dot.pooled_dot(left, groups, rows, offsets, slots=slots)
    kernels = {"gather": embedding.pooled_gather, "interact": _mosaic_dot}
    return reference.pooled_dot(left, groups, *bags, slots=slots, precision=precision, **kernels)


def _mosaic_runs_on(device: Any) -> tuple[bool, str]:
    if device.platform != "gpu":
        return False, f"{device.device_kind} is no GPU"
    capability = getattr(device, "compute_capability", None)
    if capability != HOPPER:
        return False, f"compute capability {capability} is not {HOPPER}, Hopper's"
    return True, f"compute capability {capability}"
