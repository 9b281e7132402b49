"""From what callers hand over to a request: checked on the caller's thread, harming nobody."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recflow_jax.batch import InputError, JaggedBatch, check_batch
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.messages import Submitted
from scheduling.request import Request

Sparse = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """When a request came, by when and in which order it wants its answer."""

    arrived_us: int
    deadline_us: int | None = None
    priority: int = 0

    @classmethod
    def of(cls, arrived_us: int, deadline_ms: float | None, priority: int) -> "Terms":
        """Raises ValueError and TypeError for a deadline or priority that is no number."""
        deadline_us = None
        if deadline_ms is not None:
            if not math.isfinite(deadline_ms):
                raise ValueError(f"deadline_ms is {deadline_ms}, not a number of milliseconds")
            deadline_us = arrived_us + round(deadline_ms * 1000)
        return cls(
            arrived_us=arrived_us, deadline_us=deadline_us, priority=operator.index(priority)
        )


def checked_batch(
    config: DLRMConfig, dense: Any, sparse: Sparse | None, *, max_ids: int, copy: bool
) -> JaggedBatch:
    """The samples, checked. Raises InputError that names feature, sample and value.

    copy: the samples are checked and kept as they are now, whatever becomes of the caller's arrays.
    """
    batch = _as_batch(config, dense, sparse)
    batch = _copied(batch) if copy else batch
    check_batch(config, batch)
    _check_ids_per_sample(batch, max_ids)
    return batch


def new_request(request_id: int, batch: JaggedBatch, terms: Terms) -> Submitted:
    """`batch` as the scheduler wants it."""
    request = Request(
        id=request_id,
        samples=batch.samples,
        id_offsets=batch.id_offsets,
        priority=terms.priority,
        deadline_us=terms.deadline_us,
        arrived_us=terms.arrived_us,
    )
    return Submitted(request, batch)


def _as_batch(config: DLRMConfig, dense: Any, sparse: Sparse | None) -> JaggedBatch:
    if not isinstance(dense, JaggedBatch):
        return JaggedBatch.from_features(config, dense, sparse or {})
    if sparse is not None:
        raise InputError("sparse features beside a JaggedBatch, which has its own")
    return dense


def _copied(batch: JaggedBatch) -> JaggedBatch:
    return replace(
        batch,
        dense=np.array(batch.dense),
        values=np.array(batch.values),
        offsets=np.array(batch.offsets),
        weights=None if batch.weights is None else np.array(batch.weights),
    )


def _check_ids_per_sample(batch: JaggedBatch, most: int) -> None:
    if len(batch.values) <= most:
        return
    ids = np.diff(batch.id_offsets)
    sample = int(ids.argmax())
    if ids[sample] > most:
        raise InputError(f"sample {sample} has {ids[sample]} ids in all, more than {most}")
