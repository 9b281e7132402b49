"""The engine: samples in from any thread, scores out.

A request is checked and let in on its caller's thread. The launcher thread batches and dispatches,
the completion thread waits for the device and answers; see `launcher` and `completion`.
"""

import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Self

import numpy as np

from recflow_jax.backend import Backend, choose_backend
from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.berths import Berth, Berths, Room
from recflow_jax.engine.clock import now_us
from recflow_jax.engine.closing import Closing
from recflow_jax.engine.completion import Completion
from recflow_jax.engine.errors import DeadlineExceeded, EngineError
from recflow_jax.engine.heap import HEAP
from recflow_jax.engine.intake import fills, is_large, is_to_berth, new_request, prepare
from recflow_jax.engine.launcher import Launcher
from recflow_jax.engine.ledger import Ledger
from recflow_jax.engine.messages import Close, Flight, Inbox, Passed, Written
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.pieces import PIECES_WAITING, predict_in_pieces
from recflow_jax.engine.planning import pipeline_config, plans_of, policy_of
from recflow_jax.engine.prepared import FindRoom, Prepared, Preparer
from recflow_jax.engine.profiles import IdleTimes, load_profile
from recflow_jax.engine.segments import Segments
from recflow_jax.engine.stats import EngineStats, Tally, Waits
from recflow_jax.engine.switching import SWITCH_INTERVAL
from recflow_jax.engine.terms import Sparse, Terms
from recflow_jax.engine.updates import Update, new_rows
from recflow_jax.model import Params
from scheduling.planner import Plans
from scheduling.request import Request, SliceBucket
from scheduling.serial_batching import Collecting
from scheduling.table import ProfileTable


class Engine(Closing):
    """Scores samples with incremental batching: no request waits for a batch to fill.

    Compiles every size at start, and nothing after. `profile` is a profile table of this device
    and model: by it the engine plans which embedding work runs inside which segment, and rejects
    at once a request that it could not answer in time even if idle. Without one, embeddings and
    MLPs run one after the other.
    progress: show a bar while compiling (None: on a terminal, if it takes over two seconds).
    Raises BackendError, ProfileTableError, and ValueError for parameters of another model.

    Any thread may call. Answers equal `model.forward`'s up to rounding; the same samples in a batch
    of the same composition and bucket give the same bits, other batches may round differently.
    """

    def __init__(
        self,
        config: DLRMConfig,
        params: Params,
        *,
        options: EngineOptions | None = None,
        profile: str | Path | ProfileTable | None = None,
        progress: bool | None = None,
    ) -> None:
        options = options or EngineOptions()
        segments = Segments(config, params, choose_backend(options.backend), options)
        table = None if profile is None else load_profile(profile, segments)
        plans = plans_of(segments, options, table)
        segments.compile_all(progress, cuts=plans.cuts, co_runs=plans.co_runs)
        self._start(segments, options, plans, table, profile)
        self._set_python_up()

    @classmethod
    def from_segments(
        cls,
        segments: Segments,
        *,
        profile: str | Path | ProfileTable | None = None,
        batching: Literal["incremental"] | Collecting | None = None,
    ) -> Self:
        """An engine on segments that are shared or compiled already; compiles what is missing.

        batching: instead of what the segments' options say.
        """
        engine = cls.__new__(cls)
        options = replace(segments.options, batching=batching or segments.options.batching)
        table = None if profile is None else load_profile(profile, segments)
        plans = plans_of(segments, options, table)
        segments.compile_all(cuts=plans.cuts, co_runs=plans.co_runs)
        engine._start(segments, options, plans, table, profile)
        engine._set_python_up()
        return engine

    def _start(
        self,
        segments: Segments,
        options: EngineOptions,
        plans: Plans,
        table: ProfileTable | None,
        profile: str | Path | ProfileTable | None,
    ) -> None:
        self._segments = segments
        self._options = options
        self._largest_slice = pipeline_config(segments, plans).largest_slice
        max_ids = self.max_ids_per_sample
        self._preparer = Preparer(segments.config, segments.layout, max_ids=max_ids)
        self._berths = _berths(segments, self._largest_slice)
        self._idle_times = None if table is None else IdleTimes(table, segments)
        self._profile = None if table is None else _profile_name(table, profile)
        self._request_ids = itertools.count()
        self._tally = Tally(self.options.latency_window)
        policy = policy_of(segments, options, plans)
        self._inbox = inbox = Inbox()
        flights = SimpleQueue[Flight | Written | Passed | None]()
        self._ledger = Ledger(
            max_samples=self.options.max_queued_samples,
            inbox=inbox,
            tally=self._tally,
        )
        shared = {"inbox": inbox, "flights": flights, "ledger": self._ledger, "tally": self._tally}
        self._threads = [
            _started("launcher", Launcher(segments, policy, **shared).run),
            _started("completion", Completion(segments.staging, self._preparer, **shared).run),
        ]
        # An engine that is forgotten, or still open when Python ends, takes its threads with it.
        self._end = weakref.finalize(self, _close, self._ledger, self._threads, drain=False)

    def _set_python_up(self) -> None:
        """What the options ask of this process's Python, until the engine is closed or gone."""
        self._thaw = HEAP.freeze(self) if self.options.freeze_heap else None
        interval_ms = self.options.switch_interval_ms
        self._restore_switching = (
            SWITCH_INTERVAL.shorten(self, interval_ms / 1000) if interval_ms is not None else None
        )

    @property
    def config(self) -> DLRMConfig:
        """The model."""
        return self._segments.config

    @property
    def options(self) -> EngineOptions:
        """What the engine was told."""
        return self._options

    @property
    def largest_slice(self) -> SliceBucket:
        """What a slice has room for at most."""
        return self._largest_slice

    @property
    def slice_length(self) -> int:
        """int32 elements of the buffer of the largest slice."""
        return self._segments.staging.shape(self._largest_slice).length

    @property
    def max_ids_per_sample(self) -> int:
        """Of all features together, at most."""
        return min(self._segments.max_ids_per_sample, self._largest_slice.ids)

    @property
    def max_queued_samples(self) -> int:
        """Accepted and not yet answered, at most."""
        return self.options.max_queued_samples

    @property
    def is_crowded(self) -> bool:
        """Whether more waited, when it last launched, than one batch takes."""
        return self._inbox.is_crowded

    @property
    def backend(self) -> Backend:
        """Which kernels run, and why."""
        return self._segments.backend

    @property
    def backend_name(self) -> str:
        """Of `backend`."""
        return self.backend.name

    def submit(
        self,
        dense: Any,
        sparse: Sparse | None = None,
        *,
        deadline_ms: float | None = None,
        priority: int = 0,
    ) -> Answer:
        """Queues samples; waits for no other request, only for what is being launched, 5 ms at
        most. Takes a JaggedBatch, or what JaggedBatch.from_features does.

        The caller's arrays are free at once: what can be written to is copied, other arrays (as
        JaggedBatch.frozen has) are to stay as they are. Lower priorities run first.
        Raises InputError, QueueFull, EngineClosed, and DeadlineExceeded if `deadline_ms` from now
        is known to be too soon. The answer raises DeadlineExceeded if the deadline passes before
        the launch, or before the answer is there: an answer is never late; and InputError for bad
        ids and floats of a JaggedBatch whose bags are fixed: the device looks at these meanwhile.
        """
        terms = Terms.of(now_us(), deadline_ms, priority)
        self._ledger.expect(dense.samples if isinstance(dense, JaggedBatch) else length_hint(dense))
        find_room, has_berths = None, False
        try:
            wants_berth = is_to_berth(dense, slice_ids=self._largest_slice.ids)
            if is_large(dense):
                find_room = self._large_room if wants_berth else None
            else:
                self._inbox.caller_enters()
                if self._berths and wants_berth and self._inbox.may_berth():
                    find_room, has_berths = self._berths.room, True
            most = self._options.max_queued_samples
            samples = self._prepared(
                dense, sparse, most=most, checks_later=True, find_room=find_room
            )
            return self._enter(samples, terms)
        finally:
            if has_berths:
                self._inbox.leave_berths()
            self._inbox.caller_leaves()

    def submit_in_place(
        self,
        dense: np.ndarray,
        berth: Berth,
        *,
        weights: np.ndarray | None = None,
        priority: int = 0,
    ) -> Answer:
        """As `submit`, of samples of a model with fixed bags whose ids lie in a berth already, from
        its start on: there they stay, so nobody is to write to it before the answer is there.
        """
        terms = Terms.of(now_us(), None, priority)
        self._ledger.expect(len(dense))
        try:
            samples = self._preparer.prepare_in_place(dense, weights, berth)
        except InputError:
            self._tally.rejected("input")
            raise
        return self._enter(samples, terms)

    def predict(self, dense: Any, sparse: Sparse | None = None) -> np.ndarray:
        """Scores (logits), float32 [n, outputs], of any number of samples; waits for them.

        The caller's arrays must not change meanwhile. Raises InputError, QueueFull if others fill
        the queue, EngineClosed, StepFailed, and EngineError in a callback of an answer.
        """
        if threading.current_thread() in self._threads:
            raise EngineError("predict would wait for its own thread: use submit in callbacks")
        samples = self._prepared(dense, sparse)
        most = self.options.max_queued_samples
        if samples.samples <= most:
            return self._enter_now(samples).result()
        size = max(most // PIECES_WAITING, 1)
        return predict_in_pieces(samples, size, self.config.outputs, self._enter_now)

    def update_rows(self, table: str, ids: Any, values: Any) -> Future[None]:
        """Changes rows of a table between batches; never waits for them. ids: integers [k]; values:
        floats [k, dim], rounded as loading them does; of an id that comes twice the last counts.

        What is submitted after this returns is scored with the new rows, or with newer ones; no
        request and no batch is scored with some of them alone. The future is done when they are on
        the device; wait for it before the next one of many, as each holds its rows there. It raises
        StepFailed or EngineClosed, cannot be cancelled, and is not to be waited for in callbacks of
        answers.
        Raises InputError, EngineClosed, and EngineError without `options.max_update_rows`.
        """
        sizes = self.options.update_sizes
        if not sizes:
            raise EngineError("rows do not change here: the option max_update_rows is not set")
        segments = self._segments
        rows = new_rows(segments.config, segments.layout, table, ids, values, sizes=sizes)
        update = Update(rows)
        self._ledger.pass_on(update)
        return update.done

    def stats(self) -> EngineStats:
        """What was accepted, answered, rejected, launched so far, and how long that took."""
        return self._tally.stats(
            accepted=self._ledger.accepted,
            queued_samples=self._ledger.samples,
            backend=self.backend.name,
            backend_reason=self.backend.reason,
            profile=self._profile,
        )

    def waits(self) -> Waits:
        """How long each of the last `options.latency_window` requests waited for its launch."""
        return self._tally.waits()

    def close(self, drain: bool = True) -> None:
        """Accepts nothing more; waits until the threads have ended. May be called again.

        drain: first answer all that was accepted; else what is not answered raises EngineClosed.
        In a callback of an answer it does not wait.
        """
        self._end_threads(drain=drain)
        for restore in (self._thaw, self._restore_switching):
            if restore is not None:
                restore()

    def _end_threads(self, *, drain: bool = True) -> None:
        _close(self._ledger, self._threads, drain=drain)

    def _prepared(
        self,
        dense: Any,
        sparse: Sparse | None,
        *,
        most: int | None = None,
        checks_later: bool = False,
        find_room: FindRoom | None = None,
    ) -> Prepared:
        try:
            samples = prepare(
                self._preparer, dense, sparse, checks_later=checks_later, find_room=find_room
            )
            if most is not None and samples.samples > most:
                raise InputError(
                    f"{samples.samples} samples are more than the queue ever holds, {most}; "
                    "predict takes any number"
                )
            return samples
        except InputError:
            self._tally.rejected("input")
            raise

    def _large_room(self, ids: int) -> Room | None:
        """Kept at once: others use berths while it is filled."""
        if not self._berths or not self._inbox.may_berth():
            return None
        try:
            alone = fills(ids, self._largest_slice.ids)
            room = self._berths.room(ids, only_free=True, alone=alone)
            if room is not None:
                room.keep()
            return room
        finally:
            self._inbox.leave_berths()

    def _enter_now(self, samples: Prepared) -> Answer:
        return self._enter(samples, Terms(arrived_us=now_us()))

    def _enter(self, samples: Prepared, terms: Terms) -> Answer:
        if not samples.samples:
            return Answer.of_no_samples(self.config.outputs)
        ended = self._tally.steps_ended
        submitted = new_request(next(self._request_ids), samples, terms, steps_ended=ended)
        if terms.deadline_us is not None:
            self._check_deadline(submitted.request, terms.deadline_us)
        return self._ledger.accept(submitted)

    def _check_deadline(self, request: Request, deadline_us: int) -> None:
        times = self._idle_times
        needed_us = times.least_us(request.samples, request.ids) if times else 0
        left_us = deadline_us - now_us()
        if left_us > needed_us:
            return
        self._tally.rejected("deadline")
        if left_us <= 0:
            raise DeadlineExceeded(f"the deadline passed {-left_us / 1000:.3f} ms ago")
        raise DeadlineExceeded(
            f"{left_us / 1000:.3f} ms are left to the deadline, the request takes "
            f"{needed_us / 1000:.3f} ms at least"
        )


def _berths(segments: Segments, largest: SliceBucket) -> Berths | None:
    """None for a model without fixed bags."""
    if not segments.config.fixed_bags:
        return None
    ids = min(largest.ids, largest.samples * sum(segments.config.fixed_bags))
    shape = segments.staging.shape(largest)
    berths = Berths(ids=ids, length=shape.length, dense_at=shape.places["dense"].start)
    berths.reserve(segments.options.max_steps_in_flight + 2)  # one waits, one is being filled
    return berths


def _started(name: str, run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, name=f"recflow-{name}", daemon=True)
    thread.start()
    return thread


def _close(ledger: Ledger, threads: list[threading.Thread], *, drain: bool) -> None:
    ledger.shut(Close(drain))
    if threading.current_thread() not in threads:
        for thread in threads:
            thread.join()


def _profile_name(table: ProfileTable, profile: Any) -> str:
    return f"{table.model} on {table.device}" if profile is table else str(profile)
