"""What an engine has done so far, counted as it happens."""

import math
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduling.request import Segment, Slice, Step

PERCENTILES = (50, 95, 99)
STEP_BOUNDS_US = (50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, math.inf)
COUNTED = (
    "requests_accepted",
    "samples_accepted",
    "requests_answered",
    "samples_answered",
    "cancelled",
    "failed",
    "batches",
    "slices",
    "steps",
    "updates",
    "rows_updated",
)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine started; `rejected` by reason, in requests.

    Reasons: `input`, `queue_full` and `closed` (raised by submit), `deadline` (could not be
    answered in time, or was answered too late). Batch and slice sizes are samples on average;
    `batch_buckets` and `slice_buckets` count batches and slices by the bucket that they were padded
    to, `batch_segments` batches by the segments that they were cut into, `co_runs` the steps in one
    executable by their config, `step_times` steps by the first of STEP_BOUNDS_US that their time
    did not exceed, from launch to end, behind whatever was in flight; `steps_us` is their sum.
    `sample_padding`, `id_padding`: the part of all rows of batches, and ids of slices, that was
    padding. `updates` and `rows_updated`: calls of `update_rows` that have landed, and their rows.
    Latencies, from submit to answer, are of the last `options.latency_window` answers,
    and nan before the first. Waits, from submit to the first launch that carries the request, are
    of as many requests: in microseconds, and in steps that ended in the meantime. One at most is
    what nobody can do without, while the device is busy: the end of the step that runs.
    """

    requests_accepted: int
    samples_accepted: int
    requests_answered: int
    samples_answered: int
    rejected: dict[str, int]
    cancelled: int
    failed: int
    queued_samples: int
    batches: int
    slices: int
    steps: int
    updates: int
    rows_updated: int
    batch_buckets: dict[int, int]
    batch_segments: dict[int, int]
    co_runs: dict[str, int]
    slice_buckets: dict[int, int]
    step_times: dict[float, int]
    steps_us: int
    mean_batch: float
    mean_slice: float
    sample_padding: float
    id_padding: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    wait_p50_us: float
    wait_p95_us: float
    wait_p99_us: float
    wait_p50_steps: float
    wait_p95_steps: float
    wait_p99_steps: float
    backend: str
    backend_reason: str
    profile: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Waits:
    """From submit to the first launch, request by request: int64 [requests], see EngineStats."""

    us: np.ndarray
    steps: np.ndarray


class Tally:
    """The counters behind EngineStats; any thread may add to them."""

    def __init__(self, latency_window: int) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._batch_buckets: Counter[int] = Counter()
        self._batch_segments: Counter[int] = Counter()
        self._co_runs: Counter[str] = Counter()
        self._slice_buckets: Counter[int] = Counter()
        self._step_times: Counter[float] = Counter()
        self._latencies_us: deque[int] = deque(maxlen=latency_window)
        self._waits: deque[tuple[int, int]] = deque(maxlen=latency_window)
        self.steps_ended = 0

    def answered(self, samples: int, latencies_us: Sequence[int]) -> None:
        self._add(requests_answered=len(latencies_us), samples_answered=samples)
        self._latencies_us.extend(latencies_us)

    def rejected(self, reason: str) -> None:
        with self._lock:
            self._rejected[reason] += 1

    def cancelled(self) -> None:
        self._add(cancelled=1)

    def failed(self) -> None:
        self._add(failed=1)

    def updated(self, rows: int) -> None:
        self._add(updates=1, rows_updated=rows)

    def launched(self, step: Step, waits: Sequence[tuple[int, int]]) -> None:
        """`waits`, in microseconds and steps, of the requests that begin in it."""
        with self._lock:
            self._counts["steps"] += 1
            self._waits.extend(waits)
            if step.slice is not None:
                self._launched_slice(step.slice)
            if step.segment is not None and step.segment.shape.last:
                self._launched_batch(step.segment)
            if step.co_run is not None:
                self._co_runs[step.co_run] += 1

    def _launched_slice(self, piece: Slice) -> None:
        self._count(slices=1, slice_samples=piece.samples, ids=piece.ids, id_room=piece.bucket.ids)
        self._slice_buckets[piece.bucket.samples] += 1

    def _launched_batch(self, last: Segment) -> None:
        shape = last.shape
        self._count(batches=1, batch_samples=last.samples, batch_room=shape.batch)
        self._batch_buckets[shape.batch] += 1
        self._batch_segments[shape.segments] += 1

    def ended_step(self, took_us: int) -> None:
        bound = STEP_BOUNDS_US[bisect_left(STEP_BOUNDS_US, took_us)]
        with self._lock:
            self.steps_ended += 1
            self._counts["steps_us"] += took_us
            self._step_times[bound] += 1

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._count(**counts)

    def _count(self, **counts: int) -> None:
        """Under the lock."""
        for name, count in counts.items():
            self._counts[name] += count

    def waits(self) -> Waits:
        """Of the last requests that were launched."""
        with self._lock:
            waits = np.array(self._waits, np.int64).reshape(-1, 2)
        return Waits(us=waits[:, 0], steps=waits[:, 1])

    def stats(
        self,
        *,
        accepted: tuple[int, int],
        queued_samples: int,
        backend: str,
        backend_reason: str,
        profile: str | None,
    ) -> EngineStats:
        """All counters at one moment; accepted: requests and samples."""
        with self._lock:
            n, rejected = Counter(self._counts), dict(self._rejected)
            batch_buckets, co_runs = dict(self._batch_buckets), dict(self._co_runs)
            batch_segments = dict(self._batch_segments)
            slice_buckets = dict(self._slice_buckets)
            step_times = dict(self._step_times)
            latencies_ms = np.array(self._latencies_us) / 1000
        n["requests_accepted"], n["samples_accepted"] = accepted
        waits = self.waits()
        percentiles: dict[str, Any] = {
            **_percentiles("latency", "ms", latencies_ms),
            **_percentiles("wait", "us", waits.us),
            **_percentiles("wait", "steps", waits.steps),
        }
        return EngineStats(
            **{name: n[name] for name in COUNTED},
            rejected=rejected,
            queued_samples=queued_samples,
            batch_buckets=batch_buckets,
            batch_segments=batch_segments,
            co_runs=co_runs,
            slice_buckets=slice_buckets,
            step_times=step_times,
            steps_us=n["steps_us"],
            mean_batch=n["batch_samples"] / max(n["batches"], 1),
            mean_slice=n["slice_samples"] / max(n["slices"], 1),
            sample_padding=_padding(n["batch_samples"], n["batch_room"]),
            id_padding=_padding(n["ids"], n["id_room"]),
            **percentiles,
            backend=backend,
            backend_reason=backend_reason,
            profile=profile,
        )


def _percentiles(what: str, unit: str, values: np.ndarray) -> dict[str, float]:
    """Named as in EngineStats."""
    found = np.percentile(values if len(values) else np.nan, PERCENTILES).tolist()
    return {f"{what}_p{p}_{unit}": value for p, value in zip(PERCENTILES, found, strict=True)}


def _padding(used: int, room: int) -> float:
    return 1 - used / room if room else 0.0
