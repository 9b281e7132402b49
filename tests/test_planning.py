"""An engine with a profile table: batches are cut and co-run by it, and answers stay the same."""

import dataclasses
import logging
import time

import pytest

from fake_segments import OPTIONS, DeviceBroke, FakeSegments, samples, scores
from recflow_jax.engine import launcher, planning
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import StepFailed
from scheduling.costs import CO_RUN, step_key
from scheduling.request import WHOLE, SegmentShape
from scheduling.table import ProfileTable
from test_profiles import row, table_of


def with_co_runs(device: FakeSegments) -> ProfileTable:
    """Every slice beside every segment costs nothing, if it is in the same executable."""
    table = table_of(device)
    keys = [
        step_key(shape, size, scheme=CO_RUN, config="deep/all")
        for batch in device.batch_buckets
        for shape in SegmentShape.all_of(2, batch)
        for size in device.slice_buckets
    ]
    return table.with_rows([row(1.0, **dataclasses.asdict(key)) for key in keys])


@pytest.mark.parametrize("are_large", [False, True])
def test_slices_that_ride_give_the_same_answers(are_large: bool, monkeypatch: pytest.MonkeyPatch):
    """Large ones leave for the device before the call."""
    if are_large:
        monkeypatch.setattr(launcher, "LARGE_IDS", 0)
    device = FakeSegments()
    with Engine.from_segments(device, profile=with_co_runs(device)) as engine:
        device.hold()
        answers = [engine.submit(samples(0, 1))]
        limit = time.monotonic() + 30
        while not engine.stats().steps:
            assert time.monotonic() < limit, "the first was not launched"
            time.sleep(0.001)
        answers += [engine.submit(samples(n, n + 1)) for n in range(1, 20)]
        device.go_on()
        assert [a.result(30).tolist() for a in answers] == [scores(n, n + 1) for n in range(20)]
        stats = engine.stats()
        assert stats.co_runs["deep/all"] > 0
        whole = stats.co_runs[WHOLE]  # the first, when nothing was in flight
        assert stats.batch_segments == {1: whole, 2: stats.batches - whole}
        assert device.uploads == (stats.slices if are_large else 0)


@pytest.mark.parametrize("what", ["start", "run", "embed", "upload"])
@pytest.mark.parametrize("how", ["break_next", "lose_next"])
def test_a_co_run_that_fails_ends_those_in_it_and_no_others(
    how: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "LARGE_IDS", 0)
    device = FakeSegments()
    with Engine.from_segments(device, profile=with_co_runs(device)) as engine:
        device.hold()
        answers = [engine.submit(samples(n, n + 1)) for n in range(20)]
        getattr(device, how)(what)
        device.go_on()
        ends = [a.exception(30) for a in answers]
        failed = [end for end in ends if end is not None]
        assert all(isinstance(end, StepFailed) for end in failed)
        assert all(isinstance(end.__cause__, DeviceBroke) for end in failed)
        for n, (answer, end) in enumerate(zip(answers, ends, strict=True)):
            if end is None:
                assert answer.result().tolist() == scores(n, n + 1)
        assert engine.submit(samples(5)).result(30).tolist() == scores(5)


def test_a_p99_makes_batches_smaller():
    device = FakeSegments(dataclasses.replace(OPTIONS, p99_ms=1e9))
    with Engine.from_segments(device, profile=table_of(device)) as engine:
        assert engine.stats().profile
    small = FakeSegments(dataclasses.replace(OPTIONS, p99_ms=1e5))
    with Engine.from_segments(small, profile=table_of(small)) as engine:
        small.hold()
        answers = [engine.submit(samples(n)) for n in range(8)]
        small.go_on()
        assert [a.result(30).tolist() for a in answers] == [scores(n) for n in range(8)]
        assert max(engine.stats().batch_buckets) == 2


def test_a_p99_needs_a_table():
    device = FakeSegments(dataclasses.replace(OPTIONS, p99_ms=1.0))
    with pytest.raises(ValueError, match="p99_ms needs a profile table"):
        Engine.from_segments(device)


def test_without_a_table_it_says_once_that_it_runs_serially(caplog: pytest.LogCaptureFixture):
    planning._say_serial.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Engine.from_segments(FakeSegments()).close()
    assert [r.getMessage() for r in caplog.records] == [
        "no profile table: embeddings and MLPs of fake run one after the other; "
        "recflow profile makes a table"
    ]
