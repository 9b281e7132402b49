"""The serving that plain JAX gets: one thread that collects a batch, runs it, answers, repeats.

A batch starts when `batch` samples are there or the oldest request has waited `wait_ms`. Requests
that come while a batch runs wait for the next one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.closing import Closing
from recflow_jax.measure.baselines import PlainModel
from recflow_jax.measure.stream import PlainRunner
from recflow_jax.model import Params
from scheduling import ladder

Scores = Float[np.ndarray, "samples outputs"]
RunBatch = Callable[[Sequence[JaggedBatch]], Scores]


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    request: JaggedBatch
    answer: "Future[Scores]"
    came_s: float


class BatchingServer(Closing):
    """Serial batching in front of `run`, which gives the scores of several requests in a row.

    A request of more than `batch` samples makes a batch of its own.
    """

    def __init__(self, run: RunBatch, *, batch: int, wait_ms: float) -> None:
        self._run = run
        self._batch = batch
        self._wait_s = wait_ms / 1e3
        self._waiting: deque[_Waiting] = deque()
        self._samples = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="plain-server", daemon=True)
        self._thread.start()

    def submit(self, request: JaggedBatch) -> "Future[Scores]":
        """Queues a request."""
        answer: Future[Scores] = Future()
        waiting = _Waiting(request=request, answer=answer, came_s=time.perf_counter())
        with self._changed:
            self._waiting.append(waiting)
            self._samples += request.samples
            self._changed.notify()
        return answer

    def close(self) -> None:
        """Answers what is queued, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while batch := self._collect():
            try:
                scores = self._run([waiting.request for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    waiting.answer.set_exception(error)
                continue
            ends = np.cumsum([waiting.request.samples for waiting in batch])
            for waiting, part in zip(batch, np.split(scores, ends), strict=False):
                waiting.answer.set_result(part)

    def _collect(self) -> list[_Waiting]:
        """The next batch; empty when the server is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                left_s = self._waiting[0].came_s + self._wait_s - time.perf_counter()
                self._changed.wait_for(self._has_enough, timeout=max(left_s, 0))
            return self._take()

    def _has_enough(self) -> bool:
        return self._samples >= self._batch or self._closed

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        samples = 0
        while self._waiting and (
            not taken or samples + self._waiting[0].request.samples <= self._batch
        ):
            taken.append(self._waiting.popleft())
            samples += taken[-1].request.samples
        self._samples -= samples
        return taken


class PlainLadder:
    """Plain JAX for joined requests of any size: padded to the smallest of a ladder of shapes.

    Samples double from rung to rung; each holds the ids of as many samples of `example` and a
    tenth more. What fits no rung is cut in half.
    """

    def __init__(
        self,
        plain: PlainModel,
        prepared: Params,
        *,
        smallest: int,
        largest: int,
        example: JaggedBatch,
    ) -> None:
        pieces = plain.pack(example).pieces
        per_sample = [len(piece.rows) / example.samples for piece in pieces]
        self._plain = plain
        self._runners = [
            PlainRunner(plain, prepared, samples=n, ids=[int(1.1 * n * k) + 64 for k in per_sample])
            for n in ladder(largest, smallest)
        ]

    def __call__(self, requests: Sequence[JaggedBatch]) -> Scores:
        return self._run(JaggedBatch.join(requests))

    def _run(self, batch: JaggedBatch) -> Scores:
        packed = self._plain.pack(batch)
        for runner in self._runners:
            if runner.fits(packed):
                return np.asarray(runner.launch(packed))[: batch.samples]
        if batch.samples == 1:
            raise ValueError(f"one sample of {len(batch.values)} ids is more than any shape holds")
        half = batch.samples // 2
        parts = (batch.part(0, half), batch.part(half, batch.samples))
        return np.concatenate([self._run(part) for part in parts])
