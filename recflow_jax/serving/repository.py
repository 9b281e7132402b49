"""The versions of a model that clients may have loaded: files of parameters in one folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recflow_jax.serving.failures import NoSuchModel
from recflow_jax.serving.served import Served

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`folder`/<number>.safetensors is the version of that number; `load` makes its engine.

    Clients name versions, never paths: they reach no other file.
    """

    folder: Path
    load: Callable[[Path], Served]

    @property
    def versions(self) -> dict[str, Path]:
        """Those that are there now, ascending."""
        names = {p.name.removesuffix(SUFFIX): p for p in self.folder.glob(f"*{SUFFIX}")}
        return {name: names[name] for name in sorted(filter(_is_number, names), key=int)}

    def find(self, version: str) -> tuple[str, Path]:
        """A version ("": the latest) and its file. Raises NoSuchModel."""
        there = self.versions
        if not version and there:
            version = [*there][-1]
        if version not in there:
            known = ", ".join(there) or "none"
            raise NoSuchModel(f"no version {version!r} is in the repository (there are {known})")
        return version, there[version]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
