"""The packed form: `values`, the ids of all features, and `lengths` [features, n] that cut them.

`values` holds the bags of all samples for the first feature, then those for the second, and so on,
in the order of the config. With `user_values` and `user_lengths` [features of the user, 1 or n],
`values` and `lengths` hold the other features alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.config import DLRMConfig
from recflow_jax.serving.bags import PackedBags, check_lengths, merge
from recflow_jax.serving.tensors import TensorSpec, require

VALUES, LENGTHS, WEIGHTS = "values", "lengths", "weights"
USER = "user_"

Tensors = Mapping[str, np.ndarray]


class PackedForm:
    """Reads packed ids of one model's features."""

    def __init__(self, config: DLRMConfig) -> None:
        sides = [feature.side for feature in config.features]
        user = [f for f, side in enumerate(sides) if side == "user"]
        self._features = len(sides)
        self._all = _Part(config, "", range(self._features))
        self._item = _Part(config, "", [f for f in range(self._features) if f not in user])
        self._user = _Part(config, USER, user)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of this form."""
        return (*self._all.specs(columns=-1), *self._user.specs(columns=1))

    def samples(self, tensors: Tensors) -> int:
        """How many samples the tensors are for. Raises InputError."""
        parts = [part for part in self._parts(tensors) if part.members]
        return parts[0].lengths(tensors).shape[1]

    def bags(self, tensors: Tensors, samples: int) -> PackedBags:
        """The bags of `samples` samples. Raises InputError."""
        parts = [part for part in self._parts(tensors) if part.members]
        read = [(part.members, part.read(tensors, samples)) for part in parts]
        return read[0][1] if len(read) == 1 else merge(read, self._features)

    def _parts(self, tensors: Tensors) -> Sequence["_Part"]:
        apart = any(name in tensors for name in self._user.names)
        return (self._item, self._user) if apart else (self._all,)


class _Part:
    """Features that come packed together, in tensors whose names begin with `prefix`."""

    def __init__(self, config: DLRMConfig, prefix: str, members: Sequence[int]) -> None:
        self.members = tuple(members)
        self._features = [config.features[f].name for f in members]
        self._unweighted = np.array([not config.features[f].weighted for f in members], bool)
        self._weighted = config.weighted
        self._once = prefix == USER
        self.names = tuple(prefix + name for name in (VALUES, LENGTHS, WEIGHTS))
        self._values, self._lengths, self._weights = self.names

    def specs(self, *, columns: int) -> list[TensorSpec]:
        if not self.members:
            return []
        shape, once = (len(self.members), columns), self._once
        specs = [
            TensorSpec(name=self._values, datatype="INT64", shape=(-1,), optional=once),
            TensorSpec(name=self._lengths, datatype="INT32", shape=shape, optional=once),
        ]
        if self._weighted:
            specs.append(
                TensorSpec(name=self._weights, datatype="FP32", shape=(-1,), optional=True)
            )
        return specs

    def lengths(self, tensors: Tensors) -> np.ndarray:
        return require(tensors, self._lengths, kind="i", shape=(len(self.members), None))

    def read(self, tensors: Tensors, samples: int) -> PackedBags:
        ids = require(tensors, self._values, kind="i", shape=(None,))
        lengths = self.lengths(tensors)
        repeated = self._once and lengths.shape[1] == 1
        if lengths.shape[1] != samples and not repeated:
            raise InputError(
                f"input {self._lengths!r}: {lengths.shape[1]} columns for {samples} samples"
            )
        check_lengths(lengths, len(ids), names=self._features, ids_name=self._values)
        bags = PackedBags.packed(ids, lengths, self._read_weights(tensors, lengths, len(ids)))
        return bags.for_samples(samples) if repeated else bags

    def _read_weights(self, tensors: Tensors, lengths: np.ndarray, ids: int) -> np.ndarray | None:
        if self._weights not in tensors:
            return np.ones(ids, np.float32) if self._weighted else None
        weights = require(tensors, self._weights, kind="f", shape=(ids,))
        self._check_unweighted(weights, lengths)
        return weights

    def _check_unweighted(self, weights: np.ndarray, lengths: np.ndarray) -> None:
        """A weight of a feature that takes none would be lost: better an error."""
        per_bag = np.repeat(self._unweighted, lengths.shape[1])
        lost = np.flatnonzero(np.repeat(per_bag, lengths.ravel()) & (weights != 1))
        if len(lost):
            bag = int(np.searchsorted(np.cumsum(lengths), lost[0], side="right"))
            feature, sample = divmod(bag, lengths.shape[1])
            raise InputError(
                f"feature {self._features[feature]!r}, sample {sample}: weight "
                f"{weights[lost[0]]}, the feature takes none but 1"
            )
