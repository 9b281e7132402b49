"""The profile table: measured times of slices, segments and steps on one device, for one model.

A table is a JSON file that says what it was measured on. A size that was not measured is never
guessed silently: the caller says what to do with a miss.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self, get_args

SCHEMA = 3
WITHOUT_LAUNCHES = 2  # the schema before: times are the device's, or the launch's if it took longer

Kind = Literal["slice", "segment", "step"]
MissPolicy = Literal["error", "next_bucket", "scale"]

SIZES = ("batch", "slice_samples", "slice_ids")
HAS = {
    "slice": ("slice_samples", "slice_ids"),
    "segment": ("segments", "segment", "batch"),
    "step": ("segments", "segment", "batch", "slice_samples", "slice_ids"),
}
NEAREST_NAMED = 3


class ProfileTableError(ValueError):
    """A profile table that cannot be used: the message says which, why, and what to do."""


class ProfileMiss(LookupError):
    """A time that the table lacks and the miss policy does not supply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What is timed: a slice, a segment, or a step of both, in static sizes.

    `segment` is one of the `segments` that a batch is cut into. `batch` and `slice_samples` are in
    samples, `slice_ids` in sparse ids; a slice has no segment and no batch, a segment no slice
    sizes. `config` names the settings of the scheme. Raises ValueError for a size that is missing
    or out of place.
    """

    kind: Kind
    segments: int | None = None
    segment: int | None = None
    batch: int | None = None
    slice_samples: int | None = None
    slice_ids: int | None = None
    scheme: str = "serial"
    config: str = ""

    def __post_init__(self) -> None:
        if self.kind not in HAS:
            raise ValueError(f"profile: kind is {self.kind!r}, not one of {', '.join(HAS)}")
        for name in ("segments", "segment", *SIZES):
            value, least = getattr(self, name), 0 if name == "segment" else 1
            if name not in HAS[self.kind]:
                if value is not None:
                    raise ValueError(f"profile: a {self.kind} has no {name}, but it is {value!r}")
            elif not isinstance(value, int) or value < least:
                raise ValueError(
                    f"profile: {name} of a {self.kind} is {value!r}, not a whole number >= {least}"
                )

    @property
    def series(self) -> tuple[str, int | None, int | None, str, str]:
        """What keys that differ in nothing but sizes have in common."""
        return (self.kind, self.segments, self.segment, self.scheme, self.config)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those of SIZES that its kind has."""
        return tuple(getattr(self, name) for name in SIZES if name in HAS[self.kind])

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(ProfileKey) if f.name != "kind")
        return f"{self.kind}({', '.join(f'{n}={v}' for n, v in values if v not in (None, ''))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow(ProfileKey):
    """A key with the median, 10th and 90th percentile of `samples` timings, in microseconds: of the
    device, with whatever else it takes between kernels. launch_us: of the host, for the launch.
    """

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    launch_us: float = 0.0

    def __post_init__(self) -> None:
        ProfileKey.__post_init__(self)
        if not 0 <= self.p10_us <= self.median_us <= self.p90_us < math.inf:
            times = f"{self.p10_us}, {self.median_us}, {self.p90_us}"
            raise ValueError(f"profile: p10, median, p90 of {self} do not ascend: {times}")
        if not 0 <= self.launch_us < math.inf:
            raise ValueError(f"profile: launch_us of {self} is {self.launch_us}, not 0 or more")
        if self.samples < 1:
            raise ValueError(f"profile: samples of {self} is {self.samples}, not at least 1")

    @property
    def key(self) -> ProfileKey:
        return ProfileKey(**{f.name: getattr(self, f.name) for f in fields(ProfileKey)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """Times of one model on one device, and what they hold for.

    `fingerprint` identifies the shapes of the model named `model`, `versions` the software,
    `created` is in ISO 8601. Raises ProfileTableError for another schema than this module's, and
    for two rows with one key.
    """

    schema: int = SCHEMA
    device: str
    backend: str
    versions: dict[str, str]
    model: str
    fingerprint: str
    created: str
    rows: tuple[ProfileRow, ...] = ()
    _by_key: dict[ProfileKey, ProfileRow] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        by_key: dict[ProfileKey, ProfileRow] = {}
        for row in self.rows:
            if by_key.setdefault(row.key, row) is not row:
                raise ProfileTableError(f"profile table: two rows for {row}")
        object.__setattr__(self, "_by_key", by_key)

    def has(self, key: ProfileKey) -> bool:
        """Whether exactly this was measured."""
        return key in self._by_key

    def row(self, key: ProfileKey) -> ProfileRow:
        """What was measured of exactly this; ProfileMiss if nothing was."""
        if row := self._by_key.get(key):
            return row
        raise ProfileMiss(f"{key} was not measured; {self._nearest(key)}")

    def between(self, key: ProfileKey) -> ProfileRow:
        """As `row`; for a slice or a segment of a size between two that were measured, what lies
        between their times, in proportion.
        """
        if self.has(key) or key.kind == "step":
            return self.row(key)
        alike = [row for row in self.rows if row.series == key.series]
        smaller = [row for row in alike if _covers(key, row)]
        larger = [row for row in alike if _covers(row, key)]
        if not smaller or not larger:
            return self.row(key)
        low, high = max(smaller, key=attrgetter("sizes")), min(larger, key=attrgetter("sizes"))
        share = max(
            (size - a) / (b - a)
            for a, size, b in zip(low.sizes, key.sizes, high.sizes, strict=True)
            if b > a
        )
        times = {
            name: getattr(low, name) + share * (getattr(high, name) - getattr(low, name))
            for name in ("median_us", "p10_us", "p90_us", "launch_us")
        }
        sizes = {name: getattr(key, name) for name in SIZES}
        return replace(low, **sizes, **times, samples=min(low.samples, high.samples))

    def with_rows(self, rows: Iterable[ProfileRow]) -> Self:
        """The table with these rows too; a row replaces the one that has the same key."""
        by_key = self._by_key | {row.key: row for row in rows}
        return replace(self, rows=tuple(by_key.values()))

    def time_us(self, key: ProfileKey, *, miss: MissPolicy = "error") -> float:
        """The median time of `key`; for one that was not measured, what `miss` says.

        `error` raises ProfileMiss. `next_bucket` takes the nearest row that is at least as large in
        every size. `scale` takes the nearest row that is at most as large in every size, times the
        largest of the ratios of their sizes: not below the truth where time grows at most linearly.
        Both raise ProfileMiss if there is no such row of the same kind, segment, scheme and config.
        """
        if miss not in get_args(MissPolicy):
            raise ValueError(f"miss is {miss!r}, not one of {', '.join(get_args(MissPolicy))}")
        if row := self._by_key.get(key):
            return row.median_us
        others = [row for row in self.rows if row.series == key.series]
        if miss == "next_bucket" and (larger := [row for row in others if _covers(row, key)]):
            return min(larger, key=lambda row: _growth(key, row)).median_us
        if miss == "scale" and (smaller := [row for row in others if _covers(key, row)]):
            nearest = min(smaller, key=lambda row: _growth(row, key))
            return nearest.median_us * _growth(nearest, key)
        raise ProfileMiss(f"{key} was not measured (miss policy {miss}); {self._nearest(key)}")

    def check(
        self, *, device: str, backend: str, fingerprint: str, versions: Mapping[str, str]
    ) -> None:
        """Raise ProfileTableError, naming all that differs, unless the table was made for this."""
        here = {"device": device, "backend": backend, "fingerprint": fingerprint, **versions}
        made = {name: getattr(self, name) for name in ("device", "backend", "fingerprint")}
        made |= self.versions
        differing = [
            f"{name} is {here.get(name)!r} here, {made.get(name)!r} in the table"
            for name in made | here
            if here.get(name) != made.get(name)
        ]
        if differing:
            of_this_model = self.fingerprint == fingerprint
            raise ProfileTableError(
                f"profile table of {self.model} was made for something else: "
                f"{'; '.join(differing)}. "
                f"Make a new one: {_remedy(self.model) if of_this_model else _remedy()}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, at once or not at all: a reader never meets half a file."""
        path = Path(path)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values["rows"] = [asdict(row) for row in self.rows]
        text = json.dumps(values, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; ProfileTableError, with the path, for any other file."""
        try:
            values: Any = _in_this_schema(json.loads(Path(path).read_text(encoding="utf-8")))
            _check_schema(values.get("schema") if isinstance(values, dict) else None)
            _check_fields(cls, values, "the table")
            values["rows"] = tuple(_row(index, row) for index, row in enumerate(values["rows"]))
            return cls(**values)
        except FileNotFoundError as error:
            raise ProfileTableError(f"{path}: no such file. Make it: {_remedy()}") from error
        except json.JSONDecodeError as error:
            raise ProfileTableError(f"{path}: not JSON: {error}. Make it: {_remedy()}") from error
        except (OSError, TypeError, ValueError) as error:
            raise ProfileTableError(f"{path}: {error}") from error

    def _nearest(self, key: ProfileKey) -> str:
        alike = [row for row in self.rows if row.kind == key.kind]
        alike.sort(key=lambda row: (row.series != key.series, _distance(row, key)))
        named = ", ".join(f"{row.key}" for row in alike[:NEAREST_NAMED])
        return f"nearest: {named}" if named else f"the table has no {key.kind} at all"


def _in_this_schema(values: Any) -> Any:
    """A table without launches knows none: all its time is the device's."""
    if not isinstance(values, dict) or values.get("schema") != WITHOUT_LAUNCHES:
        return values
    rows = [
        row | {"launch_us": 0.0} if isinstance(row, dict) else row for row in values.get("rows", ())
    ]
    return values | {"schema": SCHEMA} | ({"rows": rows} if "rows" in values else {})


def _row(index: int, values: Any) -> ProfileRow:
    if not isinstance(values, dict):
        raise ValueError(f"row {index} is {values!r}, not an object")
    _check_fields(ProfileRow, values, f"row {index}")
    return ProfileRow(**values)


def _check_fields(cls: Any, values: dict[str, Any], owner: str) -> None:
    """Exactly the fields of a dataclass, those with a default too: a table states everything."""
    expected = {f.name for f in fields(cls) if f.init}
    if missing := sorted(expected - values.keys()):
        raise ValueError(f"{owner} lacks {', '.join(missing)}")
    if unknown := sorted(values.keys() - expected):
        raise ValueError(f"{owner} has unknown {', '.join(unknown)}")


def _check_schema(schema: object) -> None:
    if schema != SCHEMA:
        raise ProfileTableError(
            f"profile table: schema is {schema!r}, this version reads {SCHEMA}. "
            f"Make a new one: {_remedy()}"
        )


def _remedy(model: str = "MODEL") -> str:
    return f"recflow profile --model {model}"


def _covers(large: ProfileKey, small: ProfileKey) -> bool:
    return all(a >= b for a, b in zip(large.sizes, small.sizes, strict=True))


def _growth(small: ProfileKey, large: ProfileKey) -> float:
    """The largest factor between any of their sizes."""
    return max(b / a for a, b in zip(small.sizes, large.sizes, strict=True))


def _distance(one: ProfileKey, other: ProfileKey) -> float:
    return max(_growth(one, other), _growth(other, one))
