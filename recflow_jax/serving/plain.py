"""The plain form: one tensor of ids per feature, [n] or [n, k] with k ids in each bag."""

from collections.abc import Collection, Mapping

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.config import DLRMConfig, FeatureConfig
from recflow_jax.serving.bags import PackedBags, merge
from recflow_jax.serving.tensors import TensorSpec, require

Tensors = Mapping[str, np.ndarray]


class PlainForm:
    """Reads ids feature by feature, of a model none of whose features is named as in `taken`."""

    def __init__(self, config: DLRMConfig, taken: Collection[str]) -> None:
        self._features = config.features
        self._weighted = config.weighted
        self.possible = not {feature.name for feature in config.features} & {*taken}

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of this form, if the model's bags have fixed lengths; else none."""
        if not self.possible or not all(_is_fixed(feature) for feature in self._features):
            return ()
        return tuple(
            TensorSpec(name=f.name, datatype="INT64", shape=_shape(f), optional=True)
            for f in self._features
        )

    def samples(self, tensors: Tensors) -> int:
        """How many samples the tensors are for. Raises InputError."""
        rows = [len(self._ids(tensors, feature)) for feature in self._features]
        sides = [feature.side for feature in self._features]
        of_items = [n for n, side in zip(rows, sides, strict=True) if side == "item"]
        return max(of_items or rows)

    def bags(self, tensors: Tensors, samples: int) -> PackedBags:
        """The bags of `samples` samples. Raises InputError."""
        return merge(
            [((f,), self._column(tensors, f, samples)) for f in range(len(self._features))],
            len(self._features),
        )

    def _column(self, tensors: Tensors, index: int, samples: int) -> PackedBags:
        feature = self._features[index]
        ids = self._ids(tensors, feature)
        repeated = feature.side == "user" and len(ids) == 1
        if len(ids) != samples and not repeated:
            raise InputError(f"feature {feature.name!r}: {len(ids)} bags for {samples} samples")
        lengths = np.full((1, len(ids)), ids.shape[1], np.int64)
        weights = np.ones(ids.size, np.float32) if self._weighted else None
        bags = PackedBags.packed(ids.ravel(), lengths, weights)
        return bags.for_samples(samples) if repeated else bags

    def _ids(self, tensors: Tensors, feature: FeatureConfig) -> np.ndarray:
        """[rows, ids in each bag]."""
        given = tensors.get(feature.name)
        if given is not None and given.ndim == 1:
            tensors = {feature.name: given[:, None]}
        return require(tensors, feature.name, kind="i", shape=(None, None))


def _is_fixed(feature: FeatureConfig) -> bool:
    return feature.bag.kind == "fixed" and feature.bag.coverage == 1 and not feature.weighted


def _shape(feature: FeatureConfig) -> tuple[int, ...]:
    ids = int(feature.bag.mean)
    return (-1,) if ids == 1 else (-1, ids)
