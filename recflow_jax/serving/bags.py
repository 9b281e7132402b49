"""Bags as clients pack them, feature by feature, turned into the engine's sample-major order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recflow_jax.batch import InputError, JaggedBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBags:
    """Bag (f, s) is ids[starts[f, s]:][:lengths[f, s]]; several bags may be the same ids.

    ids, weights (or None): [total]. starts, lengths: int64 [features, samples].
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def packed(
        cls, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray | None = None
    ) -> "PackedBags":
        """Bags that lie one behind the other: all samples of feature 0, then of feature 1, ..."""
        wide = lengths.astype(np.int64)
        starts = np.cumsum(wide.ravel()) - wide.ravel()
        return cls(ids=ids, starts=starts.reshape(wide.shape), lengths=wide, weights=weights)

    def for_samples(self, samples: int) -> "PackedBags":
        """The bags of one sample, given to all."""
        shape = (len(self.lengths), samples)
        return PackedBags(
            ids=self.ids,
            starts=np.broadcast_to(self.starts, shape),
            lengths=np.broadcast_to(self.lengths, shape),
            weights=self.weights,
        )

    def batch(self, dense: np.ndarray) -> JaggedBatch:
        """The samples, with their dense features, sample-major; frozen, as nobody else has them."""
        lengths = self.lengths.T.ravel()
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.repeat(self.starts.T.ravel() - offsets[:-1], lengths)
        places += np.arange(offsets[-1])
        weights = None if self.weights is None else self.weights[places]
        values = self.ids[places]
        return JaggedBatch(dense=dense, values=values, offsets=offsets, weights=weights).frozen()


def merge(parts: Sequence[tuple[Sequence[int], PackedBags]], features: int) -> PackedBags:
    """One set of `features` bags per sample, from parts that have some of the features each.

    Parts have as many samples as one another, and weights all or none.
    """
    samples = parts[0][1].lengths.shape[1] if parts else 0
    starts, lengths = np.zeros((2, features, samples), np.int64)
    base = 0
    for members, part in parts:
        starts[list(members)] = part.starts + base
        lengths[list(members)] = part.lengths
        base += len(part.ids)
    weights = [part.weights for _, part in parts if part.weights is not None]
    return PackedBags(
        ids=np.concatenate([np.zeros(0, np.int32), *(part.ids for _, part in parts)]),
        starts=starts,
        lengths=lengths,
        weights=np.concatenate(weights) if weights else None,
    )


def check_lengths(lengths: np.ndarray, ids: int, *, names: Sequence[str], ids_name: str) -> None:
    """Raises InputError unless `lengths` [features, samples] are those of so many ids.

    names: the features'. ids_name: the name of the tensor of ids.
    """
    if lengths.min(initial=0) < 0:
        feature, sample = np.argwhere(lengths < 0)[0].tolist()
        raise InputError(
            f"feature {names[feature]!r}, sample {sample}: length {lengths[feature, sample]} is "
            "below 0"
        )
    total = int(lengths.sum(dtype=np.int64))
    if total != ids or lengths.max(initial=0) > ids:  # huge ones may add up to anything
        raise InputError(f"input {ids_name!r}: {ids} ids, the lengths add up to {total}")
