"""How an engine batches: by a profile table if it has one, serially if not."""

import logging
from functools import cache

from recflow_jax.engine.segments import Segments
from scheduling.pipeline import PipelineConfig
from scheduling.planner import Plans, SerialPlans, TablePlans
from scheduling.table import ProfileMiss, ProfileTable, ProfileTableError

log = logging.getLogger("recflow.engine")


def plans_of(segments: Segments, table: ProfileTable | None) -> Plans:
    """The plans for the objective in the segments' options.

    Raises ProfileTableError for a table without these sizes, and ValueError for a p99 that cannot
    be held, or that there is no table for.
    """
    options = segments.options
    if table is None:
        if options.p99_ms is not None:
            raise ValueError("options: p99_ms needs a profile table, to tell how long batches take")
        _say_serial(segments.config.name)
        return SerialPlans(
            count=segments.count,
            batch_buckets=segments.batch_buckets,
            largest_slice=segments.slice_buckets[-1],
        )
    try:
        return TablePlans(
            table,
            segments.batch_buckets,
            segments.slice_buckets,
            cuts=segments.cuts,
            objective=options.objective,
            p99_ms=options.p99_ms,
        )
    except ProfileMiss as miss:
        raise ProfileTableError(
            f"profile table is of other sizes: {miss}. Give the engine the sizes that it was made "
            "with, or make a new one with the engine's"
        ) from miss


def pipeline_config(segments: Segments, plans: Plans) -> PipelineConfig:
    """The pipeline of these segments, in the sizes that are planned with."""
    sizes = PipelineConfig(
        batch_buckets=segments.batch_buckets,
        slice_buckets=segments.slice_buckets,
        segments=segments.count,
        max_steps_in_flight=segments.options.max_steps_in_flight,
    )
    return sizes.of_batches(plans.batch_buckets)


@cache
def _say_serial(model: str) -> None:
    """Once."""
    log.warning(
        "no profile table: embeddings and MLPs of %s run one after the other; "
        "recflow profile makes a table",
        model,
    )
