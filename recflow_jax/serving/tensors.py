"""Tensors of the Open Inference Protocol: bytes or listed numbers in, checked arrays out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recflow_jax.batch import InputError

DTYPES = {"FP32": np.dtype("<f4"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")}
_LISTED_KINDS = {"f": "iuf", "i": "iu"}
_MAX_AXES = 3


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that a model takes or gives; -1 in `shape` is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class TensorHead:
    """What a request says about a tensor, apart from its elements. Raises InputError."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in DTYPES:
            raise InputError(
                f"input {self.name!r}: datatype {self.datatype!r} is not one of {', '.join(DTYPES)}"
            )
        if not 1 <= len(self.shape) <= _MAX_AXES or min(self.shape) < 0:
            raise InputError(f"input {self.name!r}: shape {list(self.shape)} is none of ours")

    @property
    def dtype(self) -> np.dtype:
        """Of the elements, little-endian."""
        return DTYPES[self.datatype]

    @property
    def elements(self) -> int:
        """How many the shape asks for."""
        return math.prod(self.shape)

    def of_bytes(self, data: bytes | memoryview) -> np.ndarray:
        """The elements as they are in memory; a view of `data`. Raises InputError."""
        expected = self.elements * self.dtype.itemsize
        if len(data) != expected:
            raise InputError(
                f"input {self.name!r}: {len(data)} bytes, {expected} for "
                f"{self.datatype}{list(self.shape)}"
            )
        return np.frombuffer(data, self.dtype).reshape(self.shape)

    def of_numbers(self, numbers: Sequence[Any]) -> np.ndarray:
        """The elements one by one, flat or nested. Raises InputError."""
        found = self._array(numbers)
        if found.size != self.elements:
            raise InputError(
                f"input {self.name!r}: {found.size} elements, {self.elements} for shape "
                f"{list(self.shape)}"
            )
        return found.reshape(self.shape)

    def _array(self, numbers: Sequence[Any]) -> np.ndarray:
        try:
            found = np.asarray(numbers)
        except (ValueError, OverflowError) as error:
            raise InputError(f"input {self.name!r}: no array of numbers: {error}") from error
        if found.size and found.dtype.kind not in _LISTED_KINDS[self.dtype.kind]:
            raise InputError(f"input {self.name!r}: data are not all {self.datatype}")
        with np.errstate(over="ignore"):  # to infinity, which the engine names as not finite
            array = found.astype(self.dtype)
        if self.dtype.kind == "i" and (wrapped := np.flatnonzero(array != found)).size:
            value = found.ravel()[wrapped[0]]
            raise InputError(f"input {self.name!r}: {value} is no {self.datatype}")
        return array


def require(
    tensors: Mapping[str, np.ndarray], name: str, *, kind: str, shape: tuple[int | None, ...]
) -> np.ndarray:
    """The tensor of that name. kind: "i" or "f"; None in `shape`: any length. Raises InputError."""
    array = tensors.get(name)
    if array is None:
        raise InputError(f"input {name!r} is missing")
    if array.dtype.kind != kind:
        wanted = [known for known, dtype in DTYPES.items() if dtype.kind == kind]
        raise InputError(f"input {name!r}: {array.dtype} is not {' or '.join(wanted)}")
    fits = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or any(n is not None and n != found for found, n in fits):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"input {name!r} has shape {list(array.shape)}, not [{wanted}]")
    return array
