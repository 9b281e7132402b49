"""Versions by number, and no way to any other file."""

from pathlib import Path

import pytest

from recflow_jax.engine.engine import Engine
from recflow_jax.serving.failures import NoSuchModel
from recflow_jax.serving.repository import Repository


def load(path: Path) -> Engine:
    raise AssertionError("nothing is loaded here")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    for name in ("9", "10", "b", "-1", "٣", ""):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "11.toml").touch()
    (tmp_path / "folder").mkdir()
    return Repository(folder=tmp_path / "folder" / "..", load=load)


def test_versions_ascend_by_number(repository: Repository) -> None:
    assert [*repository.versions] == ["9", "10"]
    assert repository.find("")[0] == "10"
    assert repository.find("9")[1].name == "9.safetensors"


@pytest.mark.parametrize("version", ["8", "b", "../9", "/etc/passwd", "09", "11.toml", "folder"])
def test_what_is_no_version_is_not_found(repository: Repository, version: str) -> None:
    with pytest.raises(NoSuchModel, match=r"is in the repository \(there are 9, 10\)"):
        repository.find(version)


def test_a_version_that_is_written_later_is_found(repository: Repository) -> None:
    (repository.folder / "12.safetensors").touch()
    assert repository.find("")[0] == "12"
    with pytest.raises(NoSuchModel, match="there are none"):
        Repository(folder=repository.folder / "folder", load=load).find("")
