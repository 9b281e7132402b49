"""Compiling ahead: all of it, shown where someone looks, and kept for the next process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from recflow_jax.engine import compilation
from recflow_jax.engine.compilation import Job, compile_jobs, default_cache

ROOT = Path(__file__).parents[1]

CHILD = """
import json, sys, warnings
warnings.simplefilter("error")
import jax
from recflow_jax.engine.compilation import Job, compile_jobs, use_cache

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
use_cache(sys.argv[1] if sys.argv[1] != "None" else None)
def slow(x):
    for i in range(30):
        x = jax.numpy.sort(x * i)
    return x
jobs = [Job("slow", jax.jit(slow), (jax.ShapeDtypeStruct((300,), "float32"),))]
compile_jobs(jobs)
told = jax.config.jax_compilation_cache_dir
print(json.dumps([told, sum(e.endswith("cache_hits") for e in hits)]))
"""


def jobs(n: int) -> list[Job]:
    shape = jax.ShapeDtypeStruct((n,), np.float32)
    return [Job(i, jax.jit(lambda x, i=i: x + i), (shape,)) for i in range(n)]


def compile_in_a_process(folder: Path | str | None, **environment: str) -> tuple[str | None, int]:
    """The cache folder that JAX was told of, and how many executables came from it."""
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def test_executables_are_found_by_their_keys():
    executables = compile_jobs(jobs(3))
    assert {key: run(np.zeros(3, np.float32))[0] for key, run in executables.items()} == {
        0: 0,
        1: 1,
        2: 2,
    }


def test_executables_never_compile_again():
    run = compile_jobs(jobs(1))[0]
    with pytest.raises(TypeError):
        run(np.zeros(2, np.float32))


def test_no_bar_where_nobody_looks(capfd: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(compilation, "QUIET_S", 0)
    compile_jobs(jobs(3))
    compile_jobs(jobs(3), progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_when_asked_for(capfd: pytest.CaptureFixture[str]):
    compile_jobs(jobs(3), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "compiling" in err and "3/3" in err


@pytest.mark.parametrize(("quiet_s", "is_shown"), [(0, True), (60, False)])
def test_a_bar_on_a_terminal_only_if_it_takes_long(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet_s: float,
    is_shown: bool,
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setattr(compilation, "QUIET_S", quiet_s)
    compile_jobs(jobs(3))
    assert ("compiling" in capfd.readouterr().err) == is_shown


def test_the_second_process_finds_what_the_first_compiled(tmp_path: Path):
    folder = tmp_path / "new" / "cache"
    assert compile_in_a_process(folder) == (str(folder), 0)
    assert compile_in_a_process(folder) == (str(folder), 1)


def test_a_folder_that_jax_was_told_before_stays(tmp_path: Path):
    before = str(tmp_path / "before")
    told = compile_in_a_process(tmp_path / "mine", JAX_COMPILATION_CACHE_DIR=before)
    assert told == (before, 0)
    assert not (tmp_path / "mine").exists()


def test_auto_is_the_users_folder_and_none_is_none(tmp_path: Path):
    folder = str(tmp_path / "recflow-jax" / "xla")
    assert compile_in_a_process("auto", XDG_CACHE_HOME=str(tmp_path))[0] == folder
    assert compile_in_a_process(None)[0] is None


def test_default_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == Path.home() / ".cache" / "recflow-jax" / "xla"


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.warns(UserWarning, match="no compilation cache"):
            compilation.use_cache(tmp_path / "file" / "cache")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
