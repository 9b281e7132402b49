"""An engine that collects batches: the same answers, deadlines and ends as incremental batching."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fake_segments import OPTIONS, FakeSegments, samples, scores
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed
from scheduling import Collecting
from small_models import CONCAT, assert_same_scores, compiled, params_of, reference_scores
from test_launcher import SOON_S, eventually, result

LONG_MS = 1e6
FULL = Collecting(wait_ms=LONG_MS, max_samples=3)


@pytest.fixture
def device() -> FakeSegments:
    return FakeSegments()


@pytest.fixture
def engine(device: FakeSegments) -> Iterator[Engine]:
    """Its batches start when three samples are there."""
    with Engine.from_segments(device, batching=FULL) as engine:
        yield engine
        device.go_on()
        engine.close(drain=False)


def test_a_batch_waits_until_it_is_full(engine: Engine):
    first = [engine.submit(samples(value)) for value in (1, 2)]
    assert engine.stats().steps == 0
    assert result(engine.submit(samples(3))) == scores(3)
    assert [result(answer) for answer in first] == [scores(1), scores(2)]
    stats = engine.stats()
    assert (stats.batches, stats.slices, stats.mean_batch) == (1, 1, 3)
    assert stats.batch_segments == {1: 1}


def test_a_batch_starts_when_its_oldest_has_waited(device: FakeSegments):
    with Engine.from_segments(device, batching=Collecting(wait_ms=30)) as engine:
        before = time.monotonic()
        assert result(engine.submit(samples(1))) == scores(1)
        assert time.monotonic() - before >= 0.03
        assert engine.stats().wait_p50_us >= 30_000


@pytest.mark.parametrize("in_flight", [1, 2])
def test_so_many_batches_are_on_the_device(device: FakeSegments, in_flight: int):
    device.hold()
    batching = Collecting(wait_ms=0, max_samples=4, in_flight=in_flight)
    with Engine.from_segments(device, batching=batching) as engine:
        answers = [engine.submit(samples(*range(n, n + 4))) for n in range(6)]
        eventually(lambda: engine.stats().batches == in_flight)
        queued = engine.stats().queued_samples
        assert (engine.stats().steps, queued) == (in_flight, 24)  # from ids to scores in one
        device.go_on()
        assert [result(a) for a in answers] == [scores(*range(n, n + 4)) for n in range(6)]
        assert (engine.stats().batches, engine.stats().mean_batch) == (6, 4)


def test_answers_are_the_models():
    batch = generate(CONCAT, 40, seed=5)
    batching = Collecting(wait_ms=1, in_flight=2)
    with Engine.from_segments(compiled(CONCAT), batching=batching) as engine:
        pieces = [engine.submit(batch.part(n, n + 5)) for n in range(0, 40, 5)]
        found = np.concatenate([piece.result(SOON_S) for piece in pieces])
    assert_same_scores(CONCAT, found, reference_scores(CONCAT, params_of(CONCAT), batch))


def test_more_than_a_batch_is_answered_too(device: FakeSegments):
    with Engine.from_segments(device, batching=Collecting(wait_ms=0)) as engine:
        assert engine.predict(samples(*range(100))).tolist() == scores(*range(100))


def test_a_deadline_passes_while_a_batch_is_collected(engine: Engine):
    kept = engine.submit(samples(1))
    with pytest.raises(DeadlineExceeded, match="before the request was launched"):
        engine.submit(samples(2), deadline_ms=50).result(timeout=SOON_S)
    assert engine.stats().queued_samples == 1 and not kept.done()


def test_who_cancels_is_in_no_batch(engine: Engine):
    assert engine.submit(samples(100)).cancel()
    answers = [engine.submit(samples(value)) for value in (1, 2, 3)]
    assert [result(answer) for answer in answers] == [scores(1), scores(2), scores(3)]
    assert (engine.stats().cancelled, engine.stats().queued_samples) == (1, 0)


def test_draining_answers_what_is_still_collected(device: FakeSegments):
    engine = Engine.from_segments(device, batching=Collecting(wait_ms=30))
    answer = engine.submit(samples(1))
    engine.close()
    assert answer.result(timeout=0).tolist() == scores(1)


def test_closing_without_drain_ends_who_waits(device: FakeSegments):
    engine = Engine.from_segments(device, batching=FULL)
    answer = engine.submit(samples(1))
    engine.close(drain=False)
    with pytest.raises(EngineClosed):
        answer.result(timeout=0)


def test_engines_share_segments_and_each_has_its_own_batching(device: FakeSegments):
    with (
        Engine.from_segments(device) as incremental,
        Engine.from_segments(device, batching=Collecting(wait_ms=0)) as serial,
    ):
        assert result(incremental.submit(samples(1))) == result(serial.submit(samples(1)))
        assert incremental.options.batching == "incremental"
        assert serial.options.batching == Collecting(wait_ms=0)
        assert incremental.stats().batch_segments == {2: 1}
        assert serial.stats().batch_segments == {1: 1}


def test_options_say_it_too():
    options = replace(OPTIONS, batching=FULL)
    with Engine.from_segments(FakeSegments(options)) as engine:
        answers = [engine.submit(samples(value)) for value in (1, 2, 3)]
        assert [result(answer) for answer in answers] == [scores(1), scores(2), scores(3)]
        assert engine.stats().mean_batch == 3
