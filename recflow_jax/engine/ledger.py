"""Every accepted request until its one end: answered, cancelled, expired or failed."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.engine.answer import Answer, settle
from recflow_jax.engine.clock import now_us
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed, EngineError, queue_full
from recflow_jax.engine.messages import Close, Dropped, Inbox, Submitted
from recflow_jax.engine.stats import Tally
from recflow_jax.engine.updates import Update
from scheduling.admission import Admission
from scheduling.request import Part, Request


@dataclass(slots=True)
class _Open:
    """A request that has had no end yet, and its scores as far as they have come."""

    request: Request
    answer: Answer
    missing: int
    scores: np.ndarray | None = None

    def add(self, part: Part, scores: np.ndarray) -> bool:
        """Takes a part's scores, which it copies; whether that was the last part."""
        if part.samples == self.request.samples:
            self.scores = scores.copy()
            return True
        if self.scores is None:
            self.scores = np.empty((self.request.samples, scores.shape[1]), scores.dtype)
        self.scores[part.start : part.stop] = scores
        self.missing -= part.samples
        return self.missing == 0

    def late_us(self, now: int) -> int:
        """How long its deadline has passed."""
        deadline_us = self.request.deadline_us
        return 0 if deadline_us is None else max(now - deadline_us, 0)


class Ledger:
    """The requests of an engine that wait for their answers; any thread may call.

    Whoever takes a request out of the table ends it, and nobody else: so each ends exactly once,
    and its samples leave the queue exactly once.
    """

    def __init__(self, *, max_samples: int, inbox: Inbox, tally: Tally) -> None:
        self._admission = Admission(max_samples)
        self._inbox = inbox
        self._tally = tally
        self._open: dict[int, _Open] = {}
        self._requests_accepted = self._samples_accepted = 0
        self._door = threading.Lock()
        self._shut = False

    @property
    def samples(self) -> int:
        """Samples accepted and not yet answered."""
        return self._admission.samples

    @property
    def accepted(self) -> tuple[int, int]:
        """Requests and samples so far."""
        with self._door:
            return self._requests_accepted, self._samples_accepted

    def expect(self, samples: int) -> None:
        """Raises what `accept` would now, so that a flood need not be made ready first. A request
        that is larger than the queue passes: it has an error of its own.
        """
        if self._shut:
            self._refuse_closed()
        if samples <= self._admission.max_samples and not self._admission.has_room(samples):
            self._refuse_full(samples)

    def accept(self, submitted: Submitted) -> Answer:
        """Lets a request in and tells the launcher. Raises EngineClosed, QueueFull."""
        request = submitted.request
        answer = Answer(partial(self._cancel, request.id))
        with self._door:
            self._let_in(request.samples)
            self._requests_accepted += 1
            self._samples_accepted += request.samples
            self._open[request.id] = _Open(request, answer, request.samples)
            self._tell(submitted)
        return answer

    def pass_on(self, update: Update) -> None:
        """Tells the launcher of an update. Raises EngineClosed."""
        with self._door:
            if self._shut:
                raise EngineClosed("the engine is closed")
            self._inbox.put(update)

    def shut(self, close: Close | None = None) -> None:
        """Accepts nothing more; `close` is the first message behind all that was accepted."""
        with self._door:
            self._shut = True
            if close is not None:
                self._inbox.put(close)

    def add(self, parts: Iterable[tuple[int, Part]], scores: np.ndarray) -> None:
        """Takes a batch's scores, a part's from its row on; answers who has all of his own now."""
        complete = [
            part.request_id
            for row, part in parts
            if self._add(part, scores[row : row + part.samples])
        ]
        self._finish([entry for i in complete if (entry := self._open.pop(i, None)) is not None])

    def expire(self, request_id: int) -> None:
        """The deadline came before the launch."""
        message = "the deadline passed before the request was launched"
        self.fail(request_id, DeadlineExceeded, message)

    def fail(
        self,
        request_id: int,
        kind: type[EngineError],
        message: str,
        cause: BaseException | None = None,
    ) -> None:
        """Ends a request with an error, unless it has ended already."""
        error = kind(message)
        error.__cause__ = cause
        self.end(request_id, error)

    def end(self, request_id: int, error: EngineError | InputError) -> None:
        """Ends a request with this error, unless it has ended already."""
        entry = self._take_out(request_id)
        if entry is None:
            return
        self._inbox.put(Dropped(request_id))
        if not entry.answer.set_running_or_notify_cancel():
            return self._tally.cancelled()
        self._count(error)
        settle(entry.answer.set_exception, error)

    def fail_all(
        self, kind: type[EngineError], message: str, cause: BaseException | None = None
    ) -> None:
        """Ends every request that is open."""
        for request_id in list(self._open):
            self.fail(request_id, kind, message, cause)

    def _count(self, error: EngineError | InputError) -> None:
        if isinstance(error, DeadlineExceeded):
            self._tally.rejected("deadline")
        elif isinstance(error, InputError):
            self._tally.rejected("input")
        else:
            self._tally.failed()

    def _let_in(self, samples: int) -> None:
        if self._shut:
            self._refuse_closed()
        if not self._admission.try_enter(samples):
            self._refuse_full(samples)

    def _refuse_closed(self) -> NoReturn:
        self._tally.rejected("closed")
        raise EngineClosed("the engine is closed")

    def _refuse_full(self, samples: int) -> NoReturn:
        self._tally.rejected("queue_full")
        raise queue_full(self._admission, samples)

    def _tell(self, submitted: Submitted) -> None:
        """The launcher has to see to a deadline in time, even if it can launch nothing."""
        if submitted.request.deadline_us is None:
            self._inbox.put_arrival(submitted)
        else:
            self._inbox.put(submitted)

    def _add(self, part: Part, scores: np.ndarray) -> bool:
        entry = self._open.get(part.request_id)
        return entry is not None and entry.add(part, scores)

    def _finish(self, entries: Sequence[_Open]) -> None:
        """Nobody sees his answer before all are counted, and have left the queue."""
        self._admission.leave(sum([entry.request.samples for entry in entries]))
        now = now_us()
        timely = [entry for entry in entries if self._is_timely(entry, now)]
        self._tally.answered(
            samples=sum([entry.request.samples for entry in timely]),
            latencies_us=[now - entry.request.arrived_us for entry in timely],
        )
        for entry in timely:
            settle(entry.answer.set_result, entry.scores)

    def _is_timely(self, entry: _Open, now: int) -> bool:
        """Whether the answer is still wanted; ends the request if it is not."""
        if not entry.answer.set_running_or_notify_cancel():
            self._tally.cancelled()
        elif late_us := entry.late_us(now):
            self._tally.rejected("deadline")
            message = f"the answer came {late_us / 1000:.3f} ms after the deadline"
            settle(entry.answer.set_exception, DeadlineExceeded(message))
        else:
            return True
        return False

    def _cancel(self, request_id: int) -> None:
        entry = self._take_out(request_id)
        if entry is not None:
            self._inbox.put(Dropped(request_id))
            self._tally.cancelled()
            entry.answer.set_running_or_notify_cancel()

    def _take_out(self, request_id: int) -> _Open | None:
        entry = self._open.pop(request_id, None)
        if entry is not None:
            self._admission.leave(entry.request.samples)
        return entry
