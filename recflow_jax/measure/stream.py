"""Streams of fresh numpy batches: packing, copies and answers on the host all count.

The engine gets batches by `submit`, in arrays that it has to copy, as the caller may write to them,
and in read-only ones, as servers' are; plain JAX packs, `device_put`s and calls. All keep a few
batches in flight, so that the host's work hides behind the device's where it can.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.engine import Engine
from recflow_jax.measure.agreement import check_answers, reference_scores
from recflow_jax.measure.baselines import PlainBatch, PlainModel, padded
from recflow_jax.measure.contenders import RECFLOW, Job, Lineup, Sets, compile_all
from recflow_jax.measure.offline import Measured, ratios
from recflow_jax.measure.timing import Timed, TimingOptions, measure_side_by_side
from recflow_jax.model import Params

IN_FLIGHT = 4
READ_ONLY = "read-only"

Scores = Float[np.ndarray, "samples outputs"]


class InFlight:
    """Launches that wait for the oldest once `most` are under way."""

    def __init__(
        self, send: Callable[[int], Any], receive: Callable[[Any], Any], most: int = IN_FLIGHT
    ) -> None:
        self._send = send
        self._receive = receive
        self._most = most
        self._pending: deque[Any] = deque()

    def launch(self, index: int) -> None:
        """Sends batch `index`."""
        if len(self._pending) == self._most:
            self._receive(self._pending.popleft())
        self._pending.append(self._send(index))

    def wait(self, _: Any = None) -> None:
        """Until everything is answered."""
        while self._pending:
            self._receive(self._pending.popleft())

    @property
    def timed(self) -> Timed:
        """The stream, to be timed."""
        return Timed(launch=self.launch, wait=self.wait)


class PlainRunner:
    """Plain JAX on numpy batches of at most `samples` samples, compiled once for padded shapes.

    `ids` is the room for ids of each of the model's pieces; where bags are fixed it is not used.
    """

    def __init__(
        self, plain: PlainModel, prepared: Params, *, samples: int, ids: Sequence[int]
    ) -> None:
        self.plain = plain
        self.samples = samples
        self.ids = tuple(ids)
        self._params = prepared
        job = Job(plain.forward, (prepared, plain.zeros(samples=samples, ids=self.ids)))
        self._executable, self.compile_s = compile_all({"": job})[""]

    def fits(self, batch: PlainBatch) -> bool:
        """Whether there is room for all samples and ids."""
        return len(batch.dense) <= self.samples and all(
            piece.lengths is None or len(piece.rows) <= room
            for piece, room in zip(batch.pieces, self.ids, strict=True)
        )

    def launch(self, batch: PlainBatch) -> Any:
        """Copies a packed batch to the device, runs it, starts its scores on their way back."""
        equal = padded(batch, samples=self.samples, ids=self.ids)
        scores = self._executable(self._params, jax.device_put(equal))
        scores.copy_to_host_async()
        return scores


@dataclass(frozen=True, kw_only=True)
class StreamResult:
    """Engine, also with READ_ONLY arrays, and plain JAX on streams of batches of one size."""

    batch: int
    in_flight: int
    contenders: dict[str, Measured]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long the others take per batch as the engine with arrays to copy."""
        return ratios({name: m.timing.median_us for name, m in self.contenders.items()})


def bench_stream(
    engine: Engine,
    lineup: Lineup,
    params: Params,
    sets: Sets,
    *,
    options: TimingOptions,
    advance: Callable[[], None] = lambda: None,
) -> list[StreamResult]:
    """Times all at each batch size of `sets`, after their answers have been checked.

    `advance` is called after each batch size. Raises WrongAnswers.
    """
    results = []
    for samples, plain in lineup.fastest_poolers(sets).items():
        packed = [plain.pack(batch) for batch in sets[samples]]
        room = [max(len(p.pieces[i].rows) for p in packed) for i in range(len(plain.pieces))]
        runner = PlainRunner(plain, lineup.plain_params, samples=samples, ids=room)
        results.append(_measure(engine, runner, params, sets[samples], options))
        advance()
    return results


def _measure(
    engine: Engine,
    runner: PlainRunner,
    params: Params,
    sets: Sequence[JaggedBatch],
    options: TimingOptions,
) -> StreamResult:
    def launch_plain(index: int) -> Any:
        return runner.launch(runner.plain.pack(sets[index % len(sets)]))

    frozen = [batch.frozen() for batch in sets]

    def submit(batches: Sequence[JaggedBatch], index: int) -> Any:
        return engine.submit(batches[index % len(batches)])

    engines = {RECFLOW: partial(submit, sets), READ_ONLY: partial(submit, frozen)}
    answers = {name: send(0).result() for name, send in engines.items()}
    answers["jax"] = np.asarray(launch_plain(0))
    reference = reference_scores(engine.config, params, sets[0])
    errors = check_answers(reference, answers, dtype=engine.config.compute_dtype)
    streams = {
        name: InFlight(send, lambda answer: answer.result()).timed for name, send in engines.items()
    }
    streams["jax"] = InFlight(launch_plain, np.asarray).timed
    timings = measure_side_by_side(streams, options)
    notes = dict.fromkeys(engines, engine.backend.name)
    notes["jax"] = runner.plain.pooler.replace("_", " ")
    compile_s = dict.fromkeys(engines, 0.0) | {"jax": runner.compile_s}
    return StreamResult(
        batch=sets[0].samples,
        in_flight=IN_FLIGHT,
        contenders={
            name: Measured(
                timing=timing, error=errors[name], compile_s=compile_s[name], note=notes[name]
            )
            for name, timing in timings.items()
        },
    )
