"""Plain JAX DLRMs: what somebody who knows jax.numpy would write, and tune, without this engine.

They share nothing with the engine but the parameters: `stacked` keeps tables of one dim and dtype
in one array, `per_table` takes from each table apart.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.tables import Table
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure import plain_bags
from recflow_jax.measure.plain_bags import Piece
from recflow_jax.model import CrossLayer, DenseLayer, Params

Pooler = Literal["one_gather", "gather_per_hotness", "segment_sum", "take_per_table"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlainBatch:
    """dense float32 [samples, dense_width] and the ids of every piece (see PlainModel)."""

    dense: Any
    pieces: tuple[plain_bags.PlainIds, ...]


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """A plain JAX DLRM. `pooler` says how rows are gathered and summed; `hotness` is each slot's
    fixed number of ids, None where bags are jagged.
    """

    config: DLRMConfig
    layout: Layout
    pooler: Pooler
    hotness: tuple[int, ...] | None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What is gathered apart: table groups, or single slots for `take_per_table`."""
        slots = range(len(self.layout.slots))
        if self.pooler == "take_per_table":
            return tuple(self._piece(self._slot_tables[i], [i]) for i in slots)
        groups = range(len(self.layout.groups))
        members = [[i for i in slots if self.layout.slots[i].group == g] for g in groups]
        return tuple(self._piece(g, own) for g, own in enumerate(members) if own)

    def _piece(self, table: int, members: Sequence[int]) -> Piece:
        slots = [self.layout.slots[i] for i in members]
        return Piece(
            table=table,
            slots=tuple(members),
            dim=slots[0].dim,
            means=tuple(slot.mean for slot in slots),
            hotness=None if self.hotness is None else tuple(self.hotness[i] for i in members),
        )

    @cached_property
    def _slot_tables(self) -> tuple[int, ...]:
        index = {table.name: i for i, table in enumerate(self.config.tables)}
        tables = [index[feature.table] for feature in self.config.features]
        return tuple(tables[feature] for feature in self.layout.slot_features)

    @cached_property
    def columns(self) -> np.ndarray | None:
        """Where this model's pooled columns are in the config's order; None if that is it."""
        slots = [self.layout.slots[i] for piece in self.pieces for i in piece.slots]
        ranges = [np.arange(slot.column, slot.column + slot.dim) for slot in slots]
        columns = np.concatenate([np.zeros(0, int), *ranges])
        return None if (np.diff(columns) == 1).all() else columns

    @property
    def precision(self) -> lax.Precision | None:
        """Full float32 products for float32 models, as the engine computes them."""
        return lax.Precision.HIGHEST if self.config.compute_dtype == "float32" else None

    def prepare(self, params: Params) -> Params:
        """Parameters in the compute dtype. Columns that another order of gathers permutes are
        permuted in the kernels that read them, once, instead of in every batch.
        """
        layers = dataclasses.replace(params, groups=())
        layers = jax.tree.map(lambda leaf: leaf.astype(self.config.carried_dtype), layers)
        if self.columns is not None and self.config.interaction != "dot":
            layers = _permute_inputs(layers, self.columns, self.config.bottom_width)
        return dataclasses.replace(layers, groups=self._tables(params.groups))

    def _tables(self, groups: Sequence[Table]) -> tuple[Table, ...]:
        if self.pooler != "take_per_table":
            return tuple(groups)
        places = zip(self.config.tables, self.layout.table_places, strict=True)
        return tuple(_rows(groups[g], base, base + table.rows) for table, (g, base) in places)

    def pack(self, batch: JaggedBatch) -> PlainBatch:
        """`batch` in host memory as `forward` takes it. Raises ValueError if bags that should be
        of fixed length are not.
        """
        apart = self.pooler == "take_per_table"
        rows = batch.values.astype(np.int32) if apart else self.layout.rows(batch)
        offsets = self.layout.slot_offsets(batch)
        pieces = plain_bags.pack(self.pieces, rows, offsets, batch)
        return PlainBatch(dense=batch.dense, pieces=pieces)

    def zeros(self, *, samples: int, ids: Sequence[int]) -> PlainBatch:
        """A batch of that shape in host memory, with room for `ids` in each jagged piece."""
        weighted = self.config.weighted
        return PlainBatch(
            dense=np.zeros((samples, self.config.dense_width), np.float32),
            pieces=tuple(
                piece.zeros(samples=samples, ids=size, weighted=weighted)
                for piece, size in zip(self.pieces, ids, strict=True)
            ),
        )

    def forward(self, params: Params, batch: PlainBatch) -> Float[Array, "samples outputs"]:
        """Scores (logits, float32), as model.forward gives them."""
        dot = partial(jnp.dot, precision=self.precision)
        activate = _ACTIVATIONS[self.config.activation]
        bottom = batch.dense.astype(self.config.carried_dtype)
        for layer in params.bottom:
            bottom = activate(dot(bottom, layer.kernel) + layer.bias)
        x = self._interact(params.cross, bottom, self.pool(params.groups, batch), dot)
        for layer in params.top[:-1]:
            x = activate(dot(x, layer.kernel) + layer.bias)
        last = params.top[-1]
        return dot(x, last.kernel, preferred_element_type=jnp.float32) + last.bias

    def pool(self, tables: tuple[Any, ...], batch: PlainBatch) -> Float[Array, "samples width"]:
        """Pooled columns, in the order of `pieces`."""
        samples, dtype = len(batch.dense), self.config.carried_dtype
        pool = plain_bags.sum_segments if self.hotness is None else plain_bags.sum_slices
        if self.pooler == "gather_per_hotness":
            pool = plain_bags.sum_per_hotness
        pooled = [
            pool(tables[piece.table], piece, ids, samples).astype(dtype)
            for piece, ids in zip(self.pieces, batch.pieces, strict=True)
        ]
        return jnp.concatenate([jnp.zeros((samples, 0), dtype), *pooled], axis=1)

    def _interact(
        self, cross: tuple[CrossLayer, ...], bottom: Array, pooled: Array, dot: Any
    ) -> Array:
        if self.config.interaction == "dot":
            return self._pairwise_dots(bottom, pooled)
        x0 = x = jnp.concatenate([bottom, pooled], axis=1)
        for layer in cross:
            x = x0 * (dot(dot(x, layer.down), layer.up) + layer.bias) + x
        return x

    def _pairwise_dots(self, bottom: Array, pooled: Array) -> Array:
        if self.columns is not None:
            pooled = pooled[:, np.argsort(self.columns)]
        vectors = jnp.concatenate([bottom, pooled], axis=1)
        vectors = vectors.reshape(len(vectors), self.config.dot_vectors, -1)
        products = jnp.einsum("nid,njd->nij", vectors, vectors, precision=self.precision)
        upper = jnp.triu_indices(self.config.dot_vectors, k=1)
        return jnp.concatenate([bottom, products[:, *upper]], axis=1)


def _rows(group: Table, start: int, stop: int) -> Table:
    return jax.tree.map(lambda leaf: leaf[start:stop], group)


def _permute_inputs(layers: Params, columns: np.ndarray, bottom_width: int) -> Params:
    order = np.concatenate([np.arange(bottom_width), bottom_width + columns])
    first = layers.top[0]
    top = (DenseLayer(kernel=first.kernel[order], bias=first.bias), *layers.top[1:])
    cross = tuple(
        CrossLayer(down=c.down[order], up=c.up[:, order], bias=c.bias[order]) for c in layers.cross
    )
    return dataclasses.replace(layers, top=top, cross=cross)


def stacked_variants(config: DLRMConfig) -> tuple[PlainModel, ...]:
    """The ways of writing a DLRM over stacked tables that may be fastest; which one is, depends on
    the device. Jagged bags leave one.
    """
    layout = Layout.of(config)
    hotness = fixed_hotness(config, layout)
    poolers: tuple[Pooler, ...] = ("one_gather", "gather_per_hotness")
    if hotness is None:
        poolers = ("segment_sum",)
    return tuple(
        PlainModel(config=config, layout=layout, pooler=pooler, hotness=hotness)
        for pooler in poolers
    )


def per_table(config: DLRMConfig) -> PlainModel:
    """One array and one take per table."""
    layout = Layout.of(config)
    hotness = fixed_hotness(config, layout)
    return PlainModel(config=config, layout=layout, pooler="take_per_table", hotness=hotness)


def fixed_hotness(config: DLRMConfig, layout: Layout) -> tuple[int, ...] | None:
    """Ids per slot if the config says that no bag's length varies, else None."""
    bags = [feature.bag for feature in config.features]
    if any(bag.kind != "fixed" or bag.coverage < 1 for bag in bags):
        return None
    if any(f.pooling == "none" and int(f.bag.mean) != f.hotness for f in config.features):
        return None
    features = [config.features[i] for i in layout.slot_features]
    return tuple(1 if f.pooling == "none" else int(f.bag.mean) for f in features)


def with_segments(batch: PlainBatch) -> PlainBatch:
    """`batch` with the segment of every id, for inputs that are made ready beforehand."""
    return dataclasses.replace(
        batch,
        pieces=tuple(
            ids
            if ids.lengths is None
            else dataclasses.replace(
                ids, segments=plain_bags.segments_of(ids.lengths, len(ids.rows))
            )
            for ids in batch.pieces
        ),
    )


def padded(batch: PlainBatch, *, samples: int, ids: Sequence[int]) -> PlainBatch:
    """`batch` with zero samples up to `samples`, and its jagged pieces with ids up to `ids`."""
    filled = len(batch.dense)
    pieces = tuple(
        plain_bags.padded_ids(piece, filled=filled, samples=samples, ids=size)
        for piece, size in zip(batch.pieces, ids, strict=True)
    )
    return PlainBatch(dense=plain_bags.pad(batch.dense, samples), pieces=pieces)
