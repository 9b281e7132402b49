"""A model cut into executables of static shape: what the engine launches and the profiler times.

A slice's executable pools its bags into rows of a batch's buffers (donated, so written in place).
Segment 0 is bottom MLP and interaction over the batch's first rows, the others share the top MLP's
layers about evenly by FLOP; with one segment it is all of them. Every shape is compiled at start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.tables import QuantisedTable
from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.compilation import Job, compile_jobs, use_cache
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.prepared import Preparer
from recflow_jax.engine.staging import PackedShape, Staging
from recflow_jax.layout import Layout
from recflow_jax.model import (
    DenseLayer,
    Params,
    columns_behind,
    dense_shapes,
    interact,
    mlp,
    param_shapes,
    pool,
    scores,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BatchState:
    """A batch's embeddings on the device, in the compute dtype: pooled [max_batch, pooled_width and
    the zero columns that the back end wants behind], dense [max_batch, dense_width]. `landed` is
    ready when the last slice has landed.
    """

    pooled: Any
    dense: Any
    landed: Any


class Segments:
    """The compiled pieces of one model on one device.

    Not compiled before `compile_all`. Raises ValueError for parameters of another model's shapes.
    """

    def __init__(
        self,
        config: DLRMConfig,
        params: Params,
        backend: Backend,
        options: EngineOptions | None = None,
    ) -> None:
        _check_params(config, params)
        self.config = config
        self.backend = backend
        self.options = options or EngineOptions()
        self.layout = Layout.of(config)
        self.params = backend.prepare(jax.tree.map(jnp.asarray, params), config)
        self.batch_buckets = self.options.batch_buckets
        self.slice_buckets = self.options.slice_buckets(config)
        self.staging = Staging(config, self.layout)
        self._cuts = _cuts(config, self.options.segments)
        bound = [self._bound(index) for index in range(self.count)]
        self._functions = [function for function, _ in bound]
        self._arguments = [arguments for _, arguments in bound]
        self._executables: dict[Any, Callable[..., Any]] = {}

    @property
    def count(self) -> int:
        """Segments that a batch goes through."""
        return len(self._cuts)

    @property
    def max_ids_per_sample(self) -> int:
        """The most ids that one sample may have."""
        return self.options.max_ids_per_sample or self.slice_buckets[-1].ids

    @cached_property
    def preparer(self) -> Preparer:
        """What makes samples ready for `staging`."""
        return Preparer(self.config, self.layout, max_ids=self.max_ids_per_sample)

    def new_state(self) -> BatchState:
        """Buffers of a batch, all zero."""
        return self._executables["state"]()

    def embed(self, state: BatchState, packed: np.ndarray | Array) -> BatchState:
        """Pools a slice that `staging` packed into its rows of `state`, which is used up."""
        run = self._executables["slice", len(packed)]
        return run(self.params.groups, state.pooled, state.dense, packed)

    def start(self, state: BatchState, bucket: int) -> Float[Array, "bucket width"]:
        """Segment 0 over the first `bucket` rows of `state`, which stays as it is."""
        run, weights = self._executables[0, bucket], self._arguments[0]
        return self._on_its_way(0, run(*weights, state.pooled, state.dense))

    def run(
        self, index: int, bucket: int, x: Float[Array, "bucket width"]
    ) -> Float[Array, "bucket outputs"]:
        """Segment `index` > 0 of what the one before gave; the last gives float32 scores."""
        run, weights = self._executables[index, bucket], self._arguments[index]
        return self._on_its_way(index, run(*weights, x))

    def compile_all(self, progress: bool | None = None) -> None:
        """Compiles every bucket, and runs each once where the first run costs extra.

        progress: show a bar; None does so on a terminal when it takes longer than two seconds.
        """
        use_cache(self.options.compilation_cache)
        self._executables = compile_jobs(
            self._jobs(), progress, options=self.backend.compiler_options
        )
        if jax.default_backend() != "cpu":
            self._warm_up()

    def _on_its_way(self, index: int, x: Array) -> Array:
        """Scores start for the host as soon as they are there."""
        if index == self.count - 1:
            x.copy_to_host_async()
        return x

    def _bound(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A segment's function, and the weights that it is called with (see Backend.bind)."""
        top = self.params.top[self._cuts[index]]
        if index == 0:
            return self.backend.bind(self._first, (self.params.bottom, self.params.cross, top))
        return self.backend.bind(partial(self._top, index), (top,))

    def _jobs(self) -> list[Job]:
        jobs = [Job("state", jax.jit(self._zero_state), ())]
        state = jax.eval_shape(self._zero_state)
        for bucket in self.slice_buckets:
            shape = self.staging.shape(bucket)
            packed = jax.ShapeDtypeStruct((shape.length,), jnp.int32)
            run = jax.jit(partial(self._embed, shape), donate_argnums=(1, 2))
            arguments = (self.params.groups, state.pooled, state.dense, packed)
            jobs.append(Job(("slice", shape.length), run, arguments))
        return jobs + [job for bucket in self.batch_buckets for job in self._batch_jobs(bucket)]

    def _batch_jobs(self, bucket: int) -> list[Job]:
        """The segments of one batch size, each fed with what the one before gives."""
        state = jax.eval_shape(self._zero_state)
        jobs, flowing = [], (state.pooled, state.dense)
        for index in range(self.count):
            function = self._functions[index]
            if index == 0:
                function = partial(function, bucket=bucket)
            arguments = (*self._arguments[index], *flowing)
            jobs.append(Job((index, bucket), jax.jit(function), arguments))
            flowing = (jax.eval_shape(function, *arguments),)
        return jobs

    def _zero_state(self) -> BatchState:
        dtype, rows = jnp.dtype(self.config.carried_dtype), self.batch_buckets[-1]
        width = self.config.pooled_width + columns_behind(self.config, self.backend.ops)
        return BatchState(
            pooled=jnp.zeros((rows, width), dtype),
            dense=jnp.zeros((rows, self.config.dense_width), dtype),
            landed=jnp.int32(0),
        )

    def _embed(
        self, shape: PackedShape, groups: Any, pooled: Array, dense: Array, packed: Array
    ) -> BatchState:
        row, batch = shape.unpack(packed)
        new = pool(groups, batch, config=self.config, layout=self.layout, ops=self.backend.ops)
        new_dense = batch.dense.astype(dense.dtype)
        return BatchState(
            pooled=lax.dynamic_update_slice(pooled, new, (row, 0)),
            dense=lax.dynamic_update_slice(dense, new_dense, (row, 0)),
            landed=row,
        )

    def _first(self, weights: Any, pooled: Array, dense: Array, *, bucket: int) -> Array:
        bottom_layers, cross, top = weights
        pooled, dense = pooled[:bucket], dense[:bucket]
        bottom = self._mlp(bottom_layers, dense)
        vectors = jnp.concatenate([bottom, pooled], axis=1)
        x = interact(
            *(cross, vectors),
            config=self.config,
            precision=self._precision,
            ops=self.backend.ops,
        )
        return self._top(0, (top,), x)

    def _top(self, index: int, weights: tuple[tuple[DenseLayer, ...]], x: Array) -> Array:
        (layers,) = weights
        if index < self.count - 1:
            return self._mlp(layers, x)
        return scores(layers[-1], self._mlp(layers[:-1], x), self._precision)

    def _mlp(self, layers: tuple[DenseLayer, ...], x: Array) -> Array:
        activation, ops = self.config.activation, self.backend.ops
        return mlp(layers, x, activation, precision=self._precision, ops=ops)

    @property
    def _precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.config.compute_dtype == "float32" else None

    def _warm_up(self) -> None:
        """First runs load code and choose algorithms: not on a request's time."""
        state = self.new_state()
        for bucket in self.slice_buckets:
            state = self.embed(state, np.zeros(self.staging.shape(bucket).length, np.int32))
        for bucket in self.batch_buckets:
            x = self.start(state, bucket)
            for index in range(1, self.count):
                x = self.run(index, bucket, x)
            x.block_until_ready()


def _cuts(config: DLRMConfig, segments: int) -> list[slice]:
    """Each segment's run of top layers, the longest as short as possible by FLOP.

    Segment 0 has none, but all where it is the only one; no other goes without.
    """
    flop = [inputs * outputs for inputs, outputs in dense_shapes(config)[1]]
    runs = min(segments - 1, len(flop))
    if runs == 0:
        return [slice(0, len(flop))]
    bounds = [(0, *inner, len(flop)) for inner in combinations(range(1, len(flop)), runs - 1)]
    best = min(bounds, key=lambda cut: max(sum(flop[a:b]) for a, b in pairwise(cut)))
    return [slice(0, 0), *(slice(a, b) for a, b in pairwise(best))]


def _check_params(config: DLRMConfig, params: Params) -> None:
    found, expected = _described(params), _described(param_shapes(config))
    for name in expected | found:
        here, needed = found.get(name, "missing"), expected.get(name, "not there")
        if here != needed:
            raise ValueError(f"params: {name} is {here}, in model {config.name!r} it is {needed}")


def _described(params: Params) -> dict[str, str]:
    """Shape of each parameter, and dtype of each table group (layers are cast, tables are not)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantised)
    named = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}
    return {
        name: _group_text(leaf) if name.startswith("groups") else str(list(leaf.shape))
        for name, leaf in named.items()
    }


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QuantisedTable)


def _group_text(group: Any) -> str:
    if _is_quantised(group):
        return f"{_group_text(group.values)} with scales {_group_text(group.scales)}"
    return f"{group.dtype}{list(group.shape)}"
