"""Who is compared: the engine's whole forward pass, plain JAX in two forms, torch in eager mode.

All take the same samples and the same parameters, in the same dtypes. A contender's inputs lie on
the device and everything of it is compiled, so that launches are all there is to time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from recflow_jax import model
from recflow_jax.backend import Backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import QUANTISED, DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure.baselines import (
    PlainBatch,
    PlainModel,
    padded,
    per_table,
    stacked_variants,
    with_segments,
)
from recflow_jax.measure.timing import Timed, TimingOptions, measure_side_by_side
from recflow_jax.measure.torch_baseline import TorchModel, torch_is_installed
from recflow_jax.model import DeviceBatch, Params, to_device

Rival = Literal["jax", "jax-per-table", "torch"]
RIVALS: tuple[Rival, ...] = get_args(Rival)
RECFLOW = "recflow"
MOST_TABLES_APART = 128
COMPILE_THREADS = 4

Sets = Mapping[int, Sequence[JaggedBatch]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One contender at one batch size: `timed.launch(i)` runs input set i modulo their number,
    `scores` brings what it gave to the host. `dispatch`: jitted calls with the same arguments that
    compute nothing, for recflow.
    """

    name: str
    timed: Timed
    scores: Callable[[Any], Float[np.ndarray, "samples outputs"]]
    compile_s: float
    note: str
    dispatch: Timed | None = None

    def answer(self, index: int) -> Float[np.ndarray, "samples outputs"]:
        """The scores of one input set."""
        return self.scores(self.timed.launch(index))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A JAX function of parameters and an input, with its input sets, to be compiled."""

    name: str
    note: str
    function: Callable[..., Any]
    params: tuple[Any, ...]
    inputs: Sequence[Any]
    compiler_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> "Job":
        """What is to be compiled."""
        return Job(self.function, (*self.params, self.inputs[0]), self.compiler_options)


class Job(NamedTuple):
    """A function, example arguments and XLA's options for it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    compiler_options: Mapping[str, Any] = MappingProxyType({})


class Lineup:
    """Recflow and its rivals for one model; `skipped` says who cannot take part, and why.

    Parameters are prepared once for all batch sizes. Raises ValueError for an unknown rival.
    """

    def __init__(
        self, config: DLRMConfig, params: Params, backend: Backend, against: Sequence[str]
    ) -> None:
        for rival in against:
            if rival not in RIVALS:
                raise ValueError(f"rival {rival!r} is not one of {', '.join(RIVALS)}")
        reasons = {rival: _why_not(rival, config, params) for rival in against}
        self.skipped = {rival: reason for rival, reason in reasons.items() if reason}
        self.rivals = tuple(rival for rival, reason in reasons.items() if not reason)
        self.config = config
        self.backend = backend
        self._layout = Layout.of(config)
        self._params = backend.prepare(params, config)
        self._variants = [*stacked_variants(config)] if "jax" in self.rivals else []
        self._plain_params = self._variants[0].prepare(params) if self._variants else None
        self._apart = per_table(config) if "jax-per-table" in self.rivals else None
        self._apart_params = self._apart.prepare(params) if self._apart else None
        self._torch = TorchModel(config, params) if "torch" in self.rivals else None

    def enter(self, sets: Sets) -> dict[int, dict[str, Contender]]:
        """The contenders by batch size and name, recflow first, all compiled."""
        poolers = self.fastest_poolers(sets) if self._variants else {}
        entries = {
            (samples, entry.name): entry
            for samples, batches in sets.items()
            for entry in self._entries(batches, poolers.get(samples))
        }
        executables = compile_all({key: entry.job for key, entry in entries.items()})
        contenders: dict[int, dict[str, Contender]] = {samples: {} for samples in sets}
        for (samples, name), entry in entries.items():
            contenders[samples][name] = _jax_contender(entry, *executables[samples, name])
        if self._torch:
            for samples, batches in sets.items():
                contenders[samples]["torch"] = _torch_contender(self._torch, batches)
        return contenders

    def _entries(self, sets: Sequence[JaggedBatch], pooler: PlainModel | None) -> list[Entry]:
        entries = [self._recflow(sets)]
        if pooler:
            entries.append(_plain_entry("jax", pooler, self.plain_params, sets))
        if self._apart:
            entries.append(_plain_entry("jax-per-table", self._apart, self._apart_params, sets))
        return entries

    def _recflow(self, sets: Sequence[JaggedBatch]) -> Entry:
        forward = partial(
            model.forward,
            config=self.config,
            layout=self._layout,
            ops=self.backend.ops,
            precision=precision_of(self.config),
        )

        def with_layers(layers: Params, groups: Any, batch: DeviceBatch) -> Any:
            return forward(replace(layers, groups=groups), batch)

        function, layers = self.backend.bind(with_layers, replace(self._params, groups=()))
        return Entry(
            name=RECFLOW,
            note=self.backend.name,
            function=function,
            params=(*layers, self._params.groups),
            inputs=device_batches(self._layout, sets),
            compiler_options=self.backend.compiler_options,
        )

    @property
    def plain_params(self) -> Params:
        """The parameters for what `fastest_poolers` gives. Raises ValueError without rival jax."""
        if self._plain_params is None:
            raise ValueError("plain JAX is not among the rivals")
        return self._plain_params

    def fastest_poolers(self, sets: Sets) -> dict[int, PlainModel]:
        """For each batch size the way of writing the stacked gather that this device runs best."""
        tables = self.plain_params.groups
        if len(self._variants) == 1:
            return dict.fromkeys(sets, self._variants[0])
        inputs = {n: plain_batches(self._variants[0], batches) for n, batches in sets.items()}
        executables = compile_all(
            {
                (samples, variant.pooler): Job(variant.pool, (tables, inputs[samples][0]))
                for samples in sets
                for variant in self._variants
            }
        )
        return {n: self._fastest(n, tables, inputs[n], executables) for n in sets}

    def _fastest(
        self,
        samples: int,
        tables: tuple[Any, ...],
        inputs: Sequence[PlainBatch],
        executables: Mapping[Any, tuple[Callable[..., Any], float]],
    ) -> PlainModel:
        timed = {
            variant.pooler: launches(executables[samples, variant.pooler][0], (tables,), inputs)
            for variant in self._variants
        }
        options = TimingOptions(rounds=3, round_s=0.005, limit_s=2)
        timings = measure_side_by_side(timed, options)
        return min(self._variants, key=lambda variant: timings[variant.pooler].median_us)


def precision_of(config: DLRMConfig) -> lax.Precision | None:
    """Full float32 products for float32 models."""
    return lax.Precision.HIGHEST if config.compute_dtype == "float32" else None


def free_bytes() -> int | None:
    """Device memory that is left; None where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def _why_not(rival: str, config: DLRMConfig, params: Params) -> str | None:
    quantised = sorted({table.dtype for table in config.tables} & {*QUANTISED})
    if rival == "torch" and quantised:
        return f"its EmbeddingBag takes no {' or '.join(quantised)} tables with a scale per row"
    if rival == "torch" and config.float8_matmuls:
        return "its Linear takes no float8 layers"
    if rival == "torch" and not torch_is_installed():
        return "torch is not installed: pip install 'recflow-jax[torch]'"
    if rival != "jax-per-table":
        return None
    if len(config.tables) > MOST_TABLES_APART:
        return f"{len(config.tables)} tables: with more than {MOST_TABLES_APART} nobody does"
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(params.groups)), free_bytes()
    if free is not None and needed > 0.8 * free:
        return f"a second copy of the tables, {needed / 1e9:.1f} GB, does not fit beside them"
    return None


def device_batches(
    layout: Layout, sets: Sequence[JaggedBatch], *, ids: int = 1
) -> list[DeviceBatch]:
    """The sets on the device, all padded to `ids` ids, or as many as the largest has."""
    ids = max(ids, *(len(batch.values) for batch in sets))
    return jax.device_put([to_device(layout, batch, ids=ids) for batch in sets])


def plain_batches(plain: PlainModel, sets: Sequence[JaggedBatch]) -> list[PlainBatch]:
    """The sets on the device as `plain` takes them, segments of jagged bags made ready."""
    packed = [plain.pack(batch) for batch in sets]
    ids = [max(len(batch.pieces[i].rows) for batch in packed) for i in range(len(plain.pieces))]
    ids = [max(1, size) for size in ids]
    equal = [padded(batch, samples=len(batch.dense), ids=ids) for batch in packed]
    make_ready = jax.jit(with_segments)
    return [make_ready(jax.device_put(batch)) for batch in equal]


def _plain_entry(name: str, plain: PlainModel, params: Any, sets: Sequence[JaggedBatch]) -> Entry:
    return Entry(
        name=name,
        note=plain.pooler.replace("_", " "),
        function=plain.forward,
        params=(params,),
        inputs=plain_batches(plain, sets),
    )


def compile_all(jobs: Mapping[Any, Job]) -> dict[Any, tuple[Callable[..., Any], float]]:
    """Compiles functions for example arguments, a few at a time: (executable, seconds) by key."""

    def compile_one(job: Job) -> tuple[Any, float]:
        started = time.perf_counter()
        lowered = jax.jit(job.function).lower(*job.arguments)
        executable = lowered.compile(compiler_options=dict(job.compiler_options))
        return executable, time.perf_counter() - started

    # On a GPU XLA times its matmuls while it compiles; two at once would choose by noise.
    workers = COMPILE_THREADS if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as threads:
        return dict(zip(jobs, threads.map(compile_one, jobs.values()), strict=True))


def launches(
    executable: Callable[..., Any], params: tuple[Any, ...], inputs: Sequence[Any]
) -> Timed:
    """Calls of `executable` that rotate among the inputs, which come after `params`."""
    return Timed(launch=lambda i: executable(*params, inputs[i % len(inputs)]))


def _jax_contender(entry: Entry, executable: Callable[..., Any], compile_s: float) -> Contender:
    dispatch = None
    if entry.name == RECFLOW:
        empty = jax.jit(lambda *_: jnp.float32(0), keep_unused=True)
        compiled = empty.lower(*entry.params, entry.inputs[0]).compile()
        dispatch = launches(compiled, entry.params, entry.inputs)
    return Contender(
        dispatch=dispatch,
        name=entry.name,
        timed=launches(executable, entry.params, entry.inputs),
        scores=np.asarray,
        compile_s=compile_s,
        note=entry.note,
    )


def _torch_contender(torch_model: TorchModel, sets: Sequence[JaggedBatch]) -> Contender:
    inputs = [torch_model.load(batch) for batch in sets]
    return Contender(
        name="torch",
        timed=Timed(launch=lambda i: torch_model(inputs[i % len(inputs)]), wait=torch_model.wait),
        scores=lambda scores: scores.cpu().numpy(),
        compile_s=0.0,
        note="eager",
    )
