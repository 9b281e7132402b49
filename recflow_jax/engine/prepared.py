"""Samples as they wait for their slice: checked, their ids int32 rows of the tables already.

All work per id is done here, on the caller's thread, in few passes: the launcher only copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recflow_jax.batch import MAX_IDS, InputError, JaggedBatch, check_batch, check_shapes
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout

BLOCK_IDS = 2**16  # checked at a time, so that the arrays in between stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """`n` samples in arrays that nobody else writes to, to be copied into slices.

    dense: float32 [n, dense_width]. rows: int32 [total], each id as a row of its group.
    id_offsets: int64 [n + 1], the ids before each sample. slot_offsets: int32 [n * slots + 1],
    where each slot's rows start, or None where all bags are as `DLRMConfig.fixed_bags` says.
    weights: float32 [total], or None where no feature is weighted.
    """

    dense: np.ndarray
    rows: np.ndarray
    id_offsets: np.ndarray
    slot_offsets: np.ndarray | None
    weights: np.ndarray | None

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
        self._limits = np.array(config.feature_rows, np.uint32)
        self._bases = np.array(layout.feature_bases, np.int32)
        self._longest = np.array([f.longest_bag or MAX_IDS for f in config.features])
        self._bounded = bool((self._longest < MAX_IDS).any())
        self._fixed = None
        if config.fixed_bags is not None and sum(config.fixed_bags) <= max_ids:
            self._fixed = _FixedBags(config.fixed_bags, self._limits, self._bases)

    def prepare(self, batch: JaggedBatch) -> Prepared:
        """The samples as they are now, whatever becomes of `batch`'s arrays.

        Raises InputError that names feature, sample and value.
        """
        check_shapes(self._config, batch)
        if self._fixed is not None and self._fixed.are_in(batch):
            prepared = self._prepare_fixed(batch, self._fixed)
        else:
            prepared = self._prepare_jagged(batch)
        if prepared is None:
            check_batch(self._config, batch)
            raise InputError("the samples changed while they were checked")
        return prepared

    def _prepare_fixed(self, batch: JaggedBatch, bags: "_FixedBags") -> Prepared | None:
        rows = bags.rows(batch.values)
        if rows is None:
            return None
        return self._with_floats(batch, rows, bags.id_offsets(batch.samples), None)

    def _prepare_jagged(self, batch: JaggedBatch) -> Prepared | None:
        offsets, n = batch.offsets.copy(), batch.samples
        lengths = offsets[1:] - offsets[:-1]
        if not self._bags_are_well(batch, offsets, lengths):
            return None
        rows = np.empty(len(batch.values), np.int32)
        limits = np.repeat(np.tile(self._limits, n), lengths)
        bases = np.repeat(np.tile(self._bases, n), lengths)
        if not _write_rows(batch.values, limits, bases, out=rows):
            return None
        id_offsets = offsets[:: batch.features].copy() if batch.features else np.zeros(n + 1, int)
        _check_ids_per_sample(id_offsets, self._max_ids)
        return self._with_floats(batch, rows, id_offsets, self._layout.slots_of(offsets))

    def _bags_are_well(self, batch: JaggedBatch, offsets: np.ndarray, lengths: np.ndarray) -> bool:
        if offsets[0] != 0 or offsets[-1] != len(batch.values) or np.count_nonzero(lengths < 0):
            return False
        too_long = self._bounded and lengths.reshape(-1, len(self._longest)) > self._longest
        return not np.count_nonzero(too_long)

    def _with_floats(
        self,
        batch: JaggedBatch,
        rows: np.ndarray,
        id_offsets: np.ndarray,
        slot_offsets: np.ndarray | None,
    ) -> Prepared | None:
        dense = batch.dense.copy()
        weights = None if batch.weights is None else batch.weights.copy()
        if not _is_finite(dense) or not (weights is None or _is_finite(weights)):
            return None
        return Prepared(
            dense=dense,
            rows=rows,
            id_offsets=id_offsets,
            slot_offsets=slot_offsets,
            weights=weights,
        )


class _FixedBags:
    """What can be known, before they come, of samples with bags of `lengths`: a block of them."""

    def __init__(self, lengths: Sequence[int], limits: np.ndarray, bases: np.ndarray) -> None:
        self.ids = sum(lengths)
        self._features = len(lengths)
        self._samples = max(1, BLOCK_IDS // max(self.ids, 1))
        self._offsets = bag_offsets(lengths, self._samples)
        self._id_offsets = self.ids * np.arange(1, dtype=np.int64)
        self._limits = np.tile(np.repeat(limits, lengths), self._samples)
        self._bases = np.tile(np.repeat(bases, lengths), self._samples)

    def are_in(self, batch: JaggedBatch) -> bool:
        """Whether all bags of `batch` are as long as these."""
        if len(batch.values) != batch.samples * self.ids:
            return False
        for start in range(0, batch.samples, self._samples):
            first = start * self._features
            found = batch.offsets[first : first + len(self._offsets)]
            expected = self._offsets[: len(found)]
            if np.count_nonzero(found != (expected + start * self.ids if start else expected)):
                return False
        return True

    def id_offsets(self, samples: int) -> np.ndarray:
        """int64 [samples + 1]: the ids before each sample; shared, not to be written to."""
        offsets = self._id_offsets
        if len(offsets) <= samples:
            offsets = self._id_offsets = self.ids * np.arange(2 * samples + 1, dtype=np.int64)
            offsets.flags.writeable = False
        return offsets[: samples + 1]

    def rows(self, values: np.ndarray) -> np.ndarray | None:
        """The ids as rows of their groups; None if one is outside its table."""
        rows, step = np.empty(len(values), np.int32), max(len(self._limits), 1)
        for start in range(0, len(values), step):
            ids, out = values[start : start + step], rows[start : start + step]
            if not _write_rows(ids, self._limits[: len(ids)], self._bases[: len(ids)], out=out):
                return None
        return rows


def bag_offsets(lengths: Sequence[int], samples: int) -> np.ndarray:
    """int64 [samples * features + 1]: the offsets of samples with bags of `lengths`."""
    return np.concatenate([[0], np.cumsum(np.tile(np.array(lengths, np.int64), samples))])


def _write_rows(ids: np.ndarray, limits: np.ndarray, bases: np.ndarray, *, out: np.ndarray) -> bool:
    """Writes id + base into `out`; False if an id is not in [0, limit).

    Ids are read once more than they are copied, but it is the copies that are held against the
    limits: no row is ever outside its group, whoever writes to `ids` meanwhile.
    """
    if ids.dtype != np.int32:
        ids = ids.astype(np.int64, copy=False)
        if len(ids) and ids.view(np.uint64).max() > MAX_IDS:
            return False
    np.copyto(out, ids, casting="unsafe")
    if np.count_nonzero(out.view(np.uint32) >= limits):
        return False
    out += bases
    return True


def _is_finite(values: np.ndarray) -> bool:
    return bool(np.count_nonzero(np.isfinite(values)) == values.size)


def _check_ids_per_sample(id_offsets: np.ndarray, most: int) -> None:
    if id_offsets[-1] <= most:
        return
    ids = np.diff(id_offsets)
    sample = int(ids.argmax())
    if ids[sample] > most:
        raise InputError(f"sample {sample} has {ids[sample]} ids in all, more than {most}")
