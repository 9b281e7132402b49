"""Open-loop load: requests arrive when they are due, whether or not earlier ones are answered.

Latency counts from the moment a request was due, so that a server that falls behind, or that
holds up whoever sends, cannot hide it.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.errors import DeadlineExceeded, QueueFull
from recflow_jax.measure import histograms

Submit = Callable[[JaggedBatch], "Future[Any]"]
Arrivals = Callable[..., np.ndarray]
WARM_UP_SHARE = 0.1
BURST_FACTOR = 4
BURST_SHARE = 0.1  # of each second


class LoadError(RuntimeError):
    """A server that did not answer what it was asked."""


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What was offered, what came back. Latencies in milliseconds, from due time to answer.

    failures: how many failed, by the error's type. histogram: the latencies, see `histograms`; None
    where hdrhistogram is not installed.
    """

    offered_per_s: float
    answered_per_s: float
    samples_per_s: float
    requests: int
    failed: int
    failures: dict[str, int]
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    histogram: str | None

    @property
    def kept_up(self) -> bool:
        """Whether answers came about as fast as requests: if not, latency grows with the run."""
        return self.answered_per_s >= 0.95 * self.offered_per_s

    @property
    def rejected(self) -> int:
        """Requests refused because the queue was full."""
        return self.failures.get(QueueFull.__name__, 0)

    @property
    def late(self) -> int:
        """Requests given up because of their deadline."""
        return self.failures.get(DeadlineExceeded.__name__, 0)

    @classmethod
    def of(cls, offered: "Offered") -> Self:
        """The latencies of what was answered, less the first tenth of the run. Raises LoadError if
        nothing was.
        """
        due_s, answered_s = offered.due_s, offered.answered_s
        counted = np.arange(len(due_s)) >= int(WARM_UP_SHARE * len(due_s))
        answered = counted & np.isfinite(answered_s)
        if not answered.any():
            raise LoadError(f"none of {len(due_s)} requests was answered: {offered.failures}")
        latencies_ms = 1e3 * (answered_s - due_s)[answered]
        p50, p90, p95, p99, p999 = np.percentile(latencies_ms, [50, 90, 95, 99, 99.9]).tolist()
        start_s = due_s[counted][0]
        span_s = max(answered_s[answered].max() - start_s, 1e-9)
        return cls(
            offered_per_s=float(counted.sum() / max(due_s[-1] - start_s, 1e-9)),
            answered_per_s=float(answered.sum() / span_s),
            samples_per_s=float(offered.samples[answered].sum() / span_s),
            requests=len(due_s),
            failed=sum(offered.failures.values()),
            failures=offered.failures,
            p50_ms=p50,
            p90_ms=p90,
            p95_ms=p95,
            p99_ms=p99,
            p999_ms=p999,
            max_ms=float(latencies_ms.max()),
            histogram=histograms.encoded(latencies_ms),
        )


@dataclass(frozen=True, kw_only=True)
class Offered:
    """What was offered: when each request was due, ascending, and when it was answered (nan: not),
    in seconds from the start, and its samples. failures: how many failed, by the error's type.
    """

    due_s: Float[np.ndarray, " requests"]
    answered_s: Float[np.ndarray, " requests"]
    samples: Int[np.ndarray, " requests"]
    failures: dict[str, int]

    @classmethod
    def joined(cls, parts: "Sequence[Offered]") -> Self:
        """What was offered at the same time, as one."""
        due_s = np.concatenate([part.due_s for part in parts])
        order = np.argsort(due_s, kind="stable")
        return cls(
            due_s=due_s[order],
            answered_s=np.concatenate([part.answered_s for part in parts])[order],
            samples=np.concatenate([part.samples for part in parts])[order],
            failures=dict(sum((Counter(part.failures) for part in parts), Counter())),
        )


def of_median_p99(loads: Sequence[LoadResult]) -> LoadResult:
    """The middle one, or the better of the two in the middle."""
    return sorted(loads, key=lambda load: load.p99_ms)[(len(loads) - 1) // 2]


def poisson_arrivals_s(per_s: float, count: int, *, seed: int) -> Float[np.ndarray, " count"]:
    """Times of `count` Poisson arrivals at `per_s` per second, from 0."""
    if per_s <= 0:
        raise ValueError(f"load: {per_s} requests per second is not above 0")
    gaps = np.random.default_rng(seed).exponential(1 / per_s, count)
    return np.cumsum(gaps) - gaps[0] if count else gaps


def burst_arrivals_s(per_s: float, count: int, *, seed: int) -> Float[np.ndarray, " count"]:
    """Times of `count` arrivals at `per_s` per second on average, from 0: Poisson at four times
    that for the first 100 ms of each second, and at two thirds of it for the rest.
    """
    even_s = poisson_arrivals_s(per_s, count, seed=seed)
    second, rest = np.divmod(even_s, 1)
    in_burst = BURST_SHARE * BURST_FACTOR
    quiet = (1 - in_burst) / (1 - BURST_SHARE)
    after_burst = BURST_SHARE + (rest - in_burst) / quiet
    return second + np.where(rest < in_burst, rest / BURST_FACTOR, after_burst)


class _Answers:
    """When each request was answered; written by whichever thread answers."""

    def __init__(self, count: int):
        self.times_s = np.full(count, np.nan)
        self.failures: Counter[str] = Counter()
        self._left = count
        self._lock = threading.Lock()
        self._all_answered = threading.Event()

    def record(self, index: int, future: "Future[Any]") -> None:
        now = time.perf_counter()
        error = CancelledError() if future.cancelled() else future.exception()
        with self._lock:
            if error is not None:
                self.failures[type(error).__name__] += 1
            else:
                self.times_s[index] = now
            self._left -= 1
            if not self._left:
                self._all_answered.set()

    def wait(self, timeout_s: float) -> None:
        if not self._all_answered.wait(timeout_s):
            raise LoadError(f"{self._left} requests had no answer {timeout_s:g} s after the last")


def run_open_loop(
    submit: Submit,
    requests: Sequence[JaggedBatch],
    due_s: Float[np.ndarray, " arrivals"],
    *,
    timeout_s: float = 120,
) -> LoadResult:
    """`open_loop`, and the latencies of it. Raises LoadError, also if nothing is answered."""
    return LoadResult.of(open_loop(submit, requests, due_s, timeout_s=timeout_s))


def open_loop(
    submit: Submit,
    requests: Sequence[JaggedBatch],
    due_s: Float[np.ndarray, " arrivals"],
    *,
    timeout_s: float = 120,
) -> Offered:
    """Sends request i % len(requests) at due_s[i] seconds from now and waits for all answers.

    A request that fails (rejected, too late) is counted. Raises LoadError if an answer does not
    come within `timeout_s` of the last request.
    """
    answers = _Answers(len(due_s))
    start = time.perf_counter()
    for index, due in enumerate(due_s.tolist()):
        ahead = start + due - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
        _send(submit, requests[index % len(requests)], index, answers)
    answers.wait(timeout_s)
    sizes = np.array([request.samples for request in requests])
    return Offered(
        due_s=due_s,
        answered_s=answers.times_s - start,
        samples=sizes[np.arange(len(due_s)) % len(sizes)],
        failures=dict(answers.failures),
    )


def _send(submit: Submit, request: JaggedBatch, index: int, answers: _Answers) -> None:
    try:
        future = submit(request)
    except RuntimeError as error:  # rejected at the door
        future = Future()
        future.set_exception(error)
    future.add_done_callback(lambda done: answers.record(index, done))


def saturation_samples_per_s(
    submit: Submit,
    requests: Sequence[JaggedBatch],
    *,
    in_flight_samples: int,
    seconds: float,
) -> float:
    """Samples answered per second while `in_flight_samples` of them are always inside.

    The first fifth of the time warms up and is not counted, unless half is over before something is
    answered: the time from one answer to the next is no rate. It takes longer if nothing was
    answered in the rest.
    """
    inside = _Inside(in_flight_samples)
    start = time.perf_counter()
    index, before = 0, None
    while True:
        now, answered = time.perf_counter(), inside.answered
        if before is None and now >= start + seconds / 5:
            is_slow = now > start + seconds / 2
            before = (start, 0) if is_slow else (now, answered)
        if before is not None and now >= start + seconds and answered > before[1]:
            break
        request = requests[index % len(requests)]
        inside.enter(request.samples)
        submit(request).add_done_callback(lambda done, n=request.samples: inside.leave(n, done))
        index += 1
    inside.wait_until_empty()
    counted_from, answered_before = before
    return (answered - answered_before) / (now - counted_from)


class _Inside:
    """Samples sent and not yet answered, never more than `limit` (one request always may)."""

    def __init__(self, limit: int):
        self.limit = limit
        self.answered = 0
        self._samples = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def enter(self, samples: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not self._samples or self._samples + samples <= self.limit
            )
            self._raise_failure()
            self._samples += samples

    def leave(self, samples: int, done: "Future[Any]") -> None:
        with self._changed:
            self._failure = self._failure or done.exception()
            self._samples -= samples
            self.answered += samples
            self._changed.notify()

    def wait_until_empty(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._samples)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            raise LoadError(f"a request failed: {self._failure}") from self._failure
