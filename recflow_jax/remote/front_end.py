"""A front end: requests of this process, passed on together to the engine of another."""

import heapq
import itertools
import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread, current_thread
from typing import Any

import numpy as np

from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.answer import Answer, settle
from recflow_jax.engine.clock import now_us
from recflow_jax.engine.closing import Closing
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed, queue_full
from recflow_jax.engine.heap import HEAP
from recflow_jax.engine.held_copies import kept
from recflow_jax.engine.prepared import Prepared, Preparer
from recflow_jax.engine.switching import SHORT_MS, SWITCH_INTERVAL
from recflow_jax.engine.terms import Sparse, Terms, is_batch
from recflow_jax.layout import Layout
from recflow_jax.remote.arena import SLOTS, Arena, BundleShape, Samples
from recflow_jax.remote.wire import (
    MOST_BYTES,
    Ask,
    Greeting,
    ProtocolError,
    Reply,
    new_socket,
    send_handle,
)
from scheduling.admission import Admission

CLOSED = "the front end is closed"
GONE = "the engine's process sends no more answers"


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """Samples that wait for their bundle, or for its scores. prepared: the same as they can be
    checked.
    """

    number: int
    samples: Samples
    prepared: Prepared
    answer: Answer
    terms: Terms
    has_begun: bool = False

    def begins(self) -> bool:
        """Whether its answer is still wanted; after that it cannot be cancelled."""
        if not self.has_begun:
            self.has_begun = self.answer.set_running_or_notify_cancel()
        return self.has_begun

    @property
    def is_late(self) -> bool:
        """Whether its deadline has come."""
        return self.terms.deadline_us is not None and self.terms.deadline_us <= now_us()


@dataclass(frozen=True, kw_only=True)
class FrontEndStats:
    """Counts since the front end was opened. failed: requests that ended with an error: of bad
    samples, too late, or what the engine said. bundles: of requests, that were passed on.
    """

    requests_accepted: int = 0
    samples_accepted: int = 0
    requests_answered: int = 0
    samples_answered: int = 0
    failed: int = 0
    cancelled: int = 0
    bundles: int = 0
    queued_samples: int = 0


class FrontEnd(Closing):
    """Asks the engine of another process, one that lets `FrontEnds` in at `path`; any thread may.

    Requests are copied and checked here, but for what a device finds out by itself, as
    `Engine.submit` says. What has come while bundles were under way goes together in the next, of
    which the engine's process has no more to do than of one request. Nothing waits for a bundle to
    fill; but while more waits in the engine than a batch takes, one bundle is under way, not up to
    three, unless another is more urgent: they would only wait there, each a small one.

    Until it is closed, Python switches threads and collects garbage as beside an open engine.
    Raises OSError where nobody listens, and ProtocolError for a version that differs.
    """

    def __init__(self, path: str | Path) -> None:
        self._socket = new_socket()
        try:
            self._socket.connect(str(path))
            greeting = Greeting.receive(self._socket)
            self.config = DLRMConfig.from_toml(greeting.config, source=str(path))
            self._room = BundleShape.of(self.config, greeting)
            self._arena, handle = Arena.new(self._room)
            try:
                send_handle(self._socket, handle)
            finally:
                os.close(handle)
        except BaseException:
            self._socket.close()
            raise
        layout = Layout.of(self.config)
        self.max_ids_per_sample = greeting.ids_per_sample
        self.max_queued_samples = greeting.queued_samples
        self.backend_name = greeting.backend
        self._preparer = Preparer(self.config, layout, max_ids=greeting.ids_per_sample)
        self._admission = Admission(greeting.queued_samples)
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, _Request]] = []
        self._flying: dict[int, list[_Request]] = {}
        self._most_flying = SLOTS
        self._changed = Condition()
        self._counts = Counter[str]()
        self._refusal = ""  # why there are no more requests, once there are none
        self._drops = self._gone = False
        self._threads = [
            Thread(target=run, name=f"recflow-{name}", daemon=True)
            for name, run in (("bundles", self._send), ("replies", self._receive))
        ]
        for thread in self._threads:
            thread.start()
        self._restore = (HEAP.freeze(self), SWITCH_INTERVAL.shorten(self, SHORT_MS / 1000))

    def submit(
        self,
        dense: Any,
        sparse: Sparse | None = None,
        *,
        deadline_ms: float | None = None,
        priority: int = 0,
    ) -> Answer:
        """As `Engine.submit`, but that samples are at most as many as a slice of the engine holds,
        and that an answer can be cancelled until its bundle leaves. Raises InputError, QueueFull,
        EngineClosed and DeadlineExceeded.
        """
        terms = Terms.of(now_us(), deadline_ms, priority)
        request = self._request(dense, sparse, terms)
        if request.is_late:
            raise DeadlineExceeded(f"the deadline was {deadline_ms} ms after the call")
        if not request.samples.count:
            return Answer.of_no_samples(self.config.outputs)
        with self._changed:
            self._let_in(request.samples.count)
            self._counts["requests_accepted"] += 1
            self._counts["samples_accepted"] += request.samples.count
            self._wait(request)
        return request.answer

    def predict(self, dense: Any, sparse: Sparse | None = None) -> np.ndarray:
        """Scores (logits), float32 [n, outputs]; waits for them. Raises what `submit` and its
        answers do.
        """
        return self.submit(dense, sparse).result()

    @property
    def is_gone(self) -> bool:
        """Whether nobody answers any more."""
        return self._gone

    def stats(self) -> FrontEndStats:
        """What was accepted, passed on and answered so far."""
        with self._changed:
            return FrontEndStats(**self._counts, queued_samples=self._admission.samples)

    def close(self, drain: bool = True) -> None:
        """Accepts nothing more; waits until its threads have ended, but not in a callback of an
        answer. May be called again.

        drain: first waits for the answers of what was accepted; else what is not answered raises
        EngineClosed.
        """
        with self._changed:
            self._refusal, self._drops = self._refusal or CLOSED, self._drops or not drain
            self._changed.notify_all()
            if current_thread() in self._threads:
                return
            self._changed.wait_for(
                lambda: self._gone or self._drops or not (self._waiting or self._flying)
            )
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()
        for restore in self._restore:
            restore()

    def _request(self, dense: Any, sparse: Sparse | None, terms: Terms) -> _Request:
        """What a caller handed over, in arrays that nobody writes to."""
        batch = dense
        if not is_batch(dense, sparse):
            batch = JaggedBatch.from_features(self.config, dense, sparse or {})
        values, offsets, room = None, None, self._room
        prepared = self._preparer.prepare_fixed(batch, checks_later=True)
        if prepared is None:
            batch = _kept(batch)  # whatever its caller does to it meanwhile
            prepared, offsets = self._preparer.prepare(batch), batch.offsets
            values = batch.values.astype(np.int32, copy=False)
        if prepared.samples > room.samples or len(prepared.rows) > room.ids:
            raise InputError(
                f"{prepared.samples} samples with {len(prepared.rows)} ids are more than a front "
                f"end passes on at once, {room.samples} with {room.ids}"
            )
        samples = Samples(
            dense=prepared.dense,
            values=prepared.rows if values is None else values,
            offsets=offsets,
            weights=prepared.weights,
        )
        return _Request(
            number=next(self._numbers),
            samples=samples,
            prepared=prepared,
            answer=Answer(),
            terms=terms,
        )

    def _let_in(self, samples: int) -> None:
        if self._refusal:
            raise EngineClosed(self._refusal)
        if not self._admission.try_enter(samples):
            raise queue_full(self._admission, samples)

    def _wait(self, request: _Request) -> None:
        """Until its bundle leaves."""
        heapq.heappush(self._waiting, (request.terms.priority, request.number, request))
        if self._may_fly():
            self._changed.notify_all()

    def _send(self) -> None:
        """Bundle after bundle, as long as there are slots for them."""
        while True:
            with self._changed:
                self._changed.wait_for(self._has_cause_to_send)
                if self._gone or not self._waiting:
                    return
                bundle, late = self._take()
                self._counts["bundles"] += bool(bundle)
                slot = next(slot for slot in range(SLOTS) if slot not in self._flying)
                self._flying[slot] = bundle
            self._fail(late, DeadlineExceeded("the deadline passed before the request was sent"))
            if bundle:
                self._ask(slot, bundle)
            else:
                self._free_slot(slot)

    def _has_cause_to_send(self) -> bool:
        is_through = bool(self._refusal) and not self._waiting
        return self._gone or is_through or bool(self._waiting and self._may_fly())

    def _may_fly(self) -> bool:
        """Whether the next bundle may be under way beside those that are; a more urgent one may."""
        if len(self._flying) < self._most_flying:
            return True
        if len(self._flying) == SLOTS:
            return False
        first, *_ = self._waiting[0]
        return first < min(bundle[0].terms.priority for bundle in self._flying.values())

    def _take(self) -> tuple[list[_Request], list[_Request]]:
        """The next bundle, of one priority, and who is too late for it."""
        bundle: list[_Request] = []
        late: list[_Request] = []
        samples, ids, first = self._room.samples, self._room.ids, self._waiting[0][0]
        while self._waiting and self._waiting[0][0] == first:
            request = self._waiting[0][-1]
            samples -= request.samples.count
            ids -= len(request.samples.values)
            if bundle and min(samples, ids) < 0:
                break
            heapq.heappop(self._waiting)
            if not request.begins():
                self._admission.leave(request.samples.count)
                self._counts["cancelled"] += 1
            else:
                (late if request.is_late else bundle).append(request)
        return bundle, late

    def _ask(self, slot: int, bundle: list[_Request]) -> None:
        samples, ids, are_fixed = self._arena.write(slot, [one.samples for one in bundle])
        ask = Ask(
            slot=slot,
            samples=samples,
            ids=ids,
            priority=bundle[0].terms.priority,
            are_fixed=are_fixed,
        )
        with suppress(OSError):  # who receives hears of it as well
            self._socket.send(ask.encoded())

    def _receive(self) -> None:
        """Replies, until there are no more."""
        cause: Exception | None = None
        try:
            while message := self._socket.recv(MOST_BYTES):
                self._land(Reply.decoded(message))
        except (OSError, ProtocolError) as error:
            cause = error
        with self._changed:
            self._gone, self._refusal = True, self._refusal or GONE
            lost = [one for bundle in self._flying.values() for one in bundle]
            waiting = [one for _, _, one in self._waiting]
            self._flying.clear()
            self._waiting.clear()
            self._changed.notify_all()
        lost += [one for one in waiting if one.begins()]
        error = EngineClosed(CLOSED if self._drops else GONE)
        error.__cause__ = cause
        self._fail(lost, error)

    def _land(self, reply: Reply) -> None:
        bundle = self._flying.get(reply.slot)
        if not bundle:
            raise ProtocolError(f"nobody has asked for slot {reply.slot}")
        self._most_flying = 1 if reply.is_crowded else SLOTS
        if isinstance(reply.error, InputError):
            return self._sort_out(reply.slot, bundle, reply.error)
        scores = self._arena.scores(reply.slot, sum(one.samples.count for one in bundle)).copy()
        self._free_slot(reply.slot)
        if reply.error is not None:
            return self._fail(bundle, reply.error)
        stop, late, timely = 0, [], []
        for one in bundle:
            start, stop = stop, stop + one.samples.count
            if one.is_late:
                late.append(one)
            else:
                timely.append((one, scores[start:stop].copy()))
        self._fail(late, DeadlineExceeded("the answer came too late"))
        self._count_answered([one for one, _ in timely])
        for one, own in timely:
            settle(one.answer.set_result, own)

    def _count_answered(self, requests: Sequence[_Request]) -> None:
        """Before anybody sees his answer."""
        samples = sum([one.samples.count for one in requests])
        self._admission.leave(samples)
        with self._changed:
            self._counts["requests_answered"] += len(requests)
            self._counts["samples_answered"] += samples

    def _sort_out(self, slot: int, bundle: list[_Request], error: InputError) -> None:
        """Of a bundle that was refused, whoever has bad samples is told so, and the others go
        again.
        """
        well = []
        for one in bundle:
            try:
                self._preparer.check(one.prepared)
                well.append(one)
            except InputError as own:
                self._fail([one], own)
        if len(well) == len(bundle):
            self._fail(well, error)
            well = []
        self._free_slot(slot, again=well)

    def _free_slot(self, slot: int, *, again: Sequence[_Request] = ()) -> None:
        """Of a bundle of which these requests are to be sent once more."""
        with self._changed:
            del self._flying[slot]
            for request in again:
                self._wait(request)
            self._changed.notify_all()

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        """Each with an error of its own."""
        for one in requests:
            with self._changed:
                self._counts["failed"] += 1
            own = type(error)(*error.args)
            own.__cause__ = error.__cause__
            self._admission.leave(one.samples.count)
            settle(one.answer.set_exception, own)


def _kept(batch: JaggedBatch) -> JaggedBatch:
    """In arrays that nobody writes to, copies where somebody could."""
    return JaggedBatch(
        dense=kept(batch.dense),
        values=kept(batch.values),
        offsets=kept(batch.offsets),
        weights=None if batch.weights is None else kept(batch.weights),
    ).frozen()
