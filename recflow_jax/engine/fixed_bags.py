"""Samples whose bags are all as long as expected: known before they come but for their ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recflow_jax.batch import MAX_IDS, JaggedBatch

BLOCK_IDS = 2**16  # checked at a time, so that the arrays in between stay in the cache
KEPT_STEPS = 2**13


class FixedBags:
    """What can be known, before they come, of samples with bags of `lengths`: a block of them.

    lengths: by feature. limits, bases: of each feature, the rows of its table, and where they start
    in its group.
    """

    def __init__(self, lengths: Mapping[str, int], limits: np.ndarray, bases: np.ndarray) -> None:
        self._lengths = tuple(lengths.items())
        per_sample = [*lengths.values()]
        self.ids = sum(per_sample)
        self._samples = max(1, BLOCK_IDS // max(self.ids, 1))
        self._offset_bytes = bag_offsets(per_sample, self._samples).tobytes()
        self._limits = np.tile(np.repeat(limits, per_sample), self._samples)
        self._bases = np.tile(np.repeat(bases, per_sample), self._samples)
        self._kept_steps = {n: n * np.arange(KEPT_STEPS) for n in {*per_sample, self.ids}}

    def id_offsets(self, samples: int) -> np.ndarray:
        """int64 [samples + 1]: the ids before each sample; not to be written to."""
        return self._steps(self.ids, samples)

    def are_in(self, batch: JaggedBatch) -> bool:
        """Whether all bags of `batch` are as long as these."""
        if len(batch.values) != batch.samples * self.ids:
            return False
        for start in range(0, batch.samples, self._samples):
            first = start * len(self._lengths)
            found = batch.offsets[first : first + self._samples * len(self._lengths) + 1]
            found = found - start * self.ids if start else found
            if not self._offset_bytes.startswith(found.tobytes()):
                return False
        return True

    def join(self, sparse: Mapping[str, Any], samples: int) -> np.ndarray | None:
        """The ids of features by name, sample after sample: integers [samples * ids].

        None unless each is in an array, and has all its bags as long as these.
        """
        if not self._lengths or len(sparse) != len(self._lengths):
            return None
        columns = []
        for name, length in self._lengths:
            column = self._column(sparse.get(name), length, samples)
            if column is None:
                return None
            columns.append(column)
        joined = np.concatenate(columns, axis=1).reshape(-1)
        # Unsigned and signed integers together may have become floats.
        return joined if joined.dtype.kind in "iu" else None

    def rows(self, values: np.ndarray) -> np.ndarray | None:
        """The ids as rows of their groups; None if one is outside its table."""
        rows, step = np.empty(len(values), np.int32), max(len(self._limits), 1)
        for start in range(0, len(values), step):
            ids, out = values[start : start + step], rows[start : start + step]
            if not write_rows(ids, self._limits[: len(ids)], self._bases[: len(ids)], out=out):
                return None
        return rows

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
        return offsets.shape == expected.shape and not np.count_nonzero(offsets != expected)

    def _steps(self, step: int, samples: int) -> np.ndarray:
        """int64 [samples + 1]: 0, step, 2 * step, ...; not to be written to."""
        kept = self._kept_steps[step]
        return kept[: samples + 1] if samples < len(kept) else step * np.arange(samples + 1)


def bag_offsets(lengths: Sequence[int], samples: int) -> np.ndarray:
    """int64 [samples * features + 1]: the offsets of samples with bags of `lengths`."""
    return np.concatenate([[0], np.cumsum(np.tile(np.array(lengths, np.int64), samples))])


def write_rows(ids: np.ndarray, limits: np.ndarray, bases: np.ndarray, *, out: np.ndarray) -> bool:
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
