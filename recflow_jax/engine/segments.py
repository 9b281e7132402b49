"""A model cut into executables of static shape: what the engine launches and the profiler times.

See `stages` for what they compute. A slice's executable pools its bags into rows of a batch's
vectors (donated: written in place). Every shape is compiled at start.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.tables import QuantisedTable
from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.compilation import Job, compile_jobs, use_cache
from recflow_jax.engine.live_tables import LiveTables
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.prepared import Preparer
from recflow_jax.engine.stages import BatchState, Stages
from recflow_jax.engine.staging import Staging
from recflow_jax.engine.updates import NewRows
from recflow_jax.engine.upload import put
from recflow_jax.layout import Layout
from recflow_jax.model import Params, param_shapes
from recflow_jax.rides import Ride, rides
from scheduling.request import CoRun, SegmentShape


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
        params = backend.prepare(jax.tree.map(jnp.asarray, params), config)
        self.tables = LiveTables(params.groups, self.options.update_sizes)
        self.batch_buckets = self.options.batch_buckets
        self.slice_buckets = self.options.slice_buckets(config)
        self.staging = Staging(config, self.layout)
        self.stages = Stages(
            config, params, self.tables, backend, self.batch_buckets[-1], self.cuts
        )
        self._executables: dict[Any, Callable[..., Any]] = {}

    @property
    def count(self) -> int:
        """Segments of the finest cut."""
        return min(self.options.finest_cut, len(self.config.top_mlp) + 1)

    @property
    def cuts(self) -> tuple[int, ...]:
        """How many segments a batch can be cut into, ascending."""
        return tuple(sorted({1, self.count}))

    @property
    def rides(self) -> tuple[Ride, ...]:
        """The ways in which a slice can ride with a segment."""
        offered = rides(self.backend.ops) if self.config.features else ()
        return tuple(ride for ride in offered if self._can_ride(ride))

    def _can_ride(self, ride: Ride) -> bool:
        """Whether the kernel takes such layers and bags."""
        shape = SegmentShape(segments=1, index=0, batch=self.batch_buckets[-1])
        cell = CoRun(segment=shape, slice=self.slice_buckets[-1], config=str(ride))
        job = self.stages.co_run_job(cell, self.staging.shape(cell.slice))
        try:
            jax.eval_shape(job.function, *job.arguments)
        except ValueError:
            return False
        return True

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
        return run(self.tables.groups, state.vectors, state.dense, packed)

    def start(
        self, shape: SegmentShape, state: BatchState
    ) -> tuple[Float[Array, "batch width"], BatchState]:
        """The first segment over the first `shape.batch` rows of `state`, which is used up; what
        comes back in its place is to be filled anew.
        """
        run, weights = self._executables[shape], self.stages.weights(shape)
        x, vectors = run(*weights, state.vectors, state.dense)
        return x, replace(state, vectors=vectors)

    def run(
        self, shape: SegmentShape, x: Float[Array, "batch width"]
    ) -> Float[Array, "batch outputs"]:
        """A later segment of what the one before gave; the last gives float32 scores."""
        (x,) = self._executables[shape](*self.stages.weights(shape), x)
        return x

    def start_with(
        self, cell: CoRun, state: BatchState, filling: BatchState, packed: np.ndarray | Array
    ) -> tuple[Array, BatchState, BatchState]:
        """`start` of one batch and `embed` into another, in one executable."""
        flow = (state.vectors, state.dense)
        (x, vectors), filling = self._with_slice(cell, flow, filling, packed)
        return x, replace(state, vectors=vectors), filling

    def run_with(
        self, cell: CoRun, x: Array, filling: BatchState, packed: np.ndarray | Array
    ) -> tuple[Array, BatchState]:
        """`run` of one batch and `embed` into another, in one executable."""
        (x,), filling = self._with_slice(cell, (x,), filling, packed)
        return x, filling

    def run_whole(self, cell: CoRun, packed: np.ndarray | Array) -> Float[Array, "batch outputs"]:
        """Scores of a batch that one slice is all of, NaN where PackedShape.marked says so; no
        state is needed.
        """
        return self._executables[cell](*self.stages.whole_weights, self.tables.groups, packed)

    def upload(self, packed: np.ndarray) -> Array:
        """A slice on its way to the device, which may read `packed` until a step that takes the
        array has ended.
        """
        return put(packed)

    def bring_back(self, scores: Array) -> None:
        """Starts scores on their way to the host, unless they land there."""
        if self.stages.scores_place is None:
            scores.copy_to_host_async()

    def _with_slice(
        self, cell: CoRun, flow: tuple[Any, ...], filling: BatchState, packed: Any
    ) -> tuple[tuple[Any, ...], BatchState]:
        weights = self.stages.weights(cell.segment)
        into = (self.tables.groups, filling.vectors, filling.dense, packed)
        return self._executables[cell](*weights, *flow, *into)

    def write_rows(self, new: NewRows) -> Any:
        """Writes rows of the tables behind all that was launched; ready when they have landed."""
        return self.tables.write(self._executables, new)

    def compile_all(
        self,
        progress: bool | None = None,
        *,
        cuts: Iterable[int] | None = None,
        co_runs: Iterable[CoRun] = (),
    ) -> None:
        """Compiles every bucket of these cuts (None: the finest) and these co-runs, if it is not
        yet; on a GPU, where the first time costs extra, runs each once and makes the buffers.

        progress: show a bar; None does so on a terminal when it takes longer than two seconds.
        """
        use_cache(self.options.compilation_cache)
        running = self._jobs({self.count} if cuts is None else {*cuts})
        running += self._co_run_jobs(co_runs)
        running = [job for job in running if job.key not in self._executables]
        writing = [job for job in self.tables.jobs() if job.key not in self._executables]
        self._executables |= compile_jobs(
            [*running, *writing],
            progress,
            options=self.backend.compiler_options,
            workers=self.backend.compile_workers,
        )
        if jax.default_backend() != "cpu":
            for job in running:
                _warm_up(self._executables[job.key], job)
            self.tables.warm_up(self._executables)
            self.upload(np.zeros(1, np.int32))  # finds out how that goes here
            self.staging.reserve(self.options.max_steps_in_flight)

    def _jobs(self, cuts: Iterable[int]) -> list[Job]:
        slices = [self.stages.slice_job(self.staging.shape(b)) for b in self.slice_buckets]
        sizes = [(cut, bucket) for cut in sorted(cuts) for bucket in self.batch_buckets]
        batches = [job for size in sizes for job in self.stages.segment_jobs(*size)]
        return [self.stages.state_job(), *slices, *batches]

    def _co_run_jobs(self, cells: Iterable[CoRun]) -> list[Job]:
        return [self.stages.co_run_job(cell, self.staging.shape(cell.slice)) for cell in cells]


def _warm_up(executable: Callable[..., Any], job: Job) -> None:
    """First runs load code and choose algorithms: not on a request's time."""

    def zeros(leaf: Any) -> Any:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    jax.block_until_ready(executable(*jax.tree.map(zeros, job.arguments)))


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
