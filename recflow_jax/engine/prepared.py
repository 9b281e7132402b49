"""Samples as they wait for their slice: their ids int32 already.

Work per id is done here, on the caller's thread, in few passes: the launcher only copies. Ids and
floats of fixed bags can be looked at by the device, and by `check` where that finds something.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from recflow_jax.batch import (
    InputError,
    JaggedBatch,
    check_batch,
    check_shapes,
    dense_array,
)
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import expected_ids_per_sample
from recflow_jax.engine.berths import Berth, Room
from recflow_jax.engine.fixed_bags import FixedBags
from recflow_jax.engine.held_copies import kept
from recflow_jax.engine.jagged_bags import WORTH_IDS, JaggedBags
from recflow_jax.layout import Layout
from scheduling.host_costs import LARGE_IDS

FindRoom = Callable[[int], Room | None]


@dataclass(slots=True, kw_only=True, eq=False)
class Prepared:
    """`n` samples in arrays that nobody else writes to, to be copied into slices.

    dense: float32 [n, dense_width]. slot_offsets: int32 [n * slots + 1], where each slot's ids
    start, or None where all bags are as `DLRMConfig.fixed_bags` says. rows: int32 [total], each id
    as a row of its group; where slot_offsets is None, as a row of its table. id_offsets: int64
    [n + 1], the ids before each sample. weights: float32 [total], or None where no feature is
    weighted. is_checked: whether each row is known to be in its table, and each float to be finite;
    if not, bags are fixed. berth, place: where rows lie, and from which of its elements on, if they
    lie in a slice's buffer.
    """

    dense: np.ndarray
    rows: np.ndarray
    id_offsets: np.ndarray
    slot_offsets: np.ndarray | None
    weights: np.ndarray | None
    is_checked: bool = True
    berth: Berth | None = None
    place: int = 0

    @property
    def samples(self) -> int:
        """Number of samples, n."""
        return len(self.dense)

    def part(self, start: int, stop: int) -> "Prepared":
        """Samples [start, stop), as views where numpy allows."""
        ids = self.id_offsets[start : stop + 1]
        place = slice(ids[0], ids[-1])
        return Prepared(
            dense=self.dense[start:stop],
            rows=self.rows[place],
            id_offsets=ids - ids[0],
            slot_offsets=self._slots_of(start, stop),
            weights=None if self.weights is None else self.weights[place],
            is_checked=self.is_checked,
            berth=self.berth,
            place=self.place + int(ids[0]),
        )

    def _slots_of(self, start: int, stop: int) -> np.ndarray | None:
        if self.slot_offsets is None:
            return None
        slots = (len(self.slot_offsets) - 1) // max(self.samples, 1)
        offsets = self.slot_offsets[start * slots : stop * slots + 1]
        return offsets - offsets[0]


class Preparer:
    """Checks and prepares samples of one model; any thread may call.

    It sees only whether all is well: what is not, `check_batch` finds and names.
    """

    def __init__(self, config: DLRMConfig, layout: Layout, *, max_ids: int) -> None:
        self._config = config
        self._layout = layout
        self._max_ids = max_ids
        self._fixed = None
        if config.fixed_bags is not None and sum(config.fixed_bags) <= max_ids:
            lengths = dict(zip([f.name for f in config.features], config.fixed_bags, strict=True))
            self._fixed = FixedBags(lengths, np.array(config.feature_rows, np.uint32))
        is_worth = self._fixed is None and expected_ids_per_sample(config) >= WORTH_IDS
        self._jagged = JaggedBags(config, layout, compiles=is_worth)

    def prepare(
        self, batch: JaggedBatch, *, checks_later: bool = False, find_room: FindRoom | None = None
    ) -> Prepared:
        """The samples as they are now, whatever becomes of those of `batch`'s arrays that can be
        written to. checks_later: whether ids of samples with fixed bags are of their tables, and
        floats finite, is left to `check`. find_room: for so many ids with fixed bags, which are
        copied there; without, and where it finds none, only what can be written to is copied, to
        memory of its own.

        Raises InputError that names feature, sample and value.
        """
        prepared = self.prepare_fixed(batch, checks_later=checks_later, find_room=find_room)
        prepared = prepared or self._prepare_jagged(batch)
        return self._refuse(batch) if prepared is None else prepared

    def prepare_fixed(
        self, batch: JaggedBatch, *, checks_later: bool = False, find_room: FindRoom | None = None
    ) -> Prepared | None:
        """As `prepare`; None unless all bags are fixed."""
        check_shapes(self._config, batch)
        bags = self._fixed
        if bags is None:
            return None
        if checks_later and find_room and len(batch.values) >= LARGE_IDS:
            prepared = self._copied(bags, batch, find_room)
            if prepared is not None:
                return prepared
        if not bags.are_in(batch):
            return None
        given = (batch.dense, batch.values, batch.weights)
        prepared = self._prepare_fixed(bags, *given, checks_later=checks_later, find_room=find_room)
        return self._refuse(batch) if prepared is None else prepared

    def prepare_in_place(self, dense: Any, weights: np.ndarray | None, berth: Berth) -> Prepared:
        """Samples of a model with fixed bags whose ids lie in a berth, alone and from its start on;
        they are left to `check`. Raises InputError.
        """
        bags = self._fixed
        if bags is None:
            raise InputError(f"{self._config.name} has no fixed bags")
        dense = dense_array(self._config, dense)
        room, offsets = berth.room(len(dense) * bags.ids), bags.id_offsets(len(dense))
        prepared = _with_floats(dense, weights, room.array, offsets, None, is_checked=False)
        assert prepared is not None
        if not bags.ids:  # the device looks at samples that have ids
            self.check(prepared)
            prepared.is_checked = True
        _stay_in(room, prepared)
        return prepared

    def check(self, samples: Prepared) -> None:
        """Raises the InputError that `prepare` would have raised, if that was left for later."""
        if samples.is_checked:
            return
        assert self._fixed is not None
        dense, rows, weights = samples.dense, samples.rows, samples.weights
        if self._fixed.are_of_tables(rows) and _are_finite(dense, weights):
            return
        offsets = self._fixed.offsets(samples.samples)
        self._refuse(JaggedBatch(dense=dense, values=rows, offsets=offsets, weights=weights))

    def prepare_features(self, dense: Any, sparse: Mapping[str, Any]) -> Prepared:
        """`prepare` of what JaggedBatch.from_features takes; fixed bags do without the batch."""
        prepared = self._prepare_fixed_features(dense, sparse)
        if prepared is None:
            return self.prepare(JaggedBatch.from_features(self._config, dense, sparse))
        return prepared

    def _prepare_fixed_features(self, dense: Any, sparse: Mapping[str, Any]) -> Prepared | None:
        if self._fixed is None or self._config.weighted:
            return None
        dense = dense_array(self._config, dense)
        rows = self._fixed.join(sparse, len(dense))
        if rows is None:
            return None
        return _with_floats(dense, None, rows, self._fixed.id_offsets(len(dense)), None)

    def _prepare_fixed(
        self,
        bags: FixedBags,
        dense: np.ndarray,
        values: np.ndarray,
        weights: np.ndarray | None,
        *,
        checks_later: bool = False,
        find_room: FindRoom | None = None,
    ) -> Prepared | None:
        room = find_room(len(values)) if find_room else None
        is_checked = not (checks_later and bags.ids)  # the device looks at samples that have ids
        rows = bags.as_int32(values, out=room and room.array, checks=is_checked)
        if rows is None:
            return None
        offsets = bags.id_offsets(len(dense))
        prepared = _with_floats(dense, weights, rows, offsets, None, is_checked=is_checked)
        if room is not None and prepared is not None:
            _stay_in(room, prepared)
        return prepared

    def _copied(self, bags: FixedBags, batch: JaggedBatch, find_room: FindRoom) -> Prepared | None:
        """A large request, looked at and copied at once, to be checked later; None where it can't
        be.
        """
        if batch.weights is not None or not bags.can_copy(batch):
            return None
        room = find_room(len(batch.values))
        if room is None:
            return None
        dense = room.dense(*batch.dense.shape)
        if not bags.copy(batch, ids=room.array, dense=dense):
            return None
        prepared = Prepared(
            dense=dense,
            rows=room.array,
            id_offsets=bags.id_offsets(batch.samples),
            slot_offsets=None,
            weights=None,
            is_checked=False,
        )
        _stay_in(room, prepared)
        return prepared

    def _prepare_jagged(self, batch: JaggedBatch) -> Prepared | None:
        offsets = batch.offsets.copy()
        rows = self._jagged.rows(batch.values, offsets)
        if rows is None:
            return None
        id_offsets = offsets[:: len(self._config.features)].copy()
        _check_ids_per_sample(id_offsets, self._max_ids)
        slots = self._layout.slots_of(offsets)
        return _with_floats(batch.dense, batch.weights, rows, id_offsets, slots)

    def _refuse(self, batch: JaggedBatch) -> NoReturn:
        check_batch(self._config, batch)
        raise InputError("the samples changed while they were checked")


def _with_floats(
    dense: np.ndarray,
    weights: np.ndarray | None,
    rows: np.ndarray,
    id_offsets: np.ndarray,
    slot_offsets: np.ndarray | None,
    *,
    is_checked: bool = True,
) -> Prepared | None:
    dense, weights = kept(dense), None if weights is None else kept(weights)
    if is_checked and not _are_finite(dense, weights):
        return None
    return Prepared(
        dense=dense,
        rows=rows,
        id_offsets=id_offsets,
        slot_offsets=slot_offsets,
        weights=weights,
        is_checked=is_checked,
    )


def _stay_in(room: Room, prepared: Prepared) -> None:
    """Its rows lie in this room."""
    room.keep()
    prepared.berth, prepared.place = room.berth, room.place


def _are_finite(dense: np.ndarray, weights: np.ndarray | None) -> bool:
    return _is_finite(dense) and (weights is None or _is_finite(weights))


def _is_finite(values: np.ndarray) -> bool:
    """By the largest and the smallest: either is NaN if one is."""
    return not values.size or (math.isfinite(values.max()) and math.isfinite(values.min()))


def _check_ids_per_sample(id_offsets: np.ndarray, most: int) -> None:
    if id_offsets[-1] <= most:
        return
    ids = np.diff(id_offsets)
    sample = int(ids.argmax())
    if ids[sample] > most:
        raise InputError(f"sample {sample} has {ids[sample]} ids in all, more than {most}")
