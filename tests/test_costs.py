"""What a step costs: from a profile table, and on the host."""

import pytest

from scheduling import (
    HostCosts,
    Part,
    ProfileKey,
    ProfileMiss,
    ProfileRow,
    ProfileTable,
    Segment,
    Slice,
    SliceBucket,
    Step,
    TableTimes,
    segment_key,
    slice_key,
    step_key,
)

SMALL, LARGE = SliceBucket(samples=2, ids=20), SliceBucket(samples=4, ids=40)


def row(key: ProfileKey, us: float) -> ProfileRow:
    values = {name: getattr(key, name) for name in ("kind", "segment", "batch")}
    values |= {"slice_samples": key.slice_samples, "slice_ids": key.slice_ids}
    return ProfileRow(**values, median_us=us, p10_us=us, p90_us=us, samples=1)


TABLE = ProfileTable(
    device="abacus",
    backend="xla",
    versions={},
    model="m",
    fingerprint="f",
    created="2026-01-01T00:00:00",
    rows=(
        row(slice_key(SMALL), 10),
        row(slice_key(LARGE), 17),
        row(segment_key(0, 8), 100),
        row(segment_key(1, 8), 200),
        row(step_key(1, 8, LARGE), 205),
    ),
)


def piece(bucket: SliceBucket) -> Slice:
    parts = (Part(request_id=0, start=0, stop=1),)
    return Slice(batch_id=1, row=0, parts=parts, samples=1, ids=15, bucket=bucket)


def step(bucket: SliceBucket | None, segment: tuple[int, int] | None) -> Step:
    return Step(
        id=0,
        slice=bucket and piece(bucket),
        segment=segment and Segment(batch_id=0, index=segment[0], bucket=segment[1], samples=1),
    )


@pytest.mark.parametrize(
    ("bucket", "segment", "us"),
    [
        (SMALL, None, 10),
        (LARGE, None, 17),
        (None, (1, 8), 200),
        (LARGE, (1, 8), 205),
        (SMALL, (1, 8), 210),
        (LARGE, (0, 8), 117),
    ],
)
def test_a_step_of_both_is_as_measured_or_one_after_the_other(bucket, segment, us: float):
    times = TableTimes(TABLE)
    assert [times.step_us(step(bucket, segment)) for _ in range(2)] == [us, us]


def test_a_size_that_was_not_measured_is_no_guess():
    with pytest.raises(ProfileMiss, match=r"segment\(segment=0, batch=4"):
        TableTimes(TABLE).step_us(step(SMALL, (0, 4)))
    assert TableTimes(TABLE, "next_bucket").step_us(step(SMALL, (0, 4))) == 110
    assert TableTimes(TABLE, "scale").step_us(step(None, (1, 16))) == 400


def test_what_the_host_takes_for_a_step():
    host = HostCosts(
        launch_us=20, sample_us=2, id_us=0.5, byte_us=0.1, bytes_per_sample=100, bytes_per_id=4
    )
    assert host.launching_us(step(None, (0, 8))) == 20
    assert host.launching_us(step(SMALL, None)) == 20 + 2 + 7.5
    assert host.launching_us(step(SMALL, (0, 8))) == 20 + 20 + 2 + 7.5
    assert host.upload_us(step(None, (0, 8))) == 0
    assert host.upload_us(step(SMALL, (0, 8))) == pytest.approx(0.1 * (2 * 100 + 20 * 4))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(value: float):
    with pytest.raises(ValueError, match="launch_us is"):
        HostCosts(launch_us=value)
