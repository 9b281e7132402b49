"""`recflow profile`: what it measures, keeps, refuses and writes."""

import dataclasses
import re
from pathlib import Path

import pytest

import small_models as models
from recflow_jax.commands.profile import ProfileResult, profile
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.measure import profiler
from scheduling import ProfileTable, ProfileTableError, segment_key, slice_key, step_key

CONFIG = models.DOT
OPTIONS = models.SMALL


def run(out: Path, **options: object) -> ProfileResult:
    arguments = {"out": out, "quick": True, "options": OPTIONS, **options}
    return profile(CONFIG, params=models.params_of(CONFIG), **arguments)  # pyright: ignore


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    return run(tmp_path_factory.mktemp("profiles"))


def test_every_size_is_measured(profiled: ProfileResult) -> None:
    slices = OPTIONS.slice_buckets(CONFIG)
    segments = range(models.compiled(CONFIG).count)
    expected = {slice_key(bucket) for bucket in slices}
    for batch in OPTIONS.batch_buckets:
        expected |= {segment_key(index, batch) for index in segments}
        expected |= {step_key(index, batch, slices[-1]) for index in segments}
    assert {row.key for row in profiled.table.rows} == expected


def test_the_files_are_written(profiled: ProfileResult) -> None:
    assert profiled.path.name == "dot-cpu.json"
    assert ProfileTable.load(profiled.path) == profiled.table
    assert profiled.figure.read_bytes().startswith(b"\x89PNG")


def test_an_engine_takes_the_table(profiled: ProfileResult) -> None:
    params = models.params_of(CONFIG)
    with Engine(CONFIG, params, options=OPTIONS, profile=profiled.path) as engine:
        batch = generate(CONFIG, 3, seed=1)
        expected = models.reference_scores(CONFIG, params, batch)
        models.assert_same_scores(CONFIG, engine.predict(batch), expected)


def copied(profiled: ProfileResult, tmp_path: Path, **changes: object) -> Path:
    table = dataclasses.replace(profiled.table, **changes)  # pyright: ignore
    table.save(tmp_path / profiled.path.name)
    return tmp_path


def test_resume_measures_what_is_missing(
    profiled: ProfileResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [row for row in profiled.table.rows if row.batch != 4]
    marked = [dataclasses.replace(row, median_us=row.p90_us, samples=99) for row in kept]
    resumed = run(copied(profiled, tmp_path, rows=tuple(marked)))
    assert {row.key for row in resumed.table.rows} == {row.key for row in profiled.table.rows}
    assert {row.key for row in resumed.table.rows if row.samples == 99} == {r.key for r in kept}
    assert re.search(
        r"timings to come, about \d+ s .*were measured before", capsys.readouterr().out
    )


def test_no_resume_measures_all(profiled: ProfileResult, tmp_path: Path) -> None:
    marked = [dataclasses.replace(row, samples=99) for row in profiled.table.rows]
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


def test_other_segments_are_refused(profiled: ProfileResult, tmp_path: Path) -> None:
    folder = copied(profiled, tmp_path)
    with pytest.raises(ProfileTableError, match="batches of 3 segments, not 1; --no-resume"):
        run(folder, options=dataclasses.replace(OPTIONS, segments=1))


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
