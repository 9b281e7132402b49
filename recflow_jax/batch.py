"""Samples as users hand them over: dense features and jagged bags of ids, checked on entry.

Bags are sample-major: sample s, feature f is bag s * features + f. So a request's samples are
one contiguous run of ids, and joining or splitting requests moves no id past another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from recflow_jax.config import DLRMConfig, FeatureConfig

MAX_IDS = 2**31 - 1
INT64, FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


class InputError(ValueError):
    """Samples that the model cannot take; the message names feature, sample and value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JaggedBatch:
    """`n` samples of a model with `features` sparse features.

    dense: float32 [n, dense_width]. values: integer ids [total], sample-major.
    offsets: int64 [n * features + 1]; bag (s, f) is values[offsets[b]:offsets[b + 1]] with
    b = s * features + f. weights: float32 [total], or None where no feature is weighted.
    """

    dense: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    @property
    def samples(self) -> int:
        """Number of samples, n."""
        return len(self.dense)

    @property
    def features(self) -> int:
        """Number of sparse features."""
        return (len(self.offsets) - 1) // self.samples if self.samples else 0

    @property
    def id_offsets(self) -> np.ndarray:
        """int64 [n + 1]: the number of ids before each sample."""
        if not self.features:
            return np.zeros(self.samples + 1, np.int64)
        return self.offsets[:: self.features]

    def bag(self, sample: int, feature: int) -> np.ndarray:
        """The ids of one bag."""
        first = sample * self.features + feature
        return self.values[self.offsets[first] : self.offsets[first + 1]]

    def part(self, start: int, stop: int) -> Self:
        """Samples [start, stop), as views where numpy allows."""
        bags = self.offsets[start * self.features : stop * self.features + 1]
        ids = slice(bags[0], bags[-1])
        weights = None if self.weights is None else self.weights[ids]
        return type(self)(
            dense=self.dense[start:stop],
            values=self.values[ids],
            offsets=bags - bags[0],
            weights=weights,
        )

    def frozen(self) -> Self:
        """The same samples in arrays that cannot be written to: an engine need not copy these, and
        looks at what is in them while the device computes.
        """
        return type(self)(
            dense=_frozen(self.dense),
            values=_frozen(self.values),
            offsets=_frozen(self.offsets),
            weights=None if self.weights is None else _frozen(self.weights),
        )

    @classmethod
    def join(cls, batches: Sequence[Self]) -> Self:
        """The samples of all `batches`, in order. Raises ValueError for none."""
        if not batches:
            raise ValueError("join needs at least one batch")
        shifts = np.cumsum([0] + [len(b.values) for b in batches])
        offsets = [b.offsets[:-1] + shift for b, shift in zip(batches, shifts, strict=False)]
        weighted = batches[0].weights is not None
        return cls(
            dense=np.concatenate([b.dense for b in batches]),
            values=np.concatenate([b.values for b in batches]),
            offsets=np.concatenate([*offsets, shifts[-1:]]),
            weights=np.concatenate([b.weights for b in batches if b.weights is not None])
            if weighted
            else None,
        )

    @classmethod
    def from_features(cls, config: DLRMConfig, dense: Any, sparse: Mapping[str, Any]) -> Self:
        """Builds a batch from one entry per sparse feature; checks shapes, dtypes and names.

        dense: [n, dense_width]. An entry of `sparse` is ids [n] (one id per sample), a list of
        n bags, (values, offsets [n + 1]) or, for a weighted feature, (values, offsets, weights);
        without them its weights are 1. Raises InputError.
        """
        dense = dense_array(config, dense)
        known = {feature.name for feature in config.features}
        for name in [*sorted(set(sparse) - known), *sorted(known - set(sparse))]:
            there = "is not in the model" if name in sparse else "is missing"
            raise InputError(f"feature {name!r} {there}")
        columns = [_column(f, sparse[f.name], len(dense)) for f in config.features]
        return _interleave(cls, config, dense, columns)


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view


@dataclass(frozen=True)
class _Column:
    """One feature's bags for all samples."""

    values: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None


def dense_array(config: DLRMConfig, dense: Any) -> np.ndarray:
    """float32 [n, dense_width] of what was handed over. Raises InputError."""
    try:
        array = np.asarray(dense, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"dense features are not numbers: {error}") from error
    if array.ndim != 2 or array.shape[1] != config.dense_width:
        raise InputError(
            f"dense features have shape {list(array.shape)}, not [n, {config.dense_width}]"
        )
    return array


def _column(feature: FeatureConfig, entry: Any, samples: int) -> _Column:
    name = f"feature {feature.name!r}"
    if isinstance(entry, tuple):
        if len(entry) == 3 and not feature.weighted:
            raise InputError(f"{name} takes no weights")
        return _jagged_column(name, entry, samples)
    if isinstance(entry, list) and (not entry or np.iterable(entry[0])):
        column = _listed_column(name, entry)
    else:
        values = _ids(name, entry)
        column = _Column(values, np.ones(len(values), np.int64), None)
    if len(column.lengths) != samples:
        raise InputError(f"{name} has {len(column.lengths)} bags for {samples} samples")
    return column


def _listed_column(name: str, bags: list[Any]) -> _Column:
    """One bag per element; an empty list is an empty bag, though numpy would call it float."""
    empty = np.zeros(0, np.int32)
    arrays = [
        _ids(f"{name}, sample {s}", bag) if np.size(bag) else empty for s, bag in enumerate(bags)
    ]
    lengths = np.array([len(array) for array in arrays], np.int64)
    return _Column(np.concatenate([empty, *arrays]), lengths, None)


def _jagged_column(name: str, entry: tuple[Any, ...], samples: int) -> _Column:
    if len(entry) not in (2, 3):
        raise InputError(f"{name}: a tuple of {len(entry)} is not (values, offsets)")
    values = _ids(name, entry[0])
    offsets = np.asarray(entry[1])
    if offsets.dtype.kind not in "iu" or offsets.shape != (samples + 1,):
        raise InputError(
            f"{name}: offsets are {offsets.dtype}{list(offsets.shape)}, "
            f"not integers [{samples + 1}]"
        )
    _check_offsets(name, offsets.astype(np.int64), len(values))
    weights = None if len(entry) == 2 else _weight_array(name, entry[2], len(values))
    return _Column(values, np.diff(offsets.astype(np.int64)), weights)


def _ids(name: str, entry: Any) -> np.ndarray:
    try:
        values = np.asarray(entry)
    except ValueError as error:
        raise InputError(f"{name}: ids are no array: {error}") from error
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(
            f"{name}: ids are {values.dtype}{list(values.shape)}, not integers [total]"
        )
    return values


def _weight_array(name: str, weights: Any, total: int) -> np.ndarray:
    try:
        array = np.asarray(weights, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: weights are not numbers: {error}") from error
    if array.shape != (total,):
        raise InputError(f"{name}: {list(array.shape)} weights for {total} ids")
    return array


def _check_offsets(name: str, offsets: np.ndarray, total: int) -> None:
    if offsets[0] != 0:
        raise InputError(f"{name}, sample 0: offsets start at {offsets[0]}, not at 0")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if len(falling):
        s = falling[0]
        raise InputError(f"{name}, sample {s}: offsets fall from {offsets[s]} to {offsets[s + 1]}")
    if offsets[-1] != total:
        raise InputError(f"{name}: offsets end at {offsets[-1]}, ids at {total}")


def _interleave(
    cls: type[Any], config: DLRMConfig, dense: np.ndarray, columns: list[_Column]
) -> Any:
    samples, features = len(dense), len(columns)
    lengths = np.stack([c.lengths for c in columns], 1) if columns else np.zeros((samples, 0), int)
    offsets = np.zeros(samples * features + 1, np.int64)
    np.cumsum(lengths.ravel(), out=offsets[1:])
    narrow = all(np.can_cast(c.values.dtype, np.int32) for c in columns)
    values = np.empty(offsets[-1], np.int32 if narrow else np.int64)
    weights = np.ones(offsets[-1], np.float32) if config.weighted else None
    for f, column in enumerate(columns):
        starts = offsets[f:-1:features]
        within = np.arange(len(column.values)) - np.repeat(
            np.cumsum(column.lengths) - column.lengths, column.lengths
        )
        places = np.repeat(starts, column.lengths) + within
        values[places] = column.values
        if column.weights is not None and weights is not None:
            weights[places] = column.weights
    return cls(dense=dense, values=values, offsets=offsets, weights=weights)


def check_batch(config: DLRMConfig, batch: JaggedBatch) -> None:
    """Raises InputError if `config`'s model cannot take `batch`, naming feature, sample, value.

    Checked: shapes and dtypes, NaN and infinite dense features, offsets, ids in range, finite
    weights, bags of a `none`-pooled feature no longer than its hotness.
    """
    check_shapes(config, batch)
    _check_dense(batch.dense)
    _check_all_offsets(config, batch)
    _check_ids(config, batch)
    _check_hotness(config, batch)
    _check_weights(config, batch)


def check_shapes(config: DLRMConfig, batch: JaggedBatch) -> None:
    """The part of `check_batch` that looks at no element. Raises InputError."""
    dense_array(config, batch.dense)
    if batch.dense.dtype != FLOAT32:
        raise InputError(f"dense features are {batch.dense.dtype}, not float32")
    expected = batch.samples * len(config.features) + 1
    if batch.offsets.shape != (expected,) or batch.offsets.dtype != INT64:
        raise InputError(
            f"offsets are {batch.offsets.dtype}{list(batch.offsets.shape)}, not int64 "
            f"[{batch.samples} samples * {len(config.features)} features + 1]"
        )
    if batch.values.ndim != 1 or batch.values.dtype.kind not in "iu":
        raise InputError(f"ids are {batch.values.dtype}{list(batch.values.shape)}, not integers")
    if len(batch.values) > MAX_IDS:
        raise InputError(f"a batch of {len(batch.values)} ids, more than {MAX_IDS}")
    if config.weighted != (batch.weights is not None):
        raise InputError("weights are missing" if config.weighted else "no feature takes weights")
    if batch.weights is None:
        return
    if batch.weights.shape != batch.values.shape or batch.weights.dtype != FLOAT32:
        raise InputError(
            f"weights are {batch.weights.dtype}{list(batch.weights.shape)}, not float32 "
            f"[{len(batch.values)}], one per id"
        )


def _check_dense(dense: np.ndarray) -> None:
    finite = np.isfinite(dense)
    if not finite.all():
        sample, column = np.argwhere(~finite)[0]
        raise InputError(
            f"dense feature {column}, sample {sample}: {dense[sample, column]} is not finite"
        )


def _feature_and_sample(config: DLRMConfig, batch: JaggedBatch, place: int) -> str:
    bag = int(np.searchsorted(batch.offsets, place, side="right")) - 1
    return _bag_name(config, bag)


def _bag_name(config: DLRMConfig, bag: int) -> str:
    sample, feature = divmod(bag, len(config.features))
    return f"feature {config.features[feature].name!r}, sample {sample}"


def _check_all_offsets(config: DLRMConfig, batch: JaggedBatch) -> None:
    offsets = batch.offsets
    falling = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falling):
        bag = int(falling[0])
        raise InputError(
            f"{_bag_name(config, bag)}: offsets fall from {offsets[bag]} to {offsets[bag + 1]}"
        )
    if offsets[0] != 0 or offsets[-1] != len(batch.values):
        raise InputError(
            f"offsets run from {offsets[0]} to {offsets[-1]}, ids from 0 to {len(batch.values)}"
        )


def bag_features(batch: JaggedBatch) -> np.ndarray:
    """int64 [total]: the feature that each id belongs to."""
    per_bag = np.tile(np.arange(batch.features), batch.samples)
    return np.repeat(per_bag, np.diff(batch.offsets))


def _check_ids(config: DLRMConfig, batch: JaggedBatch) -> None:
    if not len(batch.values):
        return
    filled = np.flatnonzero(np.diff(batch.offsets))
    limits = np.tile(config.feature_rows, batch.samples)[filled]
    largest = np.maximum.reduceat(batch.values, batch.offsets[filled])
    if batch.values.min() < 0 or (largest >= limits).any():
        _raise_first_outside(config, batch)


def _raise_first_outside(config: DLRMConfig, batch: JaggedBatch) -> None:
    limits = np.array(config.feature_rows)[bag_features(batch)]
    place = int(np.flatnonzero((batch.values < 0) | (batch.values >= limits))[0])
    raise InputError(
        f"{_feature_and_sample(config, batch, place)}: id {batch.values[place]} is not in "
        f"[0, {limits[place]})"
    )


def _check_hotness(config: DLRMConfig, batch: JaggedBatch) -> None:
    limits = [f.longest_bag or MAX_IDS for f in config.features]
    if min(limits, default=MAX_IDS) == MAX_IDS:
        return
    lengths = np.diff(batch.offsets).reshape(batch.samples, len(limits))
    too_long = np.argwhere(lengths > np.array(limits))
    if len(too_long):
        sample, feature = too_long[0].tolist()
        raise InputError(
            f"{_bag_name(config, sample * len(limits) + feature)}: a bag of "
            f"{lengths[sample, feature]} ids, hotness is {limits[feature]}"
        )


def _check_weights(config: DLRMConfig, batch: JaggedBatch) -> None:
    if batch.weights is None:
        return
    bad = np.flatnonzero(~np.isfinite(batch.weights))
    if len(bad):
        place = int(bad[0])
        raise InputError(
            f"{_feature_and_sample(config, batch, place)}: weight {batch.weights[place]} is not "
            "finite"
        )
