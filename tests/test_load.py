"""Open-loop load: latency counts from when a request was due, and nothing is lost."""

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import (
    LoadError,
    LoadResult,
    Offered,
    burst_arrivals_s,
    of_median_p99,
    poisson_arrivals_s,
    run_open_loop,
    saturation_samples_per_s,
)


def request(samples: int) -> JaggedBatch:
    return JaggedBatch(
        dense=np.zeros((samples, 1), np.float32),
        values=np.zeros(0, np.int32),
        offsets=np.zeros(1, np.int64),
    )


def answer_at_once(batch: JaggedBatch) -> Future[int]:
    future: Future[int] = Future()
    future.set_result(batch.samples)
    return future


def answer_late(seconds: float):
    def submit(batch: JaggedBatch) -> Future[int]:
        future: Future[int] = Future()
        threading.Timer(seconds, future.set_result, [batch.samples]).start()
        return future

    return submit


def test_poisson_gaps_have_the_asked_mean() -> None:
    due_s = poisson_arrivals_s(100, 20_000, seed=1)
    gaps = np.diff(due_s)
    assert due_s[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_bursts_come_at_four_times_the_rate_for_a_tenth_of_each_second() -> None:
    due_s = burst_arrivals_s(1000, 30_000, seed=1)
    assert (np.diff(due_s) >= 0).all()
    second, rest = np.divmod(due_s[due_s < 29], 1)
    assert np.bincount(second.astype(int)).mean() == pytest.approx(1000, rel=0.03)
    assert (rest < 0.1).mean() == pytest.approx(0.4, rel=0.03)
    quiet = rest[rest >= 0.1]
    assert ((0.1 <= quiet) & (quiet < 0.55)).mean() == pytest.approx(0.5, rel=0.03)


def test_a_rate_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 requests per second"):
        poisson_arrivals_s(0, 1, seed=0)


def test_latency_is_from_due_time_to_answer() -> None:
    result = run_open_loop(answer_late(0.02), [request(3)], np.arange(20) * 0.005)
    assert 20 <= result.p50_ms <= result.p95_ms <= result.p99_ms <= result.max_ms < 200
    assert result.requests == 20 and result.failed == 0 and result.kept_up is not None


def test_a_held_up_sender_hides_nothing() -> None:
    """Ten requests are due at once, and each submit takes 10 ms: the last waits for all."""

    def slow_submit(batch: JaggedBatch) -> Future[int]:
        time.sleep(0.01)
        return answer_at_once(batch)

    result = run_open_loop(slow_submit, [request(1)], np.zeros(10))
    assert result.max_ms >= 100


def test_failures_are_counted_apart() -> None:
    turns = iter(range(100))

    def every_second_fails(batch: JaggedBatch) -> Future[int]:
        if next(turns) % 2:
            raise RuntimeError("full")
        return answer_at_once(batch)

    result = run_open_loop(every_second_fails, [request(1)], np.arange(10) * 1e-3)
    assert result.failed == 5


def test_what_was_offered_at_the_same_time_is_joined_by_due_time() -> None:
    nan = float("nan")
    one = Offered(
        due_s=np.array([0.0, 2.0]),
        answered_s=np.array([0.1, 2.2]),
        samples=np.array([1, 2]),
        failures={"QueueFull": 1},
    )
    other = Offered(
        due_s=np.array([1.0, 3.0]),
        answered_s=np.array([nan, 3.4]),
        samples=np.array([3, 4]),
        failures={"QueueFull": 1, "StepFailed": 1},
    )
    both = Offered.joined([other, one])
    assert both.due_s.tolist() == [0, 1, 2, 3] and both.samples.tolist() == [1, 3, 2, 4]
    assert np.array_equal(both.answered_s, [0.1, nan, 2.2, 3.4], equal_nan=True)
    assert both.failures == {"QueueFull": 2, "StepFailed": 1}
    load = LoadResult.of(both)
    assert (load.requests, load.failed) == (4, 3)
    assert load.max_ms == pytest.approx(400) and load.p50_ms == pytest.approx(200)


def test_of_several_runs_the_one_with_the_median_p99_counts() -> None:
    run = run_open_loop(answer_at_once, [request(1)], np.zeros(10))
    runs = [replace(run, p99_ms=ms) for ms in (9, 2, 40, 3)]
    assert of_median_p99(runs) is runs[3]  # of two in the middle the better one
    assert of_median_p99(runs[:3]) is runs[0]
    assert of_median_p99(runs[:1]) is runs[0]


def test_a_server_that_answers_nothing_is_an_error() -> None:
    def refuse(batch: JaggedBatch) -> Future[int]:
        raise RuntimeError("full")

    with pytest.raises(LoadError, match="none of 3 requests"):
        run_open_loop(refuse, [request(1)], np.zeros(3))
    with pytest.raises(LoadError, match="1 requests had no answer"):
        run_open_loop(lambda batch: Future(), [request(1)], np.zeros(1), timeout_s=0.05)


def test_saturation_keeps_so_many_samples_inside() -> None:
    """Eight samples inside, each request of two takes 10 ms: 800 samples per second."""
    inside, most, lock = 0, 0, threading.Lock()

    def submit(batch: JaggedBatch) -> Future[int]:
        nonlocal inside, most
        with lock:
            inside += batch.samples
            most = max(most, inside)
        future: Future[int] = Future()

        def answer() -> None:
            nonlocal inside
            with lock:
                inside -= batch.samples
            future.set_result(0)

        threading.Timer(0.01, answer).start()
        return future

    rate = saturation_samples_per_s(submit, [request(2)], in_flight_samples=8, seconds=0.5)
    assert most == 8
    assert 100 < rate <= 850


def test_saturation_of_a_failing_server_is_an_error() -> None:
    def fail(batch: JaggedBatch) -> Future[int]:
        future: Future[int] = Future()
        future.set_exception(RuntimeError("no device"))
        return future

    with pytest.raises(LoadError, match="no device"):
        saturation_samples_per_s(fail, [request(1)], in_flight_samples=1, seconds=0.05)


@pytest.mark.parametrize("second_s", [0.3, 0.33])
def test_saturation_of_a_slow_server_takes_until_something_is_answered(second_s: float) -> None:
    """Also where one of two that are inside is answered a little later."""
    late = itertools.cycle([answer_late(0.3), answer_late(second_s)])
    rate = saturation_samples_per_s(
        lambda batch: next(late)(batch), [request(2)], in_flight_samples=4, seconds=0.05
    )
    assert 1 < rate <= 4 / 0.29
