"""Kernels lowered once for CUDA: how often, and that the executables compute the same."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recflow_jax import lowered
from recflow_jax.backend import choose_backend
from recflow_jax.lowered import lowered_once

HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100")
X = jax.ShapeDtypeStruct((4, 3), jnp.float32)


@lowered_once
def scaled(x: Any, more: Any, *, by: float) -> Any:
    """A matrix and, in a dictionary, how far from zero it is at most."""
    scaled = x * by if more is None else x * by + more
    return scaled, {"largest": jnp.abs(scaled).max()}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of each export, from the first."""
    made: list[Any] = []
    monkeypatch.setattr(lowered, "_EXPORTS", lowered._Exports())
    export = lowered.export.export

    def noted(function: Any, **options: Any) -> Callable[..., Any]:
        def of(*shapes: Any) -> Any:
            made.append(tuple(shape.shape for shape in shapes))
            return export(function, **options)(*shapes)

        return of

    monkeypatch.setattr(lowered.export, "export", noted)
    return made


def lower(function: Callable[..., Any], *shapes: Any) -> str:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_executables_share_what_is_lowered(exports: list[Any]):
    lower(lambda x: scaled(x, None, by=2.0)[0] + 1, X)
    text = lower(lambda x: scaled(scaled(x, None, by=2.0)[0], None, by=2.0), X)
    assert exports == [((4, 3),)]
    assert text.count("stablehlo.multiply") == 1


def test_other_shapes_options_and_operands_are_lowered_apart(exports: list[Any]):
    lower(lambda x: scaled(x, None, by=2.0), X)
    lower(lambda x: scaled(x, None, by=3.0), X)
    lower(lambda x: scaled(x[:2], None, by=2.0), X)
    lower(lambda x: scaled(x.astype(jnp.bfloat16), None, by=2.0), X)
    lower(lambda x: scaled(x, x, by=2.0), X)
    assert len(exports) == 5


def test_threads_that_want_the_same_wait_for_it(exports: list[Any]):
    together = Barrier(4)

    def one(number: int) -> None:
        together.wait()
        lower(lambda x: scaled(x, None, by=2.0)[0] + number, X)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(4)))
    assert len(exports) == 1


def test_shapes_alone_lower_nothing(exports: list[Any]):
    found, more = jax.eval_shape(lambda x: scaled(x, None, by=2.0), X)
    assert (found.shape, more["largest"].shape) == ((4, 3), ())
    assert exports == []


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["at once", "jitted"])
def test_elsewhere_it_is_any_function(run: Any, exports: list[Any]):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    found, more = run(lambda x: scaled(x, x, by=2.0))(x)
    np.testing.assert_array_equal(found, 3 * x)
    assert more["largest"] == 33
    assert exports == []


def test_constants_stay_in_the_executable(exports: list[Any]):
    large = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert "dense<" in lower(lambda x: scaled(x, large, by=2.0), X)
    assert exports == [((4, 3), (4, 3))]


def test_layers_of_two_executables_have_one_kernel(exports: list[Any]):
    dense = choose_backend("mosaic", HOPPER).ops.dense
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 256), (256, 256))]
    layer = jax.ShapeDtypeStruct((256,), jnp.float32)

    def run(layers: int, x: Any, kernel: Any, bias: Any) -> Any:
        for _ in range(layers):
            x = dense(x, kernel, bias, activation="relu", precision=None)
        return x

    texts = [lower(lambda *a, n=n: run(n, *a), *shapes, layer) for n in (1, 2)]
    assert [text.count("@mosaic_gpu_v2") for text in texts] == [1, 1]
    assert len(exports) == 1
