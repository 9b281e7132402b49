"""`recflow profile`: what it measures, keeps, refuses and writes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import hand_tables
import small_models as models
from recflow_jax.commands.profile import ProfileResult, profile
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.measure import profiler
from recflow_jax.measure.timing import Timing, TimingOptions
from scheduling import ProfileTable, ProfileTableError, SegmentShape
from scheduling.costs import CO_RUN, segment_key, slice_key, step_key

CONFIG = models.DOT
OPTIONS = models.SMALL


def run(out: Path, **options: object) -> ProfileResult:
    arguments = {"out": out, "quick": True, "options": OPTIONS, **options}
    return profile(CONFIG, params=models.params_of(CONFIG), **arguments)  # pyright: ignore


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    return run(tmp_path_factory.mktemp("profiles"))


def test_every_part_is_measured_and_what_may_pay_in_one_executable(profiled: ProfileResult) -> None:
    slices = OPTIONS.slice_buckets(CONFIG)
    shapes = [
        shape
        for cut in models.compiled(CONFIG).cuts
        for batch in OPTIONS.batch_buckets
        for shape in SegmentShape.all_of(cut, batch)
    ]
    alone = {*map(slice_key, slices), *map(segment_key, shapes)}
    keys = {row.key for row in profiled.table.rows}
    assert {key for key in keys if key.kind != "step"} == alone
    largest = SegmentShape(segments=1, index=0, batch=16)
    steps = {step_key(largest, slices[-1])}
    steps |= {step_key(largest, slices[-1], scheme=CO_RUN, config="in-turn")}
    assert steps <= keys


@pytest.mark.parametrize(
    ("queued_us", "kernels_us", "device_us", "launch_us"),
    [(200.0, 180.0, 200.0, 80.0), (90.0, 15.0, 15.0, 90.0), (90.0, None, 90.0, 80.0)],
)
def test_what_waits_for_the_host_is_timed_by_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
    queued_us: float,
    kernels_us: float | None,
    device_us: float,
    launch_us: float,
) -> None:
    """A launch takes the host 80 us here."""
    monkeypatch.setattr(
        profiler,
        "measure_side_by_side",
        lambda timed, _: {name: Timing.of([queued_us]) for name in timed},
    )
    monkeypatch.setattr(profiler, "launch_us", lambda _, **how: 80.0)
    monkeypatch.setattr(profiler, "kernels_us", lambda _: kernels_us)
    segments = models.compiled(CONFIG)
    timer = profiler.Profiler(segments, ids="uniform", seed=0, timing=TimingOptions())
    (row,) = timer.slice_rows(segments.slice_buckets[0])
    assert (row.median_us, row.p10_us, row.launch_us) == (device_us, device_us, launch_us)
    rows = [r for s in segments.cuts for r in timer.segment_rows(s, segments.batch_buckets[0])]
    rows.append(row)
    table = hand_tables.table([replace(r, launch_us=r.launch_us / 2) for r in rows])
    assert timer.launch_factor(table) == 2
    assert timer.launch_factor(hand_tables.table([replace(r, launch_us=0) for r in rows])) == 1


def test_the_files_are_written(profiled: ProfileResult) -> None:
    assert profiled.path.name == "dot-cpu.json"
    assert ProfileTable.load(profiled.path) == profiled.table
    assert profiled.figure.read_bytes().startswith(b"\x89PNG")
    first, *pairs = profiled.schemes.read_text().splitlines()
    assert first.startswith("segments,segment,batch,slice_samples,slice_ids,serial_us,co_run_us")
    assert any(pair.startswith("1,0,16,8,") for pair in pairs)


def test_rows_without_launches_are_measured_anew(profiled: ProfileResult, tmp_path: Path) -> None:
    table = profiled.table
    older = [row for row in table.rows if row.kind == "slice"]
    table.with_rows(replace(row, launch_us=0) for row in older).save(tmp_path / profiled.path.name)
    again = run(tmp_path).table
    # By slices of other times, more pairs may be worth trying.
    assert {row.key for row in again.rows} >= {row.key for row in table.rows}
    assert all(row.launch_us > 0 for row in again.rows)
    assert {*again.rows} & {*table.rows} == {row for row in table.rows if row.kind != "slice"}


def test_an_engine_takes_the_table(profiled: ProfileResult) -> None:
    params = models.params_of(CONFIG)
    with Engine(CONFIG, params, options=OPTIONS, profile=profiled.path) as engine:
        batch = generate(CONFIG, 3, seed=1)
        expected = models.reference_scores(CONFIG, params, batch)
        models.assert_same_scores(CONFIG, engine.predict(batch), expected)


def test_half_steps_are_not_measured_and_an_engine_that_has_them_takes_the_table(
    profiled: ProfileResult, tmp_path: Path
) -> None:
    """They take what lies between: here batches of 10 samples, between 4 and 16."""
    finer = replace(OPTIONS, half_steps_from=4)
    rows = run(tmp_path, options=finer).table.rows
    alone = {row.key for row in profiled.table.rows if row.kind != "step"}
    assert {row.key for row in rows if row.kind != "step"} == alone
    assert 10 in finer.batch_buckets and 10 not in OPTIONS.batch_buckets
    params = models.params_of(CONFIG)
    with Engine(CONFIG, params, options=finer, profile=profiled.path) as engine:
        batch = generate(CONFIG, 9, seed=1)
        expected = models.reference_scores(CONFIG, params, batch)
        models.assert_same_scores(CONFIG, engine.predict(batch), expected)
        assert engine.stats().batch_buckets == {10: 1}


def copied(profiled: ProfileResult, tmp_path: Path, **changes: object) -> Path:
    table = replace(profiled.table, **changes)  # pyright: ignore
    table.save(tmp_path / profiled.path.name)
    return tmp_path


def test_resume_measures_what_is_missing(
    profiled: ProfileResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [row for row in profiled.table.rows if row.batch != 4]
    marked = [replace(row, median_us=row.p90_us, samples=99) for row in kept]
    resumed = run(copied(profiled, tmp_path, rows=tuple(marked)))
    parts = {row.key for row in profiled.table.rows if row.kind != "step"}
    assert parts <= {row.key for row in resumed.table.rows}
    assert {row.key for row in resumed.table.rows if row.samples == 99} == {r.key for r in kept}
    assert re.search(
        r"timings to come, \d+ s at least .*are measured already", capsys.readouterr().out
    )


def test_no_resume_measures_all(profiled: ProfileResult, tmp_path: Path) -> None:
    marked = [replace(row, samples=99) for row in profiled.table.rows]
    anew = run(copied(profiled, tmp_path, rows=tuple(marked)), resume=False)
    assert all(row.samples < 99 for row in anew.table.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "abacus"}, "device is 'cpu' here, 'abacus' in the table"),
        ({"fingerprint": "0"}, "fingerprint is"),
        ({"versions": {"jax": "0.1"}}, "jaxlib is"),
    ],
)
def test_a_table_of_something_else_is_refused(
    profiled: ProfileResult, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = copied(profiled, tmp_path, **changes)
    with pytest.raises(ProfileTableError, match=rf"{message}.*--no-resume"):
        run(folder)


def test_an_interrupted_run_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("recflow_jax.commands.profile.SAVE_EVERY_S", 0)
    monkeypatch.setattr(profiler.Profiler, "step_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    kinds = {row.kind for row in ProfileTable.load(tmp_path / "dot-cpu.json").rows}
    assert kinds == {"slice", "segment"}
