"""How a model's tables and bags lie on the device.

Tables of one (dim, dtype) are stacked into one *group* array, each at a base row. Every feature
becomes one *slot* of a sample (a `none`-pooled one becomes `hotness` slots of at most one id), and
ids become rows of their group: int32, so that a group holds up to 2^31 - 1 rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pallas_kernels.slots import Slot
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import (
    ITEM_BYTES,
    QUANTISED,
    SCALE_BYTES,
    ConfigError,
    DLRMConfig,
    TableDType,
)

MAX_GROUP_ROWS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """One stacked array [rows, dim], with a float32 scale for each row if it is quantised."""

    dim: int
    dtype: TableDType
    rows: int

    @property
    def quantised(self) -> bool:
        """Whether rows have scales."""
        return self.dtype in QUANTISED

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values, which lie in one piece."""
        return self.dim * ITEM_BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scale, which lies apart; 0 without."""
        return SCALE_BYTES if self.quantised else 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each table starts, and which slots a sample has. Raises ConfigError (`of`)."""

    groups: tuple[Group, ...]
    table_places: tuple[tuple[int, int], ...]  # (group, base row) per table
    slots: tuple[Slot, ...]
    slot_features: tuple[int, ...]
    feature_bases: tuple[int, ...]  # base row of each feature's table in its group

    @classmethod
    def of(cls, config: DLRMConfig) -> "Layout":
        """The layout of `config`'s model."""
        rows: dict[tuple[int, TableDType], int] = {}
        places: dict[str, tuple[int, int]] = {}
        for table in config.tables:
            kind = (table.dim, table.dtype)
            base = rows.setdefault(kind, 0)
            places[table.name] = (list(rows).index(kind), base)
            rows[kind] = base + table.rows
        groups = tuple(Group(dim=d, dtype=t, rows=n) for (d, t), n in rows.items())
        _check_rows(groups)
        slots, features = _slots(config, places)
        return cls(
            groups=groups,
            table_places=tuple(places[table.name] for table in config.tables),
            slots=slots,
            slot_features=features,
            feature_bases=tuple(places[f.table][1] for f in config.features),
        )

    @cached_property
    def one_slot_per_feature(self) -> bool:
        """Whether bags are slots as they are."""
        return len(self.slots) == len(self.feature_bases)

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes of one row of each group, its scale among them."""
        return tuple(group.value_bytes + group.scale_bytes for group in self.groups)

    def rows(self, batch: JaggedBatch) -> np.ndarray:
        """int32 [total]: each id of `batch` as a row of its group."""
        if not any(self.feature_bases):
            return batch.values.astype(np.int32, copy=False)
        bases = np.tile(np.array(self.feature_bases, np.int32), batch.samples)
        return np.repeat(bases, np.diff(batch.offsets)) + batch.values.astype(np.int32, copy=False)

    def slot_offsets(self, batch: JaggedBatch) -> np.ndarray:
        """int32 [samples * slots + 1]: where each slot's ids start."""
        return self.slots_of(batch.offsets)

    def slots_of(self, offsets: np.ndarray) -> np.ndarray:
        """int32 [samples * slots + 1]: where each slot's ids start, from the bags' `offsets`."""
        if self.one_slot_per_feature:
            return offsets.astype(np.int32)
        starts = np.stack([offsets[:-1], offsets[1:]]).reshape(2, -1, len(self.feature_bases))
        starts = starts[:, :, list(self.slot_features)]
        within = _index_within_feature(self.slot_features)
        slots = np.minimum(starts[0] + within, starts[1]).ravel()
        return np.append(slots, offsets[-1]).astype(np.int32)


def _check_rows(groups: tuple[Group, ...]) -> None:
    for group in groups:
        if group.rows > MAX_GROUP_ROWS:
            raise ConfigError(
                f"tables of dim {group.dim}, {group.dtype} have {group.rows} rows together, "
                f"more than {MAX_GROUP_ROWS}"
            )


def _slots(
    config: DLRMConfig, places: dict[str, tuple[int, int]]
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    slots: list[Slot] = []
    features: list[int] = []
    column = 0
    for index, feature in enumerate(config.features):
        dim = config.table_of(feature).dim
        group, _ = places[feature.table]
        expected = feature.bag.coverage * feature.bag.mean
        for _ in range(feature.vectors):
            mean = feature.pooling == "mean"
            ids = min(1.0, expected) if feature.pooling == "none" else expected
            slots.append(Slot(group=group, dim=dim, column=column, mean=mean, expected_ids=ids))
            features.append(index)
            column += dim
    return tuple(slots), tuple(features)


def _index_within_feature(slot_features: tuple[int, ...]) -> np.ndarray:
    """0, 1, ... within each feature's slots; 0 where a feature has one slot."""
    features = np.array(slot_features)
    firsts = np.searchsorted(features, features, side="left")
    return np.arange(len(features)) - firsts
