"""The serial batching server: collects up to a batch or for a time, answers each its own."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

import small_models as models
from recflow_jax.batch import JaggedBatch
from recflow_jax.data.workloads import generate
from recflow_jax.measure.baselines import stacked_variants
from recflow_jax.measure.server import BatchingServer, PlainLadder


def request(samples: int, value: float) -> JaggedBatch:
    return JaggedBatch(
        dense=np.full((samples, 1), value, np.float32),
        values=np.zeros(0, np.int32),
        offsets=np.zeros(1, np.int64),
    )


class Doubler:
    """Scores are twice the dense features; notes the requests of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, requests: Sequence[JaggedBatch]) -> np.ndarray:
        self.may_run.wait()
        self.batches.append([r.samples for r in requests])
        return 2 * JaggedBatch.join(requests).dense


def test_each_request_gets_its_own_answer() -> None:
    run = Doubler()
    with BatchingServer(run, batch=8, wait_ms=1) as server:
        answers = [server.submit(request(1 + i % 3, i)) for i in range(20)]
        for i, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.result(5), np.full((1 + i % 3, 1), 2.0 * i))
    assert all(sum(batch) <= 8 for batch in run.batches)


def test_a_full_batch_does_not_wait() -> None:
    with BatchingServer(Doubler(), batch=4, wait_ms=10_000) as server:
        answers = [server.submit(request(2, i)) for i in range(2)]
        assert [len(answer.result(5)) for answer in answers] == [2, 2]


def test_a_batch_starts_when_the_oldest_has_waited() -> None:
    with BatchingServer(Doubler(), batch=100, wait_ms=30) as server:
        started = time.perf_counter()
        server.submit(request(1, 0)).result(5)
        assert time.perf_counter() - started >= 0.03


def test_what_comes_during_a_run_is_the_next_batch() -> None:
    run = Doubler()
    run.may_run.clear()
    with BatchingServer(run, batch=8, wait_ms=0) as server:
        first = server.submit(request(1, 0))
        time.sleep(0.05)
        later = [server.submit(request(2, i)) for i in range(3)]
        run.may_run.set()
        for answer in (first, *later):
            answer.result(5)
    assert run.batches == [[1], [2, 2, 2]]


def test_a_large_request_is_a_batch_of_its_own() -> None:
    run = Doubler()
    with BatchingServer(run, batch=4, wait_ms=0) as server:
        assert len(server.submit(request(9, 1)).result(5)) == 9


def test_a_failed_run_fails_its_requests_alone() -> None:
    def fail_once(requests: Sequence[JaggedBatch]) -> np.ndarray:
        if requests[0].samples == 1:
            raise RuntimeError("broken")
        return requests[0].dense

    with BatchingServer(fail_once, batch=1, wait_ms=0) as server:
        bad, good = server.submit(request(1, 0)), server.submit(request(2, 0))
        with pytest.raises(RuntimeError, match="broken"):
            bad.result(5)
        assert len(good.result(5)) == 2


def test_plain_ladder_scores_any_size() -> None:
    """More samples or ids than the largest shape holds are cut in half."""
    config, params = models.DOT, models.params_of(models.DOT)
    (plain,) = stacked_variants(config)
    example = generate(config, 64, seed=1)
    run = PlainLadder(plain, plain.prepare(params), smallest=4, largest=8, example=example)
    for samples in (1, 5, 21):
        batch = generate(config, samples, seed=samples)
        expected = models.reference_scores(config, params, batch)
        models.assert_same_scores(config, run([batch]), expected)
