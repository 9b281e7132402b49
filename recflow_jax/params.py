"""A model's parameters: drawn, saved to and loaded from safetensors with the config inside.

Tables are the bulk, so they are never whole in host memory beside the device: each group of
stacked tables is allocated once on the device and filled in place, chunk by chunk. Float tables are
quantised on the way where the config asks for it.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from pallas_kernels.tables import QuantisedTable, Table, quantise_rows, read_rows, update_rows
from recflow_jax.config import QUANTISED, BagConfig, ConfigError, DLRMConfig, TableConfig
from recflow_jax.layout import Group, Layout
from recflow_jax.model import Params, group_shape, param_shapes

FORMAT = "recflow-jax/1"
CHUNK_BYTES = 16 * 2**20

# The numpy side of safetensors has no float8: those values are stored as their bytes.
_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "float8_e4m3fn": "U8",
}


class ParamsError(ValueError):
    """Parameters that fit no model; the message names the file and the tensor."""


def init_params(config: DLRMConfig, *, seed: int = 0, table_bound: float | None = None) -> Params:
    """Random parameters on the default device; the same for the same config, seed and device.

    Table rows are uniform in +-table_bound, or +-1/sqrt(dim): large enough that a wrong row shows
    in the scores, however many rows the table has. Kernels are normal with variance
    2 / (inputs + outputs), biases with variance 1 / outputs, as in facebookresearch/dlrm.
    """
    shapes = param_shapes(config)
    rng = np.random.default_rng(seed)
    layers = jax.tree_util.tree_map_with_path(
        lambda path, shape: _draw_layer(rng, path[-1].name, shape.shape),
        dataclasses.replace(shapes, groups=()),
    )
    key = jax.random.key(seed, impl="rbg")
    groups = [
        _draw_group(jax.random.fold_in(key, index), group, table_bound or group.dim**-0.5)
        for index, group in enumerate(Layout.of(config).groups)
    ]
    return dataclasses.replace(layers, groups=tuple(groups))


def _draw_layer(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    deviation = shape[0] ** -0.5 if name == "bias" else (2 / sum(shape)) ** 0.5
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(deviation))


def _draw_group(key: Array, group: Group, bound: float) -> Table:
    table = _empty_group(group)
    for chunk in _chunks_of(group):
        chunk_key = jax.random.fold_in(key, chunk.start)
        table = _draw_chunk(table, chunk_key, chunk.start, bound, rows=len(chunk))
    return table


@functools.partial(jax.jit, static_argnames="rows", donate_argnums=0)
def _draw_chunk(table: Table, key: Array, start: Array, bound: Array, *, rows: int) -> Table:
    dim = jax.tree.leaves(table)[0].shape[1]
    chunk = jax.random.uniform(key, (rows, dim), jnp.float32, -1, 1) * bound
    return update_rows(table, as_rows_of(chunk, table), start)


def as_rows_of(rows: Table, table: Table) -> Table:
    """`rows` as rows of `table`: quantised if it is and they are not yet."""
    if isinstance(rows, QuantisedTable):
        return rows
    if isinstance(table, QuantisedTable):
        return quantise_rows(rows, table.values.dtype)
    return rows.astype(table.dtype)


def _empty_group(group: Group) -> Table:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), group_shape(group))


def _chunks_of(group: Group) -> Iterator[range]:
    return _chunks(group.rows, group.value_bytes + group.scale_bytes)


def _chunks(rows: int, row_bytes: int) -> Iterator[range]:
    """Row ranges that cover all rows. All have one length, so that what fills them is compiled
    once: the last one overlaps the one before it where the rows do not divide.
    """
    size = min(rows, max(1, CHUNK_BYTES // row_bytes))
    for start in range(0, rows, size):
        first = min(start, rows - size)
        yield range(first, first + size)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """What the file has to hold under one name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize


def _layer_leaves(params: Params) -> dict[str, Any]:
    """The leaves of all layers by name: "bottom.0.kernel", "cross.1.down", "top.2.bias"."""
    layers = dataclasses.replace(params, groups=())
    leaves, _ = jax.tree_util.tree_flatten_with_path(layers)
    return {f"{p[0].name}.{p[1].idx}.{p[2].name}": leaf for p, leaf in leaves}


def _tables_by_group(config: DLRMConfig) -> list[list[int]]:
    """Indices of the tables of each group, in the order of their rows."""
    layout = Layout.of(config)
    members: list[list[int]] = [[] for _ in layout.groups]
    for table, (group, _) in enumerate(layout.table_places):
        members[group].append(table)
    return members


def _tensors(config: DLRMConfig) -> dict[str, _Tensor]:
    """Every tensor of the model, in the order in which `save_params` writes them."""
    tensors = {
        name: _Tensor(shape=leaf.shape, dtype="float32")
        for name, leaf in _layer_leaves(param_shapes(config)).items()
    }
    for members in _tables_by_group(config):
        for table in (config.tables[i] for i in members):
            shape = (table.rows, table.dim)
            tensors[_values_name(table)] = _Tensor(shape=shape, dtype=table.dtype)
        for table in (config.tables[i] for i in members if config.tables[i].dtype in QUANTISED):
            tensors[_scales_name(table)] = _Tensor(shape=(table.rows,), dtype="float32")
    return tensors


def _values_name(table: TableConfig) -> str:
    return f"tables.{table.name}"


def _scales_name(table: TableConfig) -> str:
    return f"scales.{table.name}"


def save_params(path: str | Path, config: DLRMConfig, params: Params) -> None:
    """Writes a safetensors file: one tensor per table and per layer array, the config inside.

    A quantised table "t" is "tables.t" (I8, or U8: the bytes of float8) and "scales.t". The file
    appears whole or not at all. Raises ParamsError if `params` are not `config`'s.
    """
    path = Path(path)
    _check_params(config, params)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(_header(config))
            for leaf in _layer_leaves(params).values():
                file.write(np.asarray(leaf).tobytes())
            for array in jax.tree.leaves(params.groups):
                _write_rows(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_params(config: DLRMConfig, params: Params) -> None:
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), param_shapes(config))
    if jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) != expected:
        raise ParamsError(f"the parameters have not the shapes and dtypes of {config.name!r}")


def _header(config: DLRMConfig) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "config": config.to_toml()}}
    end = 0
    for name, tensor in _tensors(config).items():
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_rows(file: BinaryIO, array: Array) -> None:
    """The rows (or scales) of one group, which are its tables' one after the other."""
    written = 0
    for chunk in _chunks(len(array), array.nbytes // len(array)):
        rows = np.asarray(_read_chunk(array, chunk.start, len(chunk)))
        file.write(rows[written - chunk.start :].tobytes())
        written = chunk.stop


_read_chunk = jax.jit(read_rows, static_argnames="rows")


def load_params(path: str | Path, *, config: DLRMConfig | None = None) -> tuple[DLRMConfig, Params]:
    """The config and parameters of a file that `save_params` wrote, on the default device.

    With `config`, the file must hold the parameters of that model, and `config` is returned: it
    may have another name, compute dtype, bags and sides than the file's, and quantised tables where
    the file's are floats: these are rounded (see pallas_kernels.tables.quantise_rows), all tables
    of one dim or none. Raises ParamsError for a file that cannot be read, is not ours, lacks a
    tensor or holds one of a wrong shape or dtype.
    """
    path = Path(path)
    with _open(path) as file:
        stored = _stored_config(path, file.metadata() or {})
        config = config or stored
        _check_same_model(path, _quantised_like(stored, config), config)
        _check_tensors(path, file, _tensors(stored))
        return config, _read_params(file, stored, config)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise ParamsError(f"{path}: is no whole safetensors file: {error}") from error


def _stored_config(path: Path, metadata: Mapping[str, str]) -> DLRMConfig:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ParamsError(f"{path}: format is {found!r}, not {FORMAT!r}: not saved by save_params")
    try:
        return DLRMConfig.from_toml(metadata.get("config", ""), source=f"{path}: config")
    except ConfigError as error:
        raise ParamsError(str(error)) from error


def _quantised_like(stored: DLRMConfig, config: DLRMConfig) -> DLRMConfig:
    """`stored` with the quantised dtypes of `config`, where it has all of a group as floats."""
    if len(stored.tables) != len(config.tables):
        return stored
    tables = [*stored.tables]
    for group, members in zip(Layout.of(config).groups, _tables_by_group(config), strict=True):
        if group.quantised and not {tables[i].dtype for i in members} & {*QUANTISED}:
            for i in members:
                tables[i] = dataclasses.replace(tables[i], dtype=group.dtype)
    return dataclasses.replace(stored, tables=tuple(tables))


def _check_same_model(path: Path, stored: DLRMConfig, config: DLRMConfig) -> None:
    ours, theirs = _what_params_mean(config), _what_params_mean(stored)
    for field in dataclasses.fields(DLRMConfig):
        wanted, found = getattr(ours, field.name), getattr(theirs, field.name)
        if wanted != found:
            raise ParamsError(
                f"{path}: was saved for another model than {config.name!r}: "
                f"{field.name}: {_difference(found, wanted)}"
            )


def _what_params_mean(config: DLRMConfig) -> DLRMConfig:
    """`config` without what may change after training."""
    features = tuple(dataclasses.replace(f, bag=BagConfig(), side="item") for f in config.features)
    return dataclasses.replace(config, name="any", features=features).with_dtypes(compute="float32")


def _difference(found: Any, wanted: Any) -> str:
    """The first difference in one line, not two lists of a thousand tables."""
    if isinstance(found, tuple) and len(found) != len(wanted):
        return f"{len(found)} in the file, {len(wanted)} in the model"
    if isinstance(found, tuple):
        found, wanted = next((f, w) for f, w in zip(found, wanted, strict=True) if f != w)
    return f"{found} in the file, {wanted} in the model"


def _check_tensors(path: Path, file: Any, tensors: Mapping[str, _Tensor]) -> None:
    names = set(file.keys())
    for name in [*(n for n in tensors if n not in names), *sorted(names - set(tensors))]:
        there = "is missing" if name in tensors else "is not in the model"
        raise ParamsError(f"{path}: tensor {name!r} {there}")
    for name, tensor in tensors.items():
        stored = file.get_slice(name)
        found = f"{stored.get_dtype()}{list(stored.get_shape())}"
        wanted = f"{_SAFETENSORS_DTYPES[tensor.dtype]}{list(tensor.shape)}"
        if found != wanted:
            raise ParamsError(f"{path}: tensor {name!r} is {found}, not {wanted}")


def _read_params(file: Any, stored: DLRMConfig, config: DLRMConfig) -> Params:
    shapes = param_shapes(config)
    layers = jax.tree.map(jnp.asarray, {n: file.get_tensor(n) for n in _layer_leaves(shapes)})
    structure = jax.tree.structure(dataclasses.replace(shapes, groups=()))
    groups = [
        _read_group(file, group, [stored.tables[i] for i in members])
        for group, members in zip(Layout.of(config).groups, _tables_by_group(config), strict=True)
    ]
    params = jax.tree.unflatten(structure, [layers[name] for name in _layer_leaves(shapes)])
    return dataclasses.replace(params, groups=tuple(groups))


def _read_group(file: Any, group: Group, stored: list[TableConfig]) -> Table:
    table, source = _empty_group(group), _Source(file, group, stored)
    for chunk in _chunks_of(group):
        # One chunk in flight: without the wait, all of them would be queued in host memory.
        table = jax.block_until_ready(_fill_chunk(table, source.read(chunk), chunk.start))
    return table


class _Source:
    """The tables of one group as they are in a file: float ones, even if the group is quantised."""

    def __init__(self, file: Any, group: Group, stored: list[TableConfig]) -> None:
        quantised = stored[0].dtype in QUANTISED
        floats = "float32" if group.quantised else group.dtype
        self._dtype = jnp.dtype(group.dtype if quantised else floats)
        self._values = [file.get_slice(_values_name(table)) for table in stored]
        self._scales = [file.get_slice(_scales_name(table)) for table in stored if quantised]
        self._bases = np.cumsum([0, *(table.rows for table in stored)])

    def read(self, chunk: range) -> Any:
        """Rows in host memory, those of floats to be quantised in float32."""
        values = _read_rows(self._values, self._bases, chunk, self._dtype)
        if not self._scales:
            return values
        scales = _read_rows(self._scales, self._bases, chunk, np.dtype(np.float32))
        return QuantisedTable(values=values, scales=scales)


def _read_rows(slices: list[Any], bases: np.ndarray, chunk: range, dtype: np.dtype) -> np.ndarray:
    rows = np.empty((len(chunk), *slices[0].get_shape()[1:]), dtype)
    first = int(np.searchsorted(bases, chunk.start, side="right")) - 1
    for i in range(first, len(slices)):
        start, stop = max(chunk.start, bases[i]), min(chunk.stop, bases[i + 1])
        if start >= stop:
            break
        piece = slices[i][int(start - bases[i]) : int(stop - bases[i])]
        is_bytes = piece.dtype == np.uint8  # of float8
        rows[start - chunk.start : stop - chunk.start] = piece.view(dtype) if is_bytes else piece
    return rows


@functools.partial(jax.jit, donate_argnums=0)
def _fill_chunk(table: Table, rows: Table, start: Array) -> Table:
    return update_rows(table, as_rows_of(rows, table), start)
