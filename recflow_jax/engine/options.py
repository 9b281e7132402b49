"""What an engine is told: the sizes it is compiled for, the limits of its queue, its back end."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import expected_ids_per_sample
from recflow_jax.engine.switching import SHORT_MS
from scheduling.buckets import ladder, with_half_steps
from scheduling.planner import Objective
from scheduling.request import SliceBucket
from scheduling.serial_batching import Collecting

JAGGED_HEADROOM = 1.25
IDS_STEP = 128
SMALLEST_UPDATE, UPDATE_FACTOR = 64, 4
FINEST_CUT = 3
POSITIVE_OR_NONE = ("ids_per_sample", "p99_ms", "switch_interval_ms")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of an engine. Raises ValueError that names the field.

    max_batch, smallest_batch, batch_factor: the ladder of batch sizes that run through the MLPs;
        a batch is padded to the next one.
    max_slice, smallest_slice, slice_factor: the same for slices, the embedding work of one step
        (max_slice is cut to max_batch).
    half_steps_from: from this size up, ladders have another one half way to the next: padding takes
        time there as samples do, where small batches take what their launches take. None: no such
        sizes. A profile table need not have them: they take what lies between.
    ids_per_sample: sparse ids that a slice has room for, per sample. None: what the config's bags
        are expected to hold, with a quarter more where they are jagged.
    max_ids_per_sample: a sample with more is an InputError. None: what the largest slice holds.
    batching: "incremental", or `Collecting(wait_ms=...)`: batches are collected, embedded, then run
        through the layers in one executable, one after the other. That is what incremental batching
        is compared with; `segments`, `objective` and `p99_ms` are then without use.
    segments: executables that a batch goes through, at most one per top layer, and one. With a
        profile table the engine chooses between that many and a single one. None: three of these
        with a table, and without one a single one, as nothing tells then what more launches cost.
    objective: what is planned for with a profile table: "throughput", or "latency" on average.
    p99_ms: with a profile table, batches stay so small that a request that finds a busy engine
        with no queue is answered in that time, by the table.
    max_queued_samples: samples accepted and not yet answered, beyond which QueueFull is raised.
    max_steps_in_flight: how far launches run ahead of the device.
    max_update_rows: the most rows that one `update_rows` may have; None: tables do not change. With
        it, the engine takes the tables in `params` for its own: nobody else can use those arrays.
    backend: "auto", "xla" or "mosaic".
    compilation_cache: where compiled executables are kept between processes; "auto" is
        recflow-jax/xla in the user's cache folder, None keeps none. A cache folder that JAX is
        already told to use is left as it is.
    latency_window: answers, and launches, that the percentiles of `stats()` look back on.
    freeze_heap: leave what is in memory at the start out of Python's cyclic garbage collection, for
        as long as the engine is open. A full collection holds all requests up for 0.1 s and more.
    switch_interval_ms: how long one thread may keep Python's interpreter from others, for as long
        as the engine is open (`sys.setswitchinterval`). None leaves it as it is, 5 ms by default,
        for which a caller who always computes may hold each launch up several times.
    """

    max_batch: int = 8192
    smallest_batch: int = 8
    batch_factor: float = 2
    max_slice: int = 8192
    smallest_slice: int = 8
    slice_factor: float = 2
    half_steps_from: int | None = 1024
    ids_per_sample: float | None = None
    max_ids_per_sample: int | None = None
    batching: Literal["incremental"] | Collecting = "incremental"
    segments: int | None = None
    objective: Objective = "throughput"
    p99_ms: float | None = None
    max_queued_samples: int = 65536
    max_steps_in_flight: int = 3
    max_update_rows: int | None = None
    backend: str = "auto"
    compilation_cache: str | Path | None = "auto"
    latency_window: int = 8192
    freeze_heap: bool = True
    switch_interval_ms: float | None = SHORT_MS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_counted = field.type is int or (field.type == int | None and value is not None)
            if is_counted and not (type(value) is int and value >= 1):
                raise ValueError(f"options: {field.name} is {value!r}, not a whole number above 0")
        for name in ("batch_factor", "slice_factor"):
            if not getattr(self, name) > 1:
                raise ValueError(f"options: {name} is {getattr(self, name)!r}, not above 1")
        if self.objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise ValueError(f"options: objective is {self.objective!r}, not one of {known}")
        for name in POSITIVE_OR_NONE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"options: {name} is {value!r}, not above 0")
        self._check_batching()

    def _check_batching(self) -> None:
        if not isinstance(self.batching, Collecting):
            if self.batching != "incremental":
                raise ValueError(
                    f"options: batching is {self.batching!r}, not 'incremental' or Collecting(...)"
                )
        elif (self.batching.max_samples or 0) > self.max_batch:
            raise ValueError(
                f"options: batching collects {self.batching.max_samples} samples, more than "
                f"max_batch, {self.max_batch}"
            )
        elif self.p99_ms is not None:
            raise ValueError("options: p99_ms is for incremental batching")

    @property
    def batch_buckets(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return self._sizes(self.max_batch, self.smallest_batch, self.batch_factor)

    @property
    def finest_cut(self) -> int:
        """Executables that a batch goes through at most."""
        return self.segments or FINEST_CUT

    @property
    def update_sizes(self) -> tuple[int, ...]:
        """Sizes that updates of rows are padded to, ascending; none if tables do not change."""
        most = self.max_update_rows
        return ladder(most, min(SMALLEST_UPDATE, most), UPDATE_FACTOR) if most else ()

    def slice_buckets(self, config: DLRMConfig) -> tuple[SliceBucket, ...]:
        """Slice sizes, ascending in samples and ids; the last holds `max_ids_per_sample`."""
        largest = min(self.max_slice, self.max_batch)
        sizes = self._sizes(largest, self.smallest_slice, self.slice_factor)
        per_sample = self.ids_per_sample or _expected_ids(config)
        ids = [_round_up(size * per_sample) for size in sizes]
        ids[-1] = max(ids[-1], _round_up(self.max_ids_per_sample or 0))
        return tuple(SliceBucket(samples=s, ids=i) for s, i in zip(sizes, ids, strict=True))

    def _sizes(self, largest: int, smallest: int, factor: float) -> tuple[int, ...]:
        rungs = ladder(largest, min(smallest, largest), factor)
        return with_half_steps(rungs, self.half_steps_from)


def _round_up(ids: float) -> int:
    """Whole steps of ids, so that a buffer's next field is aligned."""
    return max(math.ceil(ids / IDS_STEP), 1) * IDS_STEP


def _expected_ids(config: DLRMConfig) -> float:
    bags = [feature.bag for feature in config.features]
    jagged = any(bag.kind != "fixed" or bag.coverage < 1 for bag in bags)
    return expected_ids_per_sample(config) * (JAGGED_HEADROOM if jagged else 1)
