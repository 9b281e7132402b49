"""How an engine batches: by a profile table if it has one, one after the other if not."""

import logging
from dataclasses import replace
from functools import cache

from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from scheduling.pipeline import Pipeline, PipelineConfig
from scheduling.planner import Plans, SerialPlans, TablePlans
from scheduling.policy import Policy
from scheduling.request import whole_batches
from scheduling.serial_batching import Collecting, SerialBatching
from scheduling.table import ProfileMiss, ProfileTable, ProfileTableError

log = logging.getLogger("recflow.engine")


def plans_of(
    segments: Segments,
    options: EngineOptions,
    table: ProfileTable | None,
    *,
    launch_factor: float = 1.0,
) -> Plans:
    """The plans for the objective in the options; in one segment for serial batching.

    launch_factor: how many times as long launches take here as on the table's host. Raises
    ProfileTableError for a table without these sizes, and ValueError for a p99 that cannot be held,
    or that there is no table for.
    """
    if isinstance(options.batching, Collecting):
        return _same_for_all(segments, 1)
    if table is None:
        if options.p99_ms is not None:
            raise ValueError("options: p99_ms needs a profile table, to tell how long batches take")
        _say_serial(segments.config.name)
        return _same_for_all(segments, segments.count if options.segments else 1)
    try:
        plans = TablePlans(
            table,
            segments.batch_buckets,
            segments.slice_buckets,
            cuts=segments.cuts,
            objective=options.objective,
            p99_ms=options.p99_ms,
            launch_factor=launch_factor,
            whole=whole_batches(segments.batch_buckets, segments.slice_buckets),
        )
    except ProfileMiss as miss:
        raise ProfileTableError(
            f"profile table is of other sizes: {miss}. Give the engine the sizes that it was made "
            "with, or make a new one with the engine's"
        ) from miss
    if not plans.rides:
        log.info(
            "slices beside segments would save %.1f %% of a whole batch's time: nothing rides",
            100 * (1 - 1 / plans.riding_gain),
        )
    return plans


def policy_of(segments: Segments, options: EngineOptions, plans: Plans) -> Policy:
    """Incremental batching by the plans, or what the options say in its place."""
    sizes = pipeline_config(segments, plans)
    if isinstance(options.batching, Collecting):
        return SerialBatching(replace(sizes, segments=1), options.batching, plans)
    return Pipeline(sizes, plans)


def _same_for_all(segments: Segments, count: int) -> SerialPlans:
    return SerialPlans.of(count, segments.batch_buckets, segments.slice_buckets)


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
