"""What the executables of a model compute: slices, the segments of every cut, co-runs of the two.

A batch is *cut* into one segment, or several: the first is then bottom MLP and interaction over
the batch's first rows, the others share the top MLP's layers about evenly by FLOP. A co-run is a
segment with a slice of another batch in its dense layers' launches (see `rides`), or with all of
its own batch in one slice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array

from recflow_jax.backend import Backend
from recflow_jax.config import DLRMConfig, dense_shapes
from recflow_jax.engine.compilation import Job
from recflow_jax.engine.live_tables import LiveTables
from recflow_jax.engine.pinned import host_place
from recflow_jax.engine.staging import PackedShape
from recflow_jax.layout import Layout
from recflow_jax.model import (
    DenseLayer,
    DeviceBatch,
    Ops,
    Params,
    columns_behind,
    forward,
    interact,
    mlp,
    scores,
)
from recflow_jax.rides import Cargo, Carriage, Ride
from scheduling.request import WHOLE, CoRun, SegmentShape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BatchState:
    """A batch on the device, in the compute dtype: vectors [max_batch, bottom MLP's width, pooled
    width, and the zero columns that the back end wants behind], dense [max_batch, dense_width].
    `landed` is ready when the last slice has landed, and says which of its samples are well (see
    PackedShape.are_well).
    """

    vectors: Any
    dense: Any
    landed: Any


class Stages:
    """The functions of one model, to be compiled for static shapes.

    `params` are prepared for the back end, their groups in `tables`; the batch's buffers have
    `rows` rows. Whatever takes a state's vectors is given them for good and gives them back.
    scores_place: where scores land, if not on the device.
    """

    def __init__(
        self,
        config: DLRMConfig,
        params: Params,
        tables: LiveTables,
        backend: Backend,
        rows: int,
        cuts: tuple[int, ...],
    ) -> None:
        self._config = config
        self._tables = tables
        self._ops = backend.ops
        self._rows = rows
        self._layout = Layout.of(config)
        self._arithmetic = _Arithmetic(config, rows)
        shapes = jax.eval_shape(lambda: (params.bottom, params.top))
        self._kernels = [[layer.kernel for layer in part] for part in shapes]
        self._top = {cut: _runs(config, cut) for cut in cuts}
        places = [(cut, index) for cut in cuts for index in range(cut)]
        self._bound = {place: self._bind(backend, params, *place) for place in places}
        layers = (params.bottom, params.cross, params.top)
        self._whole, self.whole_weights = backend.bind(self._arithmetic.whole, layers)
        self.scores_place = host_place()

    def weights(self, shape: SegmentShape) -> tuple[Any, ...]:
        """What a segment's executable is called with first (see Backend.bind)."""
        return self._of(shape)[1]

    def dense_layers(self, shape: SegmentShape) -> list[tuple[int, int]]:
        """(inputs, outputs) of a segment's dense layers that have launches of their own, in the
        order of these.
        """
        config, run = self._config, self._top[shape.segments][shape.index]
        bottom, top = dense_shapes(config)
        bottom_kernels, top_kernels = self._kernels
        width = config.bottom_width + config.pooled_width
        narrowing = [(width, config.cross_rank)] * config.cross_layers
        own, kernels, outputs = top[run], top_kernels[run], 0
        if shape.last:
            own, kernels, outputs = own[:-1], kernels[:-1], config.outputs
        own = own[: self._ops.chain_from(shape.batch, kernels, outputs)]
        if shape.index:
            return own
        bottom = bottom[: self._ops.chain_from(shape.batch, bottom_kernels, 0)]
        return [*bottom, *narrowing, *own]

    def state_job(self) -> Job:
        """A batch's buffers, all zero."""
        return Job("state", jax.jit(self._zero_state), ())

    def slice_job(self, shape: PackedShape) -> Job:
        """(groups, vectors, dense, packed) -> BatchState."""
        run = jax.jit(partial(self._embed, shape), donate_argnums=(1, 2))
        return Job(("slice", shape.length), run, self._filling(shape))

    def segment_jobs(self, segments: int, batch: int) -> list[Job]:
        """All segments of a batch: (weights, vectors, dense) -> (x, vectors), then (weights, x) ->
        (x,).
        """
        fed = self._fed(segments, batch)
        return [
            Job(shape, _donating(run, shape, flow, to=self._places(shape)), flow)
            for shape, (run, flow) in fed.items()
        ]

    def co_run_job(self, cell: CoRun, shape: PackedShape) -> Job:
        """The arguments of a segment, then those of a slice -> both of their results. Of a whole
        batch: (weights, groups, packed) -> scores, see PackedShape.marked.
        """
        groups, *_, packed = self._filling(shape)
        if cell.config == WHOLE:
            run = jax.jit(partial(self._run_whole, shape), out_shardings=self.scores_place)
            return Job(cell, run, (*self.whole_weights, groups, packed))
        _, flow = self._fed(cell.segment.segments, cell.segment.batch)[cell.segment]
        run = partial(self._co_run, cell, shape)
        donated, to = (len(flow) + 1, len(flow) + 2), (self._places(cell.segment), None)
        run = _donating(run, cell.segment, flow, *donated, to=to)
        return Job(cell, run, (*flow, *self._filling(shape)))

    def _places(self, shape: SegmentShape) -> tuple[Sharding | None, ...]:
        """Where the results of a segment land; None: on the device."""
        x = self.scores_place if shape.last else None
        return (x,) if shape.index else (x, None)

    def _of(self, shape: SegmentShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._bound[shape.segments, shape.index]

    def _bind(
        self, backend: Backend, params: Params, cut: int, index: int
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        run = self._top[cut][index]
        top = params.top[run]
        if index == 0:
            weights = (params.bottom, params.cross, top)
            return backend.bind(partial(self._arithmetic.first, run), weights)
        return backend.bind(partial(self._arithmetic.later, run), top)

    def _fed(
        self, segments: int, batch: int
    ) -> dict[SegmentShape, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Each segment's function for one batch size, and what it gets from the one before."""
        state = jax.eval_shape(self._zero_state)
        fed, flowing = {}, (state.vectors, state.dense)
        shape: SegmentShape | None = SegmentShape(segments=segments, index=0, batch=batch)
        while shape is not None:
            function, weights = self._of(shape)
            function = partial(function, batch=batch, ops=self._ops)
            fed[shape] = (function, (*weights, *flowing))
            flowing = jax.eval_shape(function, *weights, *flowing)[:1]
            shape = shape.next
        return fed

    def _filling(self, shape: PackedShape) -> tuple[Any, ...]:
        """The arguments that bring a slice into a batch."""
        state = jax.eval_shape(self._zero_state)
        packed = jax.ShapeDtypeStruct((shape.length,), jnp.int32)
        return self._tables.groups, state.vectors, state.dense, packed

    def _zero_state(self) -> BatchState:
        config = self._config
        width = config.bottom_width + config.pooled_width + columns_behind(config, self._ops)
        dtype = jnp.dtype(config.carried_dtype)
        return BatchState(
            vectors=jnp.zeros((self._rows, width), dtype),
            dense=jnp.zeros((self._rows, config.dense_width), dtype),
            landed=jnp.zeros(0, bool),
        )

    def _embed(self, shape: PackedShape, *filling: Any) -> BatchState:
        cargo, state = self._unpacked(shape, *filling)
        return replace(state, vectors=cargo.gathered(self._ops)) if cargo.slots else state

    def _co_run(self, cell: CoRun, shape: PackedShape, *arguments: Any) -> Any:
        flow, filling = arguments[:-4], arguments[-4:]
        cargo, state = self._unpacked(shape, *filling)
        ride = Ride.parse(cell.config)
        shares = ride.shares(self.dense_layers(cell.segment), shape.samples)
        carriage = Carriage(ops=self._ops, cargo=cargo, kernel=ride.kernel, shares=shares)
        function, _ = self._of(cell.segment)
        out = function(*flow, batch=cell.segment.batch, ops=carriage.loaded_ops)
        return out, replace(state, vectors=carriage.unload() if cargo.slots else state.vectors)

    def _run_whole(self, shape: PackedShape, *arguments: Any) -> Array:
        *weights, groups, packed = arguments
        _, batch = shape.unpack(packed)
        return shape.marked(self._whole(*weights, groups, batch, ops=self._ops), packed)

    def _unpacked(
        self, shape: PackedShape, groups: Any, vectors: Array, dense: Array, packed: Array
    ) -> tuple[Cargo, BatchState]:
        """A slice's bags, and the state that they are to land in, with its dense features."""
        row, batch = shape.unpack(packed)
        cargo = Cargo(
            vectors=vectors,
            first_row=row,
            groups=groups,
            batch=batch,
            slots=self._layout.slots,
            left=self._config.bottom_width,
        )
        dense = lax.dynamic_update_slice(dense, batch.dense.astype(dense.dtype), (row, 0))
        landed = shape.are_well(packed)
        return cargo, BatchState(vectors=vectors, dense=dense, landed=landed)


class _Arithmetic:
    """What segments compute of their weights; no owner of any, so that a model goes with its last
    user, and not when garbage is collected. `run`: which top layers a segment has.
    """

    def __init__(self, config: DLRMConfig, rows: int) -> None:
        self._config = config
        self._layout = Layout.of(config)
        self._rows = rows
        self._top_scales = config.matmul_scales[-len(config.top_mlp) :]

    def whole(self, weights: Any, groups: Any, batch: DeviceBatch, *, ops: Ops) -> Array:
        bottom, cross, top = weights
        params = Params(groups=groups, bottom=bottom, cross=cross, top=top)
        return forward(
            params,
            batch,
            config=self._config,
            layout=self._layout,
            precision=self._precision,
            ops=ops,
        )

    def first(
        self, run: slice, weights: Any, vectors: Array, dense: Array, *, batch: int, ops: Ops
    ) -> tuple[Array, Array]:
        bottom_layers, cross, top = weights
        bottom = self._mlp(bottom_layers, dense[:batch], ops)
        complete = lax.dynamic_update_slice(vectors[:batch], bottom, (0, 0))
        x = interact(
            *(cross, complete),
            config=self._config,
            out_scale=self._top_scales[0],
            precision=self._precision,
            ops=ops,
        )
        (x,) = self.later(run, top, x, batch=batch, ops=ops)
        return x, complete if batch == self._rows else vectors

    def later(
        self, run: slice, layers: tuple[DenseLayer, ...], x: Array, *, batch: int, ops: Ops
    ) -> tuple[Array]:
        if run.stop < len(self._top_scales):
            return (self._mlp(layers, x, ops, self._top_scales[run.stop]),)
        options: dict[str, Any] = {"precision": self._precision, "ops": ops}
        return (scores(layers, x, self._config.activation, **options),)

    def _mlp(
        self,
        layers: tuple[DenseLayer, ...],
        x: Array,
        ops: Ops,
        out_scale: float | None = None,
    ) -> Array:
        options: dict[str, Any] = {"precision": self._precision, "ops": ops}
        return mlp(layers, x, self._config.activation, out_scale=out_scale, **options)

    @property
    def _precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self._config.compute_dtype == "float32" else None


def _donating(
    function: Callable[..., Any],
    shape: SegmentShape,
    flow: tuple[Any, ...],
    *others: int,
    to: tuple[Any, ...],
) -> Any:
    """Jitted; a first segment's vectors, the last but one of what flows in, are used up."""
    own = (len(flow) - 2,) if shape.index == 0 else ()
    return jax.jit(function, donate_argnums=(*own, *others), out_shardings=to)


def _runs(config: DLRMConfig, segments: int) -> list[slice]:
    """Each segment's run of top layers, the longest as short as possible by FLOP.

    Segment 0 has none, but all where it is the only one; no other goes without.
    """
    flop = [inputs * outputs for inputs, outputs in dense_shapes(config)[1]]
    if segments == 1:
        return [slice(0, len(flop))]
    bounds = [(0, *inner, len(flop)) for inner in combinations(range(1, len(flop)), segments - 2)]
    best = min(bounds, key=lambda cut: max(sum(flop[a:b]) for a, b in pairwise(cut)))
    return [slice(0, 0), *(slice(a, b) for a, b in pairwise(best))]
