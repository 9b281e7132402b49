"""Samples whose bags are all as long as expected: known before they come but for their ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recflow_jax.batch import MAX_IDS, JaggedBatch
from recflow_jax.engine import free_copies
from recflow_jax.engine.held_copies import UNSEEN, copy, side_by_side
from scheduling.host_costs import LARGE_IDS

COPIED_IDS = 2**18  # at a time, checked while they are in the cache
KEPT_BAGS = 2**18  # whose offsets are known beforehand
WIDE_IDS = UNSEEN  # looked at side by side: numpy goes through short rows slowly
KEPT_STEPS = 2**13 + 1
INT32 = np.dtype(np.int32)


class FixedBags:
    """What can be known, before they come, of samples with bags of `lengths`: a block of them.

    lengths: by feature. limits: of each feature, the rows of its table.
    """

    def __init__(self, lengths: Mapping[str, int], limits: np.ndarray) -> None:
        self._lengths = tuple(lengths.items())
        per_sample = [*lengths.values()]
        self.ids = sum(per_sample)
        self._is_one_hot = {*per_sample} == {1}
        self._block = max(1, COPIED_IDS // max(self.ids, 1)) * self.ids
        self._kept_samples = max(1, KEPT_BAGS // max(len(per_sample), 1))
        self._offset_bytes = bag_offsets(per_sample, self._kept_samples).tobytes()
        self._limits = np.repeat(limits, per_sample)
        self._wide_limits = np.tile(self._limits, max(1, WIDE_IDS // max(self.ids, 1)))
        self._kept_steps = {n: n * np.arange(KEPT_STEPS) for n in {*per_sample, self.ids}}

    def id_offsets(self, samples: int) -> np.ndarray:
        """int64 [samples + 1]: the ids before each sample; not to be written to."""
        return self._steps(self.ids, samples)

    def are_in(self, batch: JaggedBatch) -> bool:
        """Whether all bags of `batch` are as long as these."""
        if len(batch.values) != batch.samples * self.ids:
            return False
        for start in range(0, batch.samples, self._kept_samples):
            first = start * len(self._lengths)
            found = batch.offsets[first : first + self._kept_samples * len(self._lengths) + 1]
            found = found - start * self.ids if start else found
            if not self._offset_bytes.startswith(np.ascontiguousarray(found)):
                return False
        return True

    def can_copy(self, batch: JaggedBatch) -> bool:
        """Whether `copy` takes `batch`: arrays in one piece, of the types that slices have."""
        arrays = (batch.values, batch.dense, batch.offsets)
        dtypes = (INT32, np.dtype(np.float32), np.dtype(np.int64))
        return batch.samples <= self._kept_samples and all(
            array.dtype == dtype and array.flags.c_contiguous
            for array, dtype in zip(arrays, dtypes, strict=True)
        )

    def copy(self, batch: JaggedBatch, *, ids: np.ndarray, dense: np.ndarray) -> bool:
        """As `are_in`. If so, ids and dense features have been copied; Python's interpreter was
        left to others for all of it.
        """
        if len(batch.values) != batch.samples * self.ids:
            return False
        known = np.frombuffer(self._offset_bytes, np.int64)[: len(batch.offsets)]
        joins = [([batch.values], ids), ([batch.dense.reshape(-1)], dense.reshape(-1))]
        return free_copies.join_if_same(batch.offsets, known, *joins)

    def join(self, sparse: Mapping[str, Any], samples: int) -> np.ndarray | None:
        """The ids of features by name, sample after sample: int32 [samples * ids].

        None unless each is in an array, has all its bags as long as these, and is of its table.
        """
        if not self._lengths or len(sparse) != len(self._lengths):
            return None
        joined = self._joined_one_hot(sparse, samples)
        if joined is None:
            columns = []
            for name, length in self._lengths:
                column = self._column(sparse.get(name), length, samples)
                if column is None:
                    return None
                columns.append(column)
            joined = side_by_side(columns).reshape(-1)
        if joined.dtype != INT32:
            # Unsigned and signed integers together may have become floats.
            return self.as_int32(joined) if joined.dtype.kind in "iu" else None
        return joined if self.are_of_tables(joined) else None

    def offsets(self, samples: int) -> np.ndarray:
        """int64 [samples * features + 1]: where each bag starts."""
        return bag_offsets([length for _, length in self._lengths], samples)

    def are_of_tables(self, ids: np.ndarray) -> bool:
        """Whether each of these int32 ids is a row of its table."""
        rest = len(ids) - len(ids) % max(len(self._wide_limits), 1)
        return are_below(ids[:rest], self._wide_limits) and are_below(ids[rest:], self._limits)

    def as_int32(
        self, values: np.ndarray, *, out: np.ndarray | None = None, checks: bool = True
    ) -> np.ndarray | None:
        """The ids; a copy, in `out` if that is given, else unless nobody writes to them. None if
        one is outside its table, where that is looked at, or too large for int32.
        """
        if out is None and is_shared(values):
            return values if not checks or self.are_of_tables(values) else None
        copied = np.empty(len(values), np.int32) if out is None else out
        step = max(self._block if checks else len(values), 1)
        for start in range(0, len(values), step):
            block = slice(start, start + step)
            if not copy_ids(values[block], out=copied[block], of=len(values)):
                return None
            if checks and not self.are_of_tables(copied[block]):
                return None
        return copied

    def _joined_one_hot(self, sparse: Mapping[str, Any], samples: int) -> np.ndarray | None:
        """The ids of a few samples, where each feature has one and gives them in an array, all of
        one type; looked at together they take a quarter of the time.
        """
        if not self._is_one_hot or samples > UNSEEN:
            return None
        columns = [sparse.get(name) for name, _ in self._lengths]
        shape, dtype = (samples,), getattr(columns[0], "dtype", INT32)
        for column in columns:
            if type(column) is not np.ndarray or column.shape != shape or column.dtype != dtype:
                return None
        return np.array(columns).T.reshape(-1)

    def _column(self, entry: Any, length: int, samples: int) -> np.ndarray | None:
        """ids [samples, length] of one feature."""
        is_listed = type(entry) is tuple and len(entry) == 2
        values = entry[0] if is_listed else entry
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
            return None
        if values.shape != (samples * length,):
            return None
        has_lengths = self._are_offsets(entry[1], length, samples) if is_listed else length == 1
        return values.reshape(samples, length) if has_lengths else None

    def _are_offsets(self, offsets: Any, length: int, samples: int) -> bool:
        if not isinstance(offsets, np.ndarray) or offsets.dtype.kind not in "iu":
            return False
        expected = self._steps(length, samples)
        if offsets.dtype == expected.dtype and offsets.ndim == 1:
            return offsets.tobytes() == expected.tobytes()
        return offsets.shape == expected.shape and not np.count_nonzero(offsets != expected)

    def _steps(self, step: int, samples: int) -> np.ndarray:
        """int64 [samples + 1]: 0, step, 2 * step, ...; not to be written to."""
        kept = self._kept_steps[step]
        return kept[: samples + 1] if samples < len(kept) else step * np.arange(samples + 1)


def is_shared(ids: np.ndarray) -> bool:
    """Whether these need no copy: int32 in one piece that nobody writes to."""
    flags = ids.flags
    return ids.dtype == INT32 and not flags.writeable and flags.c_contiguous


def bag_offsets(lengths: Sequence[int], samples: int) -> np.ndarray:
    """int64 [samples * features + 1]: the offsets of samples with bags of `lengths`."""
    return np.concatenate([[0], np.cumsum(np.tile(np.array(lengths, np.int64), samples))])


def copy_ids(ids: np.ndarray, *, out: np.ndarray, of: int) -> bool:
    """Writes int32 ids into `out`; False if one of a wider type is not in [0, 2**31).

    It is the copies that are to be held against limits: `ids` may change meanwhile. of: how many
    the request has; while a large one is copied, Python's interpreter is left to others.
    """
    if ids.dtype != INT32:
        ids = ids.astype(np.int64, copy=False)
        if len(ids) and ids.view(np.uint64).max() > MAX_IDS:
            return False
        np.copyto(out, ids, casting="unsafe")
    elif of < LARGE_IDS:
        copy(ids, out)
    elif ids.flags.c_contiguous:
        free_copies.join(([ids], out))
    else:
        np.copyto(out, ids)
    return True


def are_below(ids: np.ndarray, limits: np.ndarray) -> bool:
    """Whether all int32 `ids` are in [0, limit): uint32 `limits` of one sample's ids after another.

    It is the largest ids that are compared: nothing else as long as the ids is read or written.
    """
    if not len(ids):
        return True
    samples = ids.view(np.uint32).reshape(-1, len(limits))
    largest = samples.max(axis=0) if len(samples) > 1 else samples[0]
    return not np.count_nonzero(largest >= limits)
