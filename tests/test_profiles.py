"""A profile table in an engine: checked, and used to turn away what cannot be in time."""

import dataclasses
from pathlib import Path

import jax
import pytest

from fake_segments import OPTIONS, FakeSegments, samples, scores
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import DeadlineExceeded
from recflow_jax.engine.profiles import IdleTimes, load_profile, versions
from scheduling.table import ProfileRow, ProfileTable, ProfileTableError


def row(median_us: float, **key) -> ProfileRow:
    return ProfileRow(median_us=median_us, p10_us=median_us, p90_us=median_us, samples=1, **key)


def table_of(segments: FakeSegments) -> ProfileTable:
    """A slice of n samples takes n s, each of two segments of a batch of n 10 n s."""
    slices = [
        row(1e6 * b.samples, kind="slice", slice_samples=b.samples, slice_ids=b.ids)
        for b in segments.slice_buckets
    ]
    batches = [
        row(1e7 * bucket, kind="segment", segments=2, segment=index, batch=bucket)
        for bucket in segments.batch_buckets
        for index in range(2)
    ]
    return ProfileTable(
        device=jax.devices()[0].device_kind,
        backend="xla",
        versions=versions(),
        model="fake",
        fingerprint=segments.config.fingerprint,
        created="2026-01-01T00:00:00",
        rows=(*slices, *batches),
    )


def test_what_an_idle_engine_takes_at_least():
    device = FakeSegments()
    times = IdleTimes(table_of(device), device)
    assert times.least_us(1, 1) == 1e6 + 2 * 2e7
    assert times.least_us(3, 3) == 4e6 + 2 * 4e7
    assert times.least_us(1, 129) == 4e6 + 2 * 2e7
    assert times.least_us(100, 10_000) == 4e6 + 2 * 8e7


def test_sizes_between_those_measured_take_what_lies_between():
    table = table_of(FakeSegments())
    finer = FakeSegments(dataclasses.replace(OPTIONS, half_steps_from=2))
    assert [b.samples for b in finer.slice_buckets] == [1, 2, 3, 4]
    times = IdleTimes(table, finer)
    assert times.least_us(3, 3) == 3e6 + 2 * 3e7
    assert times.least_us(5, 10_000) == 4e6 + 2 * 6e7


def test_what_was_not_measured_counts_nothing():
    device = FakeSegments()
    table = table_of(device)
    some = dataclasses.replace(table, rows=table.rows[:1])
    assert IdleTimes(some, device).least_us(1, 1) == 1e6
    assert IdleTimes(some, device).least_us(4, 4) == 0


def test_a_deadline_that_an_idle_engine_would_miss_is_rejected_at_once():
    device = FakeSegments()
    with Engine.from_segments(device, profile=table_of(device)) as engine:
        with pytest.raises(DeadlineExceeded, match="takes 41000.000 ms at least"):
            engine.submit(samples(1), deadline_ms=40_900)
        assert engine.submit(samples(1), deadline_ms=41_900).result(30).tolist() == scores(1)
        assert engine.stats().profile == f"fake on {jax.devices()[0].device_kind}"
        assert engine.stats().rejected == {"deadline": 1}


def test_a_table_is_loaded_from_its_file(tmp_path: Path):
    device, path = FakeSegments(), tmp_path / "profile.json"
    table_of(device).save(path)
    assert load_profile(str(path), device) == table_of(device)
    with Engine.from_segments(device, profile=path) as engine:
        assert engine.stats().profile == str(path)


def test_a_table_of_other_sizes_is_refused():
    device = FakeSegments()
    table = table_of(device)
    some = dataclasses.replace(table, rows=table.rows[:-1])
    with pytest.raises(ProfileTableError, match="of other sizes: .*batch=8.* was not measured"):
        Engine.from_segments(device, profile=some)


@pytest.mark.parametrize("field", ["device", "backend", "fingerprint"])
def test_a_table_of_something_else_is_refused(field: str):
    device = FakeSegments()
    other = dataclasses.replace(table_of(device), **{field: "other"})
    with pytest.raises(ProfileTableError, match=field):
        Engine.from_segments(device, profile=other)


def test_a_table_of_another_jax_is_refused():
    device = FakeSegments()
    other = dataclasses.replace(table_of(device), versions=versions() | {"jax": "0.1"})
    with pytest.raises(ProfileTableError, match="jax is .* here, '0.1' in the table"):
        Engine.from_segments(device, profile=other)
