"""From what callers hand over to a request of the scheduler."""

from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine import copy_threads
from recflow_jax.engine.fixed_bags import is_shared
from recflow_jax.engine.messages import Submitted
from recflow_jax.engine.prepared import FindRoom, Prepared, Preparer
from recflow_jax.engine.terms import Sparse, Terms, is_batch
from scheduling.host_costs import LARGE_IDS
from scheduling.request import Request


def is_large(dense: Any) -> bool:
    """Whether the caller of this request and the launcher need not wait for each other."""
    return isinstance(dense, JaggedBatch) and len(dense.values) >= LARGE_IDS


def is_to_berth(dense: Any, *, slice_ids: int) -> bool:
    """Whether this request's ids lie in an array and are to be copied: others who want berths are
    not to wait until one has been made. What nobody writes to is, too, where several threads copy
    and it fills most of a slice, the largest of which has `slice_ids`: on the caller's thread,
    while the launcher launches. Of several in a slice all but one would be copied twice.
    """
    if not isinstance(dense, JaggedBatch):
        return False
    if not is_shared(dense.values):
        return True
    is_one = fills(len(dense.values), slice_ids)
    return is_one and is_large(dense) and copy_threads.copy() is not None


def fills(ids: int, slice_ids: int) -> bool:
    """Whether a request is most of the largest slice."""
    return ids > slice_ids // 2


def prepare(
    preparer: Preparer,
    dense: Any,
    sparse: Sparse | None,
    *,
    checks_later: bool = False,
    find_room: FindRoom | None = None,
) -> Prepared:
    """What a caller handed over, checked as `Preparer.prepare` does. Raises InputError."""
    if not is_batch(dense, sparse):
        return preparer.prepare_features(dense, sparse or {})
    return preparer.prepare(dense, checks_later=checks_later, find_room=find_room)


def new_request(
    request_id: int, samples: Prepared, terms: Terms, *, steps_ended: int = 0
) -> Submitted:
    """`samples` as the scheduler wants them."""
    request = Request(
        id=request_id,
        samples=samples.samples,
        id_offsets=samples.id_offsets,
        ids=len(samples.rows),
        priority=terms.priority,
        deadline_us=terms.deadline_us,
        arrived_us=terms.arrived_us,
    )
    return Submitted(request=request, samples=samples, steps_ended=steps_ended)
