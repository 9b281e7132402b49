"""What callers hand over with a request, and on which terms."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recflow_jax.batch import InputError, JaggedBatch

Sparse = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
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


def is_batch(dense: Any, sparse: Sparse | None) -> bool:
    """Whether a caller handed over a JaggedBatch, not features. Raises InputError for both."""
    if not isinstance(dense, JaggedBatch):
        return False
    if sparse is not None:
        raise InputError("sparse features beside a JaggedBatch, which has its own")
    return True
