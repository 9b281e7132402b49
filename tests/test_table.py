"""The profile table: what is written is read, what does not fit is refused, a miss is explicit."""

import json
from dataclasses import replace
from typing import Any

import pytest

from scheduling import table as table_module
from scheduling.table import (
    SCHEMA,
    WITHOUT_LAUNCHES,
    ProfileKey,
    ProfileMiss,
    ProfileRow,
    ProfileTable,
    ProfileTableError,
)


def slice_key(samples: int, ids: int, **how) -> ProfileKey:
    return ProfileKey(kind="slice", slice_samples=samples, slice_ids=ids, **how)


def segment_key(batch: int, segment: int = 0, **how) -> ProfileKey:
    return ProfileKey(kind="segment", segments=2, segment=segment, batch=batch, **how)


def timed(key: ProfileKey, median_us: float) -> ProfileRow:
    names = (
        "kind",
        "segments",
        "segment",
        "batch",
        "slice_samples",
        "slice_ids",
        "scheme",
        "config",
    )
    return ProfileRow(
        **{name: getattr(key, name) for name in names},
        median_us=median_us,
        p10_us=median_us - 1,
        p90_us=median_us + 1,
        samples=50,
    )


STEP = ProfileKey(kind="step", segments=2, segment=1, batch=64, slice_samples=8, slice_ids=80)
TABLE = ProfileTable(
    device="NVIDIA H100",
    backend="mosaic",
    versions={"jax": "0.11.2", "cuda": "12.9"},
    model="dlrm-v2",
    fingerprint="abc",
    created="2026-01-02T03:04:05+00:00",
    rows=(
        timed(slice_key(64, 640), 30),
        timed(slice_key(128, 1280), 50),
        timed(slice_key(64, 640, scheme="corun"), 3),
        timed(segment_key(64), 10),
        timed(segment_key(256), 25),
        timed(segment_key(512), 40),
        timed(segment_key(256, segment=1), 7),
        timed(STEP, 60),
    ),
)
HERE: dict[str, Any] = {
    "device": TABLE.device,
    "backend": TABLE.backend,
    "fingerprint": TABLE.fingerprint,
    "versions": TABLE.versions,
}


# --- look-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("miss", ["error", "next_bucket", "scale"])
def test_what_was_measured_is_returned_whatever_the_policy(miss):
    assert TABLE.time_us(segment_key(256), miss=miss) == 25
    assert TABLE.time_us(slice_key(64, 640, scheme="corun"), miss=miss) == 3
    assert TABLE.time_us(STEP, miss=miss) == 60


def test_by_default_a_miss_is_an_error_that_names_the_key_and_the_nearest_rows():
    with pytest.raises(ProfileMiss) as caught:
        TABLE.time_us(segment_key(300))
    assert str(caught.value) == (
        "segment(segments=2, segment=0, batch=300, scheme=serial) was not measured "
        "(miss policy error); nearest: segment(segments=2, segment=0, batch=256, scheme=serial), "
        "segment(segments=2, segment=0, batch=512, scheme=serial), "
        "segment(segments=2, segment=0, batch=64, scheme=serial)"
    )


@pytest.mark.parametrize(
    ("key", "time_us"),
    [
        (segment_key(65), 25),
        (segment_key(1), 10),
        (slice_key(64, 641), 50),  # one size more is enough to need the larger bucket
        (slice_key(1, 1, scheme="corun"), 3),
        (replace(STEP, batch=33, slice_ids=41), 60),
    ],
)
def test_next_bucket_takes_the_nearest_that_is_as_large_in_every_size(key, time_us):
    assert TABLE.time_us(key, miss="next_bucket") == time_us


@pytest.mark.parametrize(
    ("key", "time_us"),
    [
        (segment_key(1024), 80),
        (segment_key(384), 25 * 1.5),
        (slice_key(256, 1280), 100),
        (slice_key(128, 5120), 200),  # by the size that grows most
        (slice_key(127, 1280), 60),  # 128 samples would be smaller in no size
        (replace(STEP, batch=128, slice_samples=32), 240),
    ],
)
def test_scale_takes_the_nearest_smaller_and_the_largest_ratio(key, time_us):
    assert TABLE.time_us(key, miss="scale") == pytest.approx(time_us)


@pytest.mark.parametrize(
    ("key", "miss"),
    [
        (segment_key(513), "next_bucket"),
        (segment_key(63), "scale"),
        (slice_key(128, 600), "scale"),
        (segment_key(64, segment=2), "next_bucket"),
        (segment_key(64, scheme="corun"), "scale"),
        (segment_key(64, config="tile=64"), "next_bucket"),
        (replace(STEP, slice_ids=81), "next_bucket"),
    ],
)
def test_a_policy_that_finds_no_row_of_the_series_is_a_miss(key, miss):
    with pytest.raises(ProfileMiss, match=f"miss policy {miss}.*nearest"):
        TABLE.time_us(key, miss=miss)


def test_a_miss_of_a_kind_that_was_never_measured_says_so():
    with pytest.raises(ProfileMiss, match="the table has no step at all"):
        replace(TABLE, rows=TABLE.rows[:-1]).time_us(STEP)


def test_an_unknown_policy_is_refused_even_for_a_hit():
    with pytest.raises(ValueError, match="'guess'.*error, next_bucket, scale"):
        TABLE.time_us(STEP, miss="guess")  # pyright: ignore[reportArgumentType]


# --- growing --------------------------------------------------------------------------------------


def test_a_profile_is_resumed_by_what_it_has():
    empty = replace(TABLE, rows=())
    assert not empty.has(STEP)
    some = empty.with_rows([timed(STEP, 60), timed(segment_key(64), 10)])
    assert some.has(STEP) and some.has(segment_key(64)) and not some.has(segment_key(65))
    again = some.with_rows([timed(STEP, 61)])
    assert again.time_us(STEP) == 61 and len(again.rows) == 2 and some.time_us(STEP) == 60


def test_two_rows_for_one_key_are_refused():
    with pytest.raises(ProfileTableError, match=r"two rows for step\(segments=2, segment=1"):
        replace(TABLE, rows=(timed(STEP, 60), timed(STEP, 61)))


# --- what it holds for ----------------------------------------------------------------------------


def test_a_table_made_for_this_is_accepted():
    TABLE.check(**HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "NVIDIA A10"}, "device is 'NVIDIA A10' here, 'NVIDIA H100' in the table"),
        ({"backend": "xla"}, "backend is 'xla' here, 'mosaic' in the table"),
        ({"fingerprint": "abd"}, "fingerprint is 'abd' here, 'abc' in the table"),
        ({"versions": {"jax": "0.12.0", "cuda": "12.9"}}, "jax is '0.12.0' here, '0.11.2' in"),
        ({"versions": {"jax": "0.11.2"}}, "cuda is None here, '12.9' in the table"),
        ({"versions": {**TABLE.versions, "rocm": "7"}}, "rocm is '7' here, None in the table"),
    ],
)
def test_a_table_made_for_something_else_is_refused(change, message):
    with pytest.raises(ProfileTableError) as caught:
        TABLE.check(**{**HERE, **change})
    assert message in str(caught.value)
    model = "MODEL" if "fingerprint" in change else "dlrm-v2"
    assert str(caught.value).endswith(f"Make a new one: recflow profile --model {model}")


def test_all_that_differs_is_named_at_once():
    with pytest.raises(ProfileTableError, match=r"device is .*; fingerprint is "):
        TABLE.check(**{**HERE, "device": "cpu", "fingerprint": "x"})


# --- the file -------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "profiles" / "h100.json"
    TABLE.save(path)
    assert ProfileTable.load(path) == TABLE
    assert ProfileTable.load(str(path)).time_us(STEP) == 60
    assert [file.name for file in path.parent.iterdir()] == ["h100.json"]


def test_a_file_from_before_launches_were_measured_knows_none(tmp_path):
    values = _saved_values(tmp_path)
    rows = [_without(row, "launch_us") for row in values["rows"]]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(values | {"schema": WITHOUT_LAUNCHES, "rows": rows}))
    assert ProfileTable.load(path) == TABLE
    path.write_text(json.dumps(_without(values, "rows") | {"schema": WITHOUT_LAUNCHES}))
    with pytest.raises(ProfileTableError, match="the table lacks rows"):
        ProfileTable.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "h100.json"
    TABLE.save(path)

    def half_written(file, text, **how):
        with file.open("w") as stream:
            stream.write(text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(table_module.Path, "write_text", half_written)
    with pytest.raises(OSError, match="disk full"):
        replace(TABLE, rows=()).save(path)
    assert ProfileTable.load(path) == TABLE
    assert [file.name for file in tmp_path.iterdir()] == ["h100.json"]


def _saved_values(tmp_path) -> dict:
    TABLE.save(tmp_path / "table.json")
    return json.loads((tmp_path / "table.json").read_text())


def _without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v | {"schema": SCHEMA + 1}, f"schema is {SCHEMA + 1}, this version reads"),
        (lambda v: _without(v, "schema"), "schema is None.*recflow profile"),
        (lambda v: [], "schema is None"),
        (lambda v: _without(v, "device"), "the table lacks device"),
        (lambda v: _without(v, "rows"), "the table lacks rows"),
        (lambda v: v | {"colour": 1}, "the table has unknown colour"),
        (lambda v: v | {"rows": [_without(v["rows"][0], "p90_us")]}, "row 0 lacks p90_us"),
        (lambda v: v | {"rows": [v["rows"][0], 5]}, "row 1 is 5, not an object"),
        (lambda v: v | {"rows": [v["rows"][0] | {"p10_us": 99}]}, "do not ascend: 99"),
        (lambda v: v | {"rows": [v["rows"][0] | {"median_us": "x"}]}, "not supported"),
        (lambda v: v | {"rows": v["rows"][:1] * 2}, "two rows for slice"),
    ],
)
def test_a_spoiled_file_is_refused_by_name(tmp_path, spoil, message):
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps(spoil(_saved_values(tmp_path))))
    with pytest.raises(ProfileTableError, match=f"spoiled.json: .*{message}"):
        ProfileTable.load(path)


def test_a_file_that_is_no_json_or_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": 1, ')
    with pytest.raises(ProfileTableError, match=r"half.json: not JSON: .*line 1.*Make it"):
        ProfileTable.load(tmp_path / "half.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileTableError, match="binary.json: "):
        ProfileTable.load(tmp_path / "binary.json")
    with pytest.raises(ProfileTableError, match="none.json: no such file.*recflow profile"):
        ProfileTable.load(tmp_path / "none.json")


# --- keys and rows --------------------------------------------------------------------------------


SEGMENT = {"kind": "segment", "segments": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sliced"}, "kind is 'sliced', not one of slice, segment, step"),
        ({"kind": "slice", "slice_samples": 4}, "slice_ids of a slice is None"),
        (
            SEGMENT | {"segment": -1, "batch": 4},
            "segment of a segment is -1",
        ),
        (SEGMENT | {"segment": 0, "batch": 0}, "batch of a segment is 0"),
        (
            SEGMENT | {"segment": 0, "batch": 4.0},
            "batch of a segment is 4.0",
        ),
        (
            SEGMENT | {"segment": 0, "batch": 4, "slice_ids": 1},
            "a segment has no slice_ids, but it is 1",
        ),
    ],
)
def test_a_key_with_sizes_out_of_place_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ProfileKey(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p10_us": 61.0}, "do not ascend: 61.0, 60, 61"),
        ({"median_us": float("nan")}, "do not ascend"),
        ({"p90_us": float("inf")}, "do not ascend"),
        ({"p10_us": -1.0}, "do not ascend"),
        ({"samples": 0}, r"samples of step\(.*\) is 0"),
        ({"batch": None}, "batch of a step is None"),
    ],
)
def test_a_row_that_is_no_measurement_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(timed(STEP, 60), **change)


def test_a_row_knows_its_key():
    assert timed(STEP, 60).key == STEP and hash(timed(STEP, 60).key) == hash(STEP)


@pytest.mark.parametrize(
    ("key", "us"),
    [
        (slice_key(64, 640), 30),
        (slice_key(96, 960), 40),
        (slice_key(80, 800), 35),
        (slice_key(64, 960), 40),
        (segment_key(384), 32.5),
    ],
    ids=["measured", "half way", "a quarter", "of ids alone", "segment"],
)
def test_what_lies_between_two_sizes_takes_its_share_of_the_difference(key: ProfileKey, us: float):
    found = TABLE.between(key)
    assert (found.median_us, found.p10_us, found.p90_us) == (us, us - 1, us + 1)
    assert (found.key, found.samples) == (key, 50)


@pytest.mark.parametrize(
    "key",
    [
        slice_key(32, 320),
        slice_key(256, 2560),
        slice_key(96, 960, scheme="corun"),
        segment_key(384, segment=1),
        replace(STEP, slice_samples=4, slice_ids=40),
    ],
    ids=["smaller", "larger", "another scheme", "another segment", "a step"],
)
def test_nothing_lies_outside_and_steps_are_measured(key: ProfileKey):
    with pytest.raises(ProfileMiss, match=f"{key.kind}.* was not measured"):
        TABLE.between(key)
