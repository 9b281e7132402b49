"""A GPU that is known by its profile table alone, with the engine on it or serial batching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Self

from recflow_jax.config import DLRMConfig
from recflow_jax.engine.options import EngineOptions
from recflow_jax.layout import Layout
from scheduling import (
    Collecting,
    HostCosts,
    Pipeline,
    PipelineConfig,
    Policy,
    ProfileKey,
    ProfileTable,
    ProfileTableError,
    Request,
    SegmentShape,
    SerialBatching,
    SerialPlans,
    SimulatedRun,
    SliceBucket,
    StepTimes,
    TablePlans,
    TableTimes,
    simulate,
)
from scheduling.buckets import with_half_steps
from scheduling.costs import segment_key
from scheduling.planner import Objective
from scheduling.request import whole_batches

MISSING_NAMED = 3
IN_ORDER = attrgetter("samples", "ids")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One engine, as its times tell.

    serial_wait_ms: how long serial batching collects. None tries, at each load, a few waits and
    batch limits, and takes those with the lowest p99.
    """

    sizes: PipelineConfig
    plans: TablePlans
    times: StepTimes
    host: HostCosts
    serial_wait_ms: float | None = None

    @classmethod
    def of(
        cls,
        table: ProfileTable,
        *,
        host: HostCosts,
        objective: Objective = EngineOptions.objective,
        plan_p99_ms: float | None = None,
        serial_wait_ms: float | None = None,
    ) -> Self:
        """An engine with this table, in all sizes that the table has.

        objective, plan_p99_ms: as in EngineOptions. Raises ProfileTableError for a table that lacks
        sizes, and ValueError for a p99 that even the smallest batch does not hold.
        """
        sizes = sizes_of(table)
        return cls(
            sizes=sizes,
            plans=TablePlans(
                table,
                sizes.batch_buckets,
                sizes.slice_buckets,
                objective=objective,
                p99_ms=plan_p99_ms,
                whole=whole_batches(sizes.batch_buckets, sizes.slice_buckets),
            ),
            times=TableTimes(table),
            host=host,
            serial_wait_ms=serial_wait_ms,
        )

    def incremental(self) -> Policy:
        """What the engine does."""
        return Pipeline(self.sizes.of_batches(self.plans.batch_buckets), self.plans)

    def serial(self, collecting: Collecting) -> Policy:
        """Whole batches, in one cut, and nothing beside them."""
        plans = SerialPlans.of(1, self.sizes.batch_buckets, self.sizes.slice_buckets)
        return SerialBatching(replace(self.sizes, segments=1), collecting, plans)

    def run(self, policy: Policy, requests: Iterator[Request]) -> SimulatedRun:
        """All requests, until each has had its end."""
        return simulate(policy, requests, times=self.times, host=self.host)


def sizes_of(table: ProfileTable) -> PipelineConfig:
    """The pipeline of an engine with this table: of the sizes that it has, and those half way that
    engines have. Raises ProfileTableError if rows are missing.
    """
    slices = {
        SliceBucket(samples=row.slice_samples, ids=row.slice_ids)
        for row in table.rows
        if row.kind == "slice" and row.slice_samples and row.slice_ids
    }
    segments = [row for row in table.rows if row.kind == "segment"]
    if not slices or not segments:
        raise ProfileTableError(_lacking(table, "slices" if not slices else "segments"))
    cuts = {1, *(row.segments for row in segments if row.segments)}
    batches = sorted({row.batch for row in segments if row.batch})
    _check_segments(table, [s for n in cuts for b in batches for s in SegmentShape.all_of(n, b)])
    return PipelineConfig(
        batch_buckets=with_half_steps(batches, EngineOptions.half_steps_from),
        slice_buckets=_with_half_steps(sorted(slices, key=IN_ORDER)),
        segments=max(cuts),
        max_steps_in_flight=EngineOptions.max_steps_in_flight,
    )


def _with_half_steps(slices: Sequence[SliceBucket]) -> tuple[SliceBucket, ...]:
    """Ascending slices, and those half way."""
    samples = {size.samples for size in slices}
    added = {*with_half_steps(sorted(samples), EngineOptions.half_steps_from)} - samples
    between = [
        SliceBucket(samples=(a.samples + b.samples) // 2, ids=(a.ids + b.ids) // 2)
        for a, b in pairwise(slices)
        if (a.samples + b.samples) // 2 in added
    ]
    return tuple(sorted([*slices, *between], key=IN_ORDER))


def _check_segments(table: ProfileTable, needed: Sequence[SegmentShape]) -> None:
    keys = [segment_key(shape) for shape in needed]
    if missing := [key for key in keys if not table.has(key)]:
        raise ProfileTableError(_lacking(table, _named(missing)))


def _named(missing: Sequence[ProfileKey]) -> str:
    named = ", ".join(str(key) for key in missing[:MISSING_NAMED])
    return named + (f" and {len(missing) - MISSING_NAMED} more" * (len(missing) > MISSING_NAMED))


def _lacking(table: ProfileTable, what: str) -> str:
    return f"profile table lacks {what}. Measure it: recflow profile --model {table.model}"


def host_of(config: DLRMConfig, rates: HostCosts) -> HostCosts:
    """`rates` with the bytes that a slice of this model takes: per id its row (and weight), per
    sample its dense features and one offset per slot.
    """
    return replace(
        rates,
        bytes_per_sample=4 * (config.dense_width + len(Layout.of(config).slots)),
        bytes_per_id=8 if config.weighted else 4,
    )
