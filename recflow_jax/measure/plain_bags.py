"""Bags in plain JAX, as its users write them: packed by numpy, gathered and summed by XLA.

Where every bag of a slot has the same length, ids are a rectangle: gathers are reshaped and sums
are static. Jagged bags are summed with `segment_sum` over sorted segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.tables import QuantisedTable, Table
from recflow_jax.batch import JaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlainIds:
    """The ids of a piece. rows: int32 [samples, ids per sample] where bags are of fixed length,
    else [ids], with `lengths` [samples * slots] and, where they were made ready, `segments` [ids].
    """

    rows: Any
    lengths: Any = None
    segments: Any = None
    weights: Any = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Slots that one gather from tables[table] serves. hotness: ids of each slot; None: jagged."""

    table: int
    slots: tuple[int, ...]
    dim: int
    means: tuple[bool, ...]
    hotness: tuple[int, ...] | None

    def zeros(self, *, samples: int, ids: int, weighted: bool) -> PlainIds:
        """Ids in host memory, all 0: of empty bags with room for `ids`, if they are jagged."""
        if self.hotness:
            shape, lengths = (samples, sum(self.hotness)), None
        else:
            shape, lengths = (ids,), np.zeros(samples * len(self.slots), np.int32)
        weights = np.zeros(shape, np.float32) if weighted else None
        return PlainIds(rows=np.zeros(shape, np.int32), lengths=lengths, weights=weights)


def pack(
    pieces: Sequence[Piece],
    rows: Int32[np.ndarray, " ids"],
    offsets: Int32[np.ndarray, " bags_and_one"],
    batch: JaggedBatch,
) -> tuple[PlainIds, ...]:
    """The ids of each piece in host memory. `rows` and `offsets` are of all slots, in the config's
    order. Raises ValueError if bags that should be of fixed length are not.
    """
    lengths = np.diff(offsets).reshape(batch.samples, -1)
    piece_of_slot = np.zeros(lengths.shape[1], np.int16)
    for index, piece in enumerate(pieces):
        _check_lengths(piece, lengths)
        piece_of_slot[list(piece.slots)] = index
    if len(pieces) == 1:
        return (_pack(pieces[0], lengths, rows, batch.weights),)
    piece_of_id = np.repeat(np.tile(piece_of_slot, batch.samples), lengths.ravel())
    packed = []
    for index, piece in enumerate(pieces):
        own = np.flatnonzero(piece_of_id == index)
        weights = None if batch.weights is None else batch.weights[own]
        packed.append(_pack(piece, lengths, rows[own], weights))
    return tuple(packed)


def _check_lengths(piece: Piece, lengths: np.ndarray) -> None:
    if piece.hotness is None:
        return
    wrong = np.argwhere(lengths[:, list(piece.slots)] != np.array(piece.hotness))
    if len(wrong):
        sample, place = wrong[0]
        slot = piece.slots[place]
        raise ValueError(
            f"sample {sample}, slot {slot}: {lengths[sample, slot]} ids, not {piece.hotness[place]}"
        )


def _pack(
    piece: Piece, lengths: np.ndarray, rows: np.ndarray, weights: np.ndarray | None
) -> PlainIds:
    if piece.hotness is None:
        own_lengths = lengths[:, list(piece.slots)].ravel().astype(np.int32)
        return PlainIds(rows=rows, lengths=own_lengths, weights=weights)
    shape = (len(lengths), sum(piece.hotness))
    return PlainIds(
        rows=rows.reshape(shape), weights=None if weights is None else weights.reshape(shape)
    )


def padded_ids(piece: PlainIds, *, filled: int, samples: int, ids: int) -> PlainIds:
    """`piece` of `filled` samples with room for `samples` and, if it is jagged, `ids`."""
    if piece.lengths is None:
        size, lengths = samples, None
    else:
        size, lengths = ids, pad(piece.lengths, len(piece.lengths) // filled * samples)
    weights = None if piece.weights is None else pad(piece.weights, size)
    return PlainIds(rows=pad(piece.rows, size), lengths=lengths, weights=weights)


def pad(values: np.ndarray, length: int) -> np.ndarray:
    """`values` with zeros behind, `length` in all along the first axis."""
    return np.pad(values, ((0, length - len(values)), *[(0, 0)] * (values.ndim - 1)))


def segments_of(lengths: Int32[Array, " bags"], ids: int) -> Int32[Array, " ids"]:
    """The bag of each id; padding behind the last bag gets a segment that is dropped."""
    bags = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
    padding = ids - jnp.sum(lengths, keepdims=True)
    return jnp.repeat(bags, jnp.concatenate([lengths, padding]), total_repeat_length=ids)


def _gather(table: Table, rows: Array, weights: Array | None) -> Array:
    if isinstance(table, QuantisedTable):
        vectors = _take(table.values, rows) * _take(table.scales, rows)[..., None]
    else:
        vectors = _take(table, rows)
    return vectors if weights is None else vectors * weights[..., None]


def _take(array: Array, rows: Array) -> Array:
    return array.at[rows].get(mode="promise_in_bounds").astype(jnp.float32)


def sum_slices(
    table: Table, piece: Piece, ids: PlainIds, samples: int
) -> Float[Array, "samples width"]:
    """One gather [samples, ids, dim], then a static sum per slot."""
    vectors = _gather(table, ids.rows, ids.weights)
    starts = np.cumsum((0, *(piece.hotness or ()))).tolist()
    pooled = [
        _scaled(vectors[:, start:stop].sum(axis=1), mean, stop - start)
        for start, stop, mean in zip(starts, starts[1:], piece.means, strict=False)
    ]
    return jnp.concatenate(pooled, axis=1)


def sum_per_hotness(
    table: Table, piece: Piece, ids: PlainIds, samples: int
) -> Float[Array, "samples width"]:
    """One gather [samples, slots, hotness, dim] for the slots of each hotness."""
    hotness = piece.hotness or ()
    starts = np.cumsum([0, *hotness])
    pooled: dict[int, Array] = {}
    for hot in sorted(set(hotness)):
        members = [i for i, h in enumerate(hotness) if h == hot]
        take = np.concatenate([np.arange(starts[i], starts[i] + hot) for i in members])
        shape = (samples, len(members), hot)
        weights = None if ids.weights is None else ids.weights[:, take].reshape(shape)
        sums = _gather(table, ids.rows[:, take].reshape(shape), weights).sum(axis=2)
        for place, slot in enumerate(members):
            pooled[slot] = _scaled(sums[:, place], piece.means[slot], hot)
    return jnp.concatenate([pooled[i] for i in range(len(hotness))], axis=1)


def _scaled(sums: Array, mean: bool, ids: int) -> Array:
    return sums / max(ids, 1) if mean else sums


def sum_segments(
    table: Table, piece: Piece, ids: PlainIds, samples: int
) -> Float[Array, "samples width"]:
    """One gather [ids, dim], then segment_sum over sorted segments."""
    vectors = _gather(table, ids.rows, ids.weights)
    segments = ids.segments
    if segments is None:
        segments = segments_of(ids.lengths, len(ids.rows))
    bags = samples * len(piece.slots)
    sums = jax.ops.segment_sum(vectors, segments, bags, indices_are_sorted=True)
    pooled = sums.reshape(samples, len(piece.slots), piece.dim)
    if any(piece.means):
        counts = jnp.maximum(ids.lengths.reshape(samples, -1), 1)
        pooled = pooled * jnp.where(jnp.array(piece.means), 1 / counts, 1)[:, :, None]
    return pooled.reshape(samples, -1)
