"""What a DLRM is: its tables, sparse features, MLPs and interaction, as one frozen value.

A config comes from Python, from a TOML file, or from one of the shipped models
(`DLRMConfig.shipped("dlrm-v2")`), and is written back by `to_toml`.
"""

import dataclasses
import hashlib
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w

DType = Literal["float32", "bfloat16", "float16"]
QuantisedDType = Literal["int8", "float8_e4m3fn"]
TableDType = Literal[DType, QuantisedDType]
ComputeDType = Literal[DType, Literal["float8_e4m3fn"]]
Pooling = Literal["sum", "mean", "none"]
Side = Literal["user", "item"]
Activation = Literal["relu", "sigmoid", "gelu", "identity"]
Interaction = Literal["dot", "dcn", "concat"]
BagKind = Literal["fixed", "normal", "one_sided_normal", "gamma_poisson"]

ITEM_BYTES: dict[TableDType, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
}
QUANTISED: tuple[QuantisedDType, ...] = get_args(QuantisedDType)
SCALE_BYTES = 4  # of each row of a quantised table

MAX_DIM = 256
DIM_STEP = 4


class ConfigError(ValueError):
    """A config that describes no model; the message names the field and the value."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_choice(owner: str, field: str, value: object, choices: Any) -> None:
    allowed = get_args(choices)
    _require(value in allowed, f"{owner}: {field} is {value!r}, not one of {', '.join(allowed)}")


def _require_whole(owner: str, field: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(
        whole and value >= least,
        f"{owner}: {field} is {value!r}, not a whole number of at least {least}",
    )


def _require_positive(owner: str, field: str, value: object) -> None:
    _require_whole(owner, field, value, 1)


def _require_name(kind: str, name: object) -> None:
    _require(isinstance(name, str) and name != "", f"{kind}: name is {name!r}, not a text")


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One embedding table: `rows` vectors of `dim` elements of `dtype`. Rows of a quantised one
    (int8, float8_e4m3fn) have a float32 scale each.
    """

    name: str
    rows: int
    dim: int
    dtype: TableDType = "float32"

    def __post_init__(self) -> None:
        _require_name("table", self.name)
        owner = f"table {self.name!r}"
        _require_positive(owner, "rows", self.rows)
        _require_positive(owner, "dim", self.dim)
        _require(self.rows < 2**31, f"{owner}: rows is {self.rows}, more than 2^31 - 1")
        _require(
            self.dim % DIM_STEP == 0 and self.dim <= MAX_DIM,
            f"{owner}: dim is {self.dim}, not a multiple of {DIM_STEP} up to {MAX_DIM}",
        )
        _require_choice(owner, "dtype", self.dtype, TableDType)


@dataclass(frozen=True, kw_only=True)
class BagConfig:
    """How long a feature's bags are expected to be: what the generators draw.

    `fixed`: always `mean` ids. `normal`: normal(mean, sd) truncated to [0, max].
    `one_sided_normal`: the same, truncated to [0, inf). `gamma_poisson`: Poisson whose rate is
    gamma(shape 1) around `mean`, cut at `max`. A bag is empty with chance 1 - `coverage`.
    """

    kind: BagKind = "fixed"
    mean: float = 1
    sd: float = 0
    max: int = 0
    coverage: float = 1

    def __post_init__(self) -> None:
        owner = "bag"
        _require_choice(owner, "kind", self.kind, BagKind)
        for field in ("mean", "sd"):
            value = getattr(self, field)
            _require(0 <= value < math.inf, f"{owner}: {field} is {value}, not 0 or more")
        _require(0 <= self.coverage <= 1, f"{owner}: coverage is {self.coverage}, not in [0, 1]")
        bounded = self.kind in ("normal", "gamma_poisson")
        _require(not bounded or self.max > 0, f"{owner}: {self.kind} needs max > 0")
        _require_whole(owner, "max", self.max, 0)
        drawn = self.kind in ("normal", "one_sided_normal")
        _require(not drawn or self.sd > 0, f"{owner}: {self.kind} needs sd > 0")
        whole = self.kind != "fixed" or self.mean == int(self.mean)
        _require(whole, f"{owner}: mean is {self.mean}, not whole as a fixed bag's has to be")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One sparse feature: which table its ids name and how a bag becomes a vector.

    `pooling="none"` lays the bag's rows side by side: `hotness` of them, missing ones zero, so
    that the output is [hotness * dim] and a longer bag is an error.
    """

    name: str
    table: str
    pooling: Pooling = "sum"
    weighted: bool = False
    side: Side = "item"
    hotness: int = 1
    bag: BagConfig = BagConfig()

    def __post_init__(self) -> None:
        _require_name("feature", self.name)
        owner = f"feature {self.name!r}"
        _require(isinstance(self.weighted, bool), f"{owner}: weighted is {self.weighted!r}")
        _require_choice(owner, "pooling", self.pooling, Pooling)
        _require_choice(owner, "side", self.side, Side)
        _require_positive(owner, "hotness", self.hotness)
        _require(
            self.hotness == 1 or self.pooling == "none",
            f"{owner}: hotness is {self.hotness}, which only pooling 'none' uses",
        )

    @property
    def vectors(self) -> int:
        """How many vectors of the table's dim the feature adds to a sample's pooled row."""
        return self.hotness

    @property
    def longest_bag(self) -> int | None:
        """The most ids that a bag may have, or None for any number."""
        return self.hotness if self.pooling == "none" else None


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """A whole model. Layer widths are outputs; each MLP's input follows from what feeds it.

    dense [n, dense_width] -> bottom MLP; bags -> pooled rows [n, pooled_width];
    interaction: `concat` of both; `dot`: pairwise dots of all vectors, beside the bottom output;
    `dcn`: `cross_layers` low-rank cross layers (DCN v2, arXiv 2008.13535) over the concatenation.
    The top MLP's last width is the number of scores per sample, without activation (logits).
    compute_dtype float8_e4m3fn: matmuls of float8 operands (pallas_kernels.float8), but for the
    last layer and those whose inputs are bfloat16, the first one of the bottom MLP and the first
    one behind the pooled rows: a pass that rounds these costs what float8 saves.
    `input_scales` are those of the float8 matmuls' inputs, in the order in which they run, as
    `recflow_jax.calibrate` finds them.
    """

    name: str
    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    dense_width: int = 0
    bottom_mlp: tuple[int, ...] = ()
    interaction: Interaction = "concat"
    cross_layers: int = 0
    cross_rank: int = 0
    top_mlp: tuple[int, ...] = (1,)
    activation: Activation = "relu"
    compute_dtype: ComputeDType = "float32"
    input_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_names()
        self._check_widths()
        self._check_interaction()

    def _check_choices(self) -> None:
        _require_name("model", self.name)
        owner = f"model {self.name!r}"
        _require_choice(owner, "interaction", self.interaction, Interaction)
        _require_choice(owner, "activation", self.activation, Activation)
        _require_choice(owner, "compute_dtype", self.compute_dtype, ComputeDType)
        self._check_input_scales()
        _require_whole(owner, "dense_width", self.dense_width, 0)
        _require(
            bool(self.features) or self.dense_width > 0,
            f"{owner}: has neither sparse features nor dense ones",
        )
        _require(len(self.top_mlp) > 0, f"{owner}: top_mlp is empty")
        for field in ("bottom_mlp", "top_mlp"):
            for width in getattr(self, field):
                _require_positive(owner, field, width)

    def _check_input_scales(self) -> None:
        owner, count = f"model {self.name!r}", len(self.input_scales)
        for scale in self.input_scales:
            positive = isinstance(scale, float) and 0 < scale < math.inf
            _require(positive, f"{owner}: an input scale is {scale!r}, not a number above 0")
        _require(
            count in (0, self.float8_matmuls),
            f"{owner}: {count} input scales for {self.float8_matmuls} float8 matmuls",
        )

    def _check_names(self) -> None:
        for kind, items in (("table", self.tables), ("feature", self.features)):
            for name, times in Counter(item.name for item in items).items():
                _require(times == 1, f"model {self.name!r}: {times} {kind}s are named {name!r}")
        known = {table.name for table in self.tables}
        for feature in self.features:
            _require(
                feature.table in known,
                f"feature {feature.name!r}: table {feature.table!r} is not in the model",
            )

    def _check_widths(self) -> None:
        owner = f"model {self.name!r}"
        _require(
            not self.bottom_mlp or self.dense_width > 0,
            f"{owner}: bottom_mlp {self.bottom_mlp} without dense features",
        )

    def _check_interaction(self) -> None:
        owner = f"model {self.name!r}"
        if self.interaction == "dot":
            dims = {self.table_of(feature).dim for feature in self.features}
            if self.dense_width:
                dims.add(self.bottom_width)
            _require(
                len(dims) == 1,
                f"{owner}: dot interaction needs one dim for all vectors, found {sorted(dims)}",
            )
        if self.interaction == "dcn":
            _require_positive(owner, "cross_layers", self.cross_layers)
            _require_positive(owner, "cross_rank", self.cross_rank)
        else:
            unused = self.cross_layers == 0 and self.cross_rank == 0
            _require(unused, f"{owner}: cross layers belong to interaction 'dcn' alone")

    @property
    def float8_matmuls(self) -> int:
        """How many matmuls have float8 operands; none with another compute dtype."""
        if self.compute_dtype != "float8_e4m3fn":
            return 0
        return self.matmuls - len(self.wide_matmuls)

    @property
    def matmuls(self) -> int:
        """How many there are."""
        return len(self.bottom_mlp) + 2 * self.cross_layers + len(self.top_mlp)

    @property
    def wide_matmuls(self) -> frozenset[int]:
        """Those that float8 models compute in bfloat16, by their places in the order in which they
        run.
        """
        return frozenset({0, len(self.bottom_mlp), self.matmuls - 1})

    @property
    def matmul_scales(self) -> tuple[float | None, ...]:
        """The input scale of each matmul; None where it has no float8 operands, or no scale yet."""
        scales = iter(self.input_scales)
        return tuple(
            None if place in self.wide_matmuls else next(scales, None)
            for place in range(self.matmuls)
        )

    @property
    def carried_dtype(self) -> DType:
        """The dtype of what layers hand on to each other."""
        return "bfloat16" if self.compute_dtype == "float8_e4m3fn" else self.compute_dtype

    @cached_property
    def _tables_by_name(self) -> dict[str, TableConfig]:
        return {table.name: table for table in self.tables}

    def table_of(self, feature: FeatureConfig) -> TableConfig:
        """The table that `feature` looks its ids up in."""
        return self._tables_by_name[feature.table]

    @cached_property
    def feature_rows(self) -> tuple[int, ...]:
        """Rows of each feature's table: ids of feature f are in [0, feature_rows[f])."""
        return tuple(self.table_of(feature).rows for feature in self.features)

    @cached_property
    def fixed_bags(self) -> tuple[int, ...] | None:
        """How long each feature's bags are expected to be, or None where any may vary."""
        bags = [feature.bag for feature in self.features]
        if any(bag.kind != "fixed" or bag.coverage < 1 for bag in bags):
            return None
        return tuple(min(int(f.bag.mean), f.longest_bag or int(f.bag.mean)) for f in self.features)

    @cached_property
    def weighted(self) -> bool:
        """Whether any feature takes a weight per id."""
        return any(feature.weighted for feature in self.features)

    @cached_property
    def pooled_width(self) -> int:
        """Columns of the concatenated pooled rows."""
        return sum(f.vectors * self.table_of(f).dim for f in self.features)

    @property
    def bottom_width(self) -> int:
        """Columns that leave the bottom MLP (the dense features themselves without one)."""
        return self.bottom_mlp[-1] if self.bottom_mlp else self.dense_width

    @property
    def dot_vectors(self) -> int:
        """Vectors that meet in the dot interaction."""
        return sum(f.vectors for f in self.features) + (1 if self.dense_width else 0)

    @property
    def interaction_width(self) -> int:
        """Columns that enter the top MLP."""
        if self.interaction == "dot":
            pairs = self.dot_vectors * (self.dot_vectors - 1) // 2
            return self.bottom_width + pairs
        return self.bottom_width + self.pooled_width

    @property
    def outputs(self) -> int:
        """Scores per sample."""
        return self.top_mlp[-1]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ where anything that costs time or changes answers does."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:16]

    def with_max_rows(self, max_rows: int) -> Self:
        """The same model with every table cut to at most `max_rows` rows."""
        _require_positive(f"model {self.name!r}", "max_rows", max_rows)
        tables = tuple(dataclasses.replace(t, rows=min(t.rows, max_rows)) for t in self.tables)
        return dataclasses.replace(self, tables=tables)

    def with_dtypes(
        self, *, tables: TableDType | None = None, compute: ComputeDType | None = None
    ) -> Self:
        """The same model with other table and compute dtypes; None leaves one as it is. Another
        compute dtype leaves no input scales. Raises ConfigError for a dtype that is none of theirs.
        """
        changed = tuple(dataclasses.replace(t, dtype=tables or t.dtype) for t in self.tables)
        compute = compute or self.compute_dtype
        scales = self.input_scales if compute == self.compute_dtype else ()
        return dataclasses.replace(self, tables=changed, compute_dtype=compute, input_scales=scales)

    def with_input_scales(self, scales: Sequence[float]) -> Self:
        """The same model with these scales of its float8 matmuls' inputs. Raises ConfigError."""
        return dataclasses.replace(self, input_scales=tuple(scales))

    def to_toml(self) -> str:
        """The config as TOML that `from_toml` reads back to an equal one."""
        return tomli_w.dumps(_without_defaults(self))

    @classmethod
    def from_toml(cls, text: str, *, source: str = "config") -> Self:
        """Reads TOML; `source` names the file in errors. Raises ConfigError.

        An entry of `tables` with a `count`, or whose `rows` or `dim` is a list, stands for one
        table per element, named name_0, name_1, ...; an entry of `features` that names such a
        group stands for one feature per table of it.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: not TOML: {error}") from error
        tables, groups = _read_tables(source, _pop_entries(source, data, "tables"))
        features = _read_features(source, _pop_entries(source, data, "features"), groups)
        for field in ("bottom_mlp", "top_mlp", "input_scales"):
            if field in data:
                values = data[field]
                _require(isinstance(values, list), f"{source}: {field} is {values!r}, not a list")
                data[field] = tuple(values)
        return _build(cls, source, {**data, "tables": tables, "features": features})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a TOML file. Raises ConfigError if it is missing or describes no model."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        return cls.from_toml(text, source=str(path))

    @classmethod
    def shipped(cls, name: str) -> Self:
        """One of the models that come with the package, see `shipped_models()`."""
        if name not in shipped_models():
            known = ", ".join(shipped_models())
            raise ConfigError(
                f"no model {name!r} is shipped (there are {known}), and a file is .toml"
            )
        file = resources.files("recflow_jax") / "models" / f"{name}.toml"
        return cls.from_toml(file.read_text(), source=f"{name}.toml")


def dense_shapes(config: DLRMConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inputs, outputs) of each bottom and each top MLP layer."""
    bottom = [config.dense_width, *config.bottom_mlp]
    top = [config.interaction_width, *config.top_mlp]
    return list(zip(bottom, bottom[1:], strict=False)), list(zip(top, top[1:], strict=False))


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    files = (resources.files("recflow_jax") / "models").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def _build(kind: type[Any], source: str, data: Mapping[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - fields)
    _require(not unknown, f"{source}: {kind.__name__} has no field {', '.join(unknown)}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ConfigError(f"{source}: {kind.__name__}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _pop_entries(source: str, data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    entries = data.pop(field, [])
    listed = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    _require(listed, f"{source}: {field} is not a list of tables with names")
    return entries


def _read_tables(
    source: str, entries: Sequence[dict[str, Any]]
) -> tuple[tuple[TableConfig, ...], dict[str, list[str]]]:
    tables: list[TableConfig] = []
    groups: dict[str, list[str]] = {}
    for entry in entries:
        expanded = _expand_table(source, entry)
        groups[str(entry.get("name", ""))] = [item["name"] for item in expanded]
        tables += [_build(TableConfig, source, item) for item in expanded]
    return tuple(tables), groups


def _expand_table(source: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    lists = {key: entry[key] for key in ("rows", "dim") if isinstance(entry.get(key), list)}
    if not lists and "count" not in entry:
        return [{"name": "", **entry}]
    name = entry.get("name", "")
    _require_name(f"{source}: table group", name)
    shared = {key: value for key, value in entry.items() if key != "count"}
    counts = {len(values) for values in lists.values()}
    if "count" in entry:
        _require_positive(f"{source}: table group {name!r}", "count", entry["count"])
        counts.add(entry["count"])
    _require(len(counts) == 1, f"{source}: table group {name!r}: of {sorted(counts)} tables")
    return [
        {**shared, "name": f"{name}_{i}", **{key: values[i] for key, values in lists.items()}}
        for i in range(counts.pop())
    ]


def _read_features(
    source: str, entries: Sequence[dict[str, Any]], groups: Mapping[str, list[str]]
) -> tuple[FeatureConfig, ...]:
    features: list[FeatureConfig] = []
    for entry in entries:
        name = entry.get("name", "")
        owner = f"{source}: feature {name!r}"
        _require(isinstance(entry.get("bag", {}), dict), f"{owner}: bag is not a table")
        bag = _build(BagConfig, owner, entry.get("bag", {}))
        table = entry.get("table", "")
        members = groups.get(str(table), [table])
        names = [name] if members == [table] else [f"{name}_{i}" for i in range(len(members))]
        features += [
            _build(FeatureConfig, source, {**entry, "name": own, "table": member, "bag": bag})
            for own, member in zip(names, members, strict=True)
        ]
    return tuple(features)


def _without_defaults(config: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, nested configs as tables; tuples become lists."""
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            value = _without_defaults(value)
        elif isinstance(value, tuple):
            value = [_without_defaults(v) if dataclasses.is_dataclass(v) else v for v in value]
        kept[field.name] = value
    return kept
