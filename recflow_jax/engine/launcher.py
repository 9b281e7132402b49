"""The thread that owns the policy: mail in, launches out. It never waits for the device."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Array

from recflow_jax.engine.answer import settle
from recflow_jax.engine.clock import now_us
from recflow_jax.engine.errors import EngineClosed, EngineError, StepFailed
from recflow_jax.engine.ledger import Ledger
from recflow_jax.engine.messages import (
    Close,
    Dropped,
    Fault,
    Flight,
    Inbox,
    Message,
    Passed,
    Submitted,
    Written,
)
from recflow_jax.engine.prepared import Prepared
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.stages import BatchState
from recflow_jax.engine.stats import Tally
from recflow_jax.engine.updates import Update
from scheduling.host_costs import LARGE_IDS, RESTS
from scheduling.pipeline import (
    Action,
    Apply,
    Cancel,
    Event,
    Expire,
    Launch,
    StepDone,
    Write,
)
from scheduling.policy import Policy
from scheduling.request import WHOLE, CoRun, Part, Segment, Slice, Step

BEFORE_HELD = 2  # batches that are called and have not ended: one runs, one waits behind it


@dataclass(slots=True)
class _Batch:
    """A batch whose last segment is not launched yet: where it is on the device, who is in it."""

    state: BatchState | None = None
    x: Any = None
    request_ids: set[int] = field(default_factory=set)
    fault: Exception | None = None


@dataclass(slots=True, frozen=True)
class _Joining:
    """The samples of a slice, part by part, and the requests that they are of."""

    samples: Sequence[Prepared] = ()
    requests: Sequence[Submitted] = ()

    @property
    def are_in_berths(self) -> bool:
        """Then there are few to copy."""
        return all([samples.berth is not None for samples in self.samples])


@dataclass(slots=True, frozen=True)
class _Held:
    """A whole batch whose slice is on its way to the device, and which is not called yet."""

    step: Step
    flight: Flight
    batch: _Batch
    packed: Any


class Launcher:
    """Turns the policy's steps into dispatches. All but the constructor runs on one thread.

    A launch that raises fails the requests of its batch. A fault on the device fails those of every
    batch that is not launched to its end, as its state may be lost; later batches get new states.

    JAX lets a copy to the device wait for all that was called before it. So the last of three whole
    batches, if it is large, is held: it is called when the copy of the next one is on its way, or
    one of the two in front has ended. Then the device copies while it computes.
    """

    def __init__(
        self,
        segments: Segments,
        policy: Policy,
        *,
        inbox: Inbox,
        flights: SimpleQueue[Flight | Written | Passed | None],
        ledger: Ledger,
        tally: Tally,
    ) -> None:
        self._segments = segments
        self._policy = policy
        self._inbox = inbox
        self._flights = flights
        self._ledger = ledger
        self._tally = tally
        self._waiting: dict[int, Submitted] = {}
        self._updates: deque[Update] = deque()
        self._batches: dict[int, _Batch] = {}
        self._free_states: list[BatchState] = []
        self._held: _Held | None = None
        self._under_way = 0
        self._close: Close | None = None

    def run(self) -> None:
        """Until it is told to close; never ends with a request left open."""
        try:
            while not self._is_done():
                asked_us = now_us()
                messages = self._inbox.wait(self._patience_s(), can_launch=self._policy.can_launch)
                started_us = now_us()
                with self._inbox.launching():
                    # Whose ids are in a berth by now is to be in the slice that leaves with it.
                    messages += self._inbox.read()
                    actions = self._policy.step(started_us, [*self._events(messages)])
                    self._act(actions)
                    if self._under_way < BEFORE_HELD:
                        self._call_held()
                    self._inbox.is_crowded = self._policy.is_crowded
                if actions:
                    aside_us = self._inbox.take_aside_us()
                    took_us = now_us() - started_us - aside_us
                    if self._held is None:
                        self._inbox.rest(RESTS * took_us - (started_us - asked_us) - aside_us)
            if self._close is not None and self._close.drain:
                self._wait_for_answers()
            self._give_up("the engine was closed before it came to the request")
        except BaseException as error:
            self._give_up(f"the engine stopped: {error!r}", error)
        finally:
            self._flights.put(None)

    def _is_done(self) -> bool:
        return self._close is not None and (not self._close.drain or self._policy.idle)

    def _wait_for_answers(self) -> None:
        """A step is known to have ended before its answers are made."""
        passed = Passed()
        self._flights.put(passed)
        passed.wait()

    def _patience_s(self) -> float | None:
        deadline_us = self._policy.next_deadline_us
        return None if deadline_us is None else (deadline_us - now_us()) / 1e6

    def _give_up(self, message: str, cause: BaseException | None = None) -> None:
        self._ledger.shut()
        self._ledger.fail_all(EngineClosed, message, cause)
        unread = [found for found in self._inbox.wait(0) if isinstance(found, Update)]
        for update in (*self._updates, *unread):
            fail_update(update, EngineClosed, "the engine was closed before it came to the rows")

    def _events(self, messages: Iterable[Message]) -> Iterator[Event]:
        for message in messages:
            match message:
                case Submitted():
                    self._waiting[message.request.id] = message
                    yield message
                case Dropped(request_id=request_id):
                    self._waiting.pop(request_id, None)
                    yield Cancel(request_id=request_id)
                case Update():
                    self._updates.append(message)
                    yield Write()
                case StepDone():
                    self._under_way -= 1
                    yield message
                case Fault(error=error):
                    self._lose_states(error)
                case Close():
                    self._close = message

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Expire(request_id=request_id):
                    self._ledger.expire(request_id)
                case Launch(step=step):
                    self._launch(step)
                case Apply():
                    self._call_held()
                    self._write(self._updates.popleft())

    def _write(self, update: Update) -> None:
        try:
            landed = self._segments.write_rows(update.rows)
        except Exception as error:
            fail_update(update, StepFailed, "the rows could not be written", error)
        else:
            self._flights.put(Written(update=update, landed=landed))

    def _launch(self, step: Step) -> None:
        flight = Flight(step_id=step.id, launched_us=now_us())
        filling, joining = self._load(step.slice) if step.slice else (_Batch(), _Joining())
        running = self._batches[step.segment.batch_id] if step.segment else _Batch()
        if step.co_run == WHOLE:
            return self._launch_whole(step, running, joining, flight)
        self._call_held()
        if step.co_run is not None and not (running.fault or filling.fault):
            with _faults_of(running, filling):
                self._co_run(step, running, filling, joining, flight)
        else:
            self._launch_in_turn(step, running, filling, joining, flight)
        self._send(step, running, flight)

    def _launch_whole(self, step: Step, batch: _Batch, joining: _Joining, flight: Flight) -> None:
        """What is large leaves for the device before the batch in front is called."""
        assert step.slice
        is_large = _is_large(step.slice)
        if not (is_large and self._under_way and joining.are_in_berths):
            self._call_held()
        packed: Any = None
        with _faults_of(batch):
            packed = self._packed(step.slice, joining, flight)
        self._call_held()
        self._held = _Held(step, flight, batch, packed)
        if not is_large:
            self._call_held()

    def _call_held(self) -> None:
        """Calls the batch that is held, if there is one."""
        held, self._held = self._held, None
        if held is None:
            return
        step, batch = held.step, held.batch
        if not batch.fault:
            assert step.segment and step.slice
            cell = CoRun(segment=step.segment.shape, slice=step.slice.bucket, config=WHOLE)
            with _faults_of(batch):
                batch.x = self._call(self._segments.run_whole, cell, held.packed)
                held.flight.is_whole = True
                self._expect(step.segment, batch, held.flight)
        self._send(step, batch, held.flight)

    def _send(self, step: Step, running: _Batch, flight: Flight) -> None:
        """To where its end is waited for."""
        if step.segment is not None:
            self._end_if_faulty(running)
            if step.segment.shape.last:
                del self._batches[step.segment.batch_id]
        self._tally.launched(step, flight.waits)
        self._under_way += 1
        self._flights.put(flight)

    def _launch_in_turn(
        self,
        step: Step,
        running: _Batch,
        filling: _Batch,
        joining: _Joining,
        flight: Flight,
    ) -> None:
        """The older batch's segment first, then the younger one's slice."""
        if step.segment is not None and not running.fault:
            with _faults_of(running):
                self._advance(step.segment, running, flight)
        if step.slice is not None and not filling.fault:
            with _faults_of(filling):
                packed = self._packed(step.slice, joining, flight)
                state = filling.state or self._take_state()
                filling.state = self._call(self._segments.embed, state, packed)
                _expect_landing(filling.state.landed, flight)

    def _load(self, piece: Slice) -> tuple[_Batch, _Joining]:
        """The batch that a slice joins, and what joins it."""
        batch = self._batches.setdefault(piece.batch_id, _Batch())
        batch.request_ids.update(part.request_id for part in piece.parts)
        requests = [self._waiting[part.request_id] for part in piece.parts]
        return batch, _Joining(
            samples=[self._samples_of(part) for part in piece.parts], requests=requests
        )

    def _packed(self, piece: Slice, joining: _Joining, flight: Flight) -> np.ndarray | Array:
        """The slice's buffer; a large one is on its way to the device already."""
        flight.buffer = self._segments.staging.pack(
            piece.bucket,
            piece.row,
            joining.samples,
            aside=self._inbox.aside,
            may_stay=self._inbox.has_berths,
        )
        now, ended = now_us(), self._tally.steps_ended
        flight.waits = [
            (now - one.request.arrived_us, ended - one.steps_ended)
            for one, part in zip(joining.requests, piece.parts, strict=True)
            if part.start == 0
        ]
        flight.unchecked = [one for one in joining.requests if not one.samples.is_checked]
        packed = flight.buffer.array
        return self._call(self._segments.upload, packed) if _is_large(piece) else packed

    def _advance(self, segment: Segment, batch: _Batch, flight: Flight) -> None:
        if batch.state is not None:
            batch.x, free = self._call(self._segments.start, segment.shape, batch.state)
            self._give_back(batch, free)
        else:
            batch.x = self._call(self._segments.run, segment.shape, batch.x)
        self._expect(segment, batch, flight)

    def _co_run(
        self,
        step: Step,
        running: _Batch,
        filling: _Batch,
        joining: _Joining,
        flight: Flight,
    ) -> None:
        """Segment and slice in one executable."""
        assert step.segment and step.slice and step.co_run
        cell = CoRun(segment=step.segment.shape, slice=step.slice.bucket, config=step.co_run)
        packed = self._packed(step.slice, joining, flight)
        into = filling.state or self._take_state()
        if running.state is not None:
            running.x, free, filling.state = self._call(
                self._segments.start_with, cell, running.state, into, packed
            )
            self._give_back(running, free)
        else:
            running.x, filling.state = self._call(
                self._segments.run_with, cell, running.x, into, packed
            )
        _expect_landing(filling.state.landed, flight)
        self._expect(step.segment, running, flight)

    def _call[**P, T](self, launch: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Callers go on meanwhile: JAX leaves the interpreter to others while it launches."""
        with self._inbox.aside():
            return launch(*args, **kwargs)

    def _give_back(self, batch: _Batch, free: BatchState) -> None:
        self._free_states.append(free)
        batch.state = None

    def _expect(self, segment: Segment, batch: _Batch, flight: Flight) -> None:
        flight.x = batch.x
        if segment.shape.last:
            self._segments.bring_back(batch.x)
            flight.parts = segment.parts

    def _take_state(self) -> BatchState:
        """Two are in use at most: a later batch's slices run behind the segment that read it."""
        return self._free_states.pop() if self._free_states else self._segments.new_state()

    def _samples_of(self, part: Part) -> Prepared:
        """The part's samples; with the request's last part they are let go."""
        samples = self._waiting[part.request_id].samples
        if part.stop == samples.samples:
            del self._waiting[part.request_id]
        is_whole = part.samples == samples.samples
        return samples if is_whole else samples.part(part.start, part.stop)

    def _lose_states(self, fault: Exception) -> None:
        self._free_states.clear()
        for batch in self._batches.values():
            batch.fault = fault

    def _end_if_faulty(self, batch: _Batch) -> None:
        """With its next segment, which no batch is without, and with each later one."""
        if batch.fault is not None:
            batch.state = batch.x = None
            fail_step(self._ledger, batch.request_ids, batch.fault)
            batch.request_ids.clear()


def _is_large(piece: Slice) -> bool:
    return piece.bucket.ids >= LARGE_IDS


def fail_step(ledger: Ledger, request_ids: Iterable[int], fault: Exception) -> None:
    """Ends the requests of a batch of which a step raised `fault`."""
    for request_id in request_ids:
        message = f"a step of the request's batch failed: {type(fault).__name__}: {fault}"
        ledger.fail(request_id, StepFailed, message, fault)


def fail_update(
    update: Update, kind: type[EngineError], message: str, cause: Exception | None = None
) -> None:
    """Ends an update with an error."""
    error = kind(f"{message}: {type(cause).__name__}: {cause}" if cause else message)
    error.__cause__ = cause
    settle(update.done.set_exception, error)


def _expect_landing(landed: Any, flight: Flight) -> None:
    """Who is to be looked at is looked at on the host, unless the device finds all well."""
    flight.landed = landed
    if flight.unchecked:
        landed.copy_to_host_async()


@contextmanager
def _faults_of(*batches: _Batch) -> Iterator[None]:
    """What is raised becomes the fault of these batches."""
    try:
        yield
    except Exception as error:
        for batch in batches:
            batch.fault = error
