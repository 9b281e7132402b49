"""Kernels that are lowered once, however many executables have them.

Lowering a Pallas kernel keeps Python busy for a tenth of a second and more, one after the other on
however many threads; an engine's executables have the same few kernels hundreds of times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from threading import Lock
from typing import Any

import jax
from jax import export
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

Function = Callable[..., Any]


def lowered_once(function: Function) -> Function:
    """`function(*operands, **options)`, which for CUDA is lowered once for all executables with the
    same options and operands of the same shapes; elsewhere as any function.

    operands: pytrees of arrays. options: hashable. It takes no part in differentiation or vmap.
    """

    @wraps(function)
    def bound(*operands: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        call = _Call(function, tuple(sorted(options.items())), tree)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        results = jax.tree.structure(jax.eval_shape(_jitted(call), *shapes))
        return jax.tree.unflatten(results, _KERNEL.bind(*leaves, call=call))

    return bound


@dataclass(frozen=True)
class _Call:
    """A function with all but the arrays that it is called with."""

    function: Function
    options: tuple[tuple[str, Any], ...]
    tree: Any

    def __call__(self, *leaves: Any) -> Any:
        return self.function(*jax.tree.unflatten(self.tree, leaves), **dict(self.options))


@cache
def _jitted(call: _Call) -> Any:
    """Traced once for operands of the same shapes."""
    return jax.jit(call)


def _flat(*leaves: Any, call: _Call) -> list[Any]:
    return jax.tree.leaves(_jitted(call)(*leaves))


class _Exports:
    """What has been lowered for CUDA, by call and shapes. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._locks: dict[Any, Lock] = {}
        self._found: dict[Any, export.Exported] = {}

    def of(self, call: _Call, operands: Sequence[ShapedArray]) -> export.Exported:
        """Lowers what is not yet; others who want the same wait for it."""
        key = call, tuple((operand.shape, operand.dtype) for operand in operands)
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._found:
                shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
                self._found[key] = export.export(_jitted(call), platforms=["cuda"])(*shapes)
            return self._found[key]


_EXPORTS = _Exports()


def _results(*operands: ShapedArray, call: _Call) -> list[ShapedArray]:
    shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
    results = jax.tree.leaves(jax.eval_shape(_jitted(call), *shapes))
    return [ShapedArray(result.shape, result.dtype) for result in results]


def _lower_for_cuda(ctx: Any, *operands: Any, call: _Call) -> Any:
    exported = _EXPORTS.of(call, ctx.avals_in)
    inlined = mlir.lower_fun(lambda *leaves: jax.tree.leaves(exported.call(*leaves)))
    return inlined(ctx, *operands)


_KERNEL = Primitive("kernel")
_KERNEL.multiple_results = True
_KERNEL.def_impl(_flat)
_KERNEL.def_abstract_eval(_results)
mlir.register_lowering(_KERNEL, mlir.lower_fun(_flat))
mlir.register_lowering(_KERNEL, _lower_for_cuda, platform="cuda")
