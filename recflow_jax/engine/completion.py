"""The thread that waits for the device: results in, answers out."""

from queue import SimpleQueue

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.engine.answer import settle
from recflow_jax.engine.clock import now_us
from recflow_jax.engine.errors import StepFailed
from recflow_jax.engine.launcher import fail_step, fail_update
from recflow_jax.engine.ledger import Ledger
from recflow_jax.engine.messages import Fault, Flight, Inbox, Passed, Written
from recflow_jax.engine.prepared import Preparer
from recflow_jax.engine.staging import Staging
from recflow_jax.engine.stats import Tally
from scheduling.pipeline import StepDone


class Completion:
    """Waits for each step in the order of launch, and brings the scores to those who asked."""

    def __init__(
        self,
        staging: Staging,
        preparer: Preparer,
        *,
        inbox: Inbox,
        flights: SimpleQueue[Flight | Written | Passed | None],
        ledger: Ledger,
        tally: Tally,
    ) -> None:
        self._staging = staging
        self._preparer = preparer
        self._inbox = inbox
        self._flights = flights
        self._ledger = ledger
        self._tally = tally

    def run(self) -> None:
        """Until the launcher says that there is no more."""
        while (flight := self._flights.get()) is not None:
            if isinstance(flight, Passed):
                flight.set()
                continue
            if isinstance(flight, Written):
                self._finish_update(flight)
                continue
            try:
                self._finish(flight)
            except Exception as error:
                self._fail(flight, error)

    def _finish_update(self, written: Written) -> None:
        update = written.update
        try:
            written.landed.block_until_ready()
        except Exception as error:
            fail_update(update, StepFailed, "the rows could not be written", error)
        else:
            self._tally.updated(update.rows.count)
            settle(update.done.set_result, None)

    def _finish(self, flight: Flight) -> None:
        """A fault is reported before the end of its step, so that nothing is built on it."""
        is_well, scores = False, None
        try:
            is_well, scores = self._wait(flight)
        except Exception as error:
            self._inbox.put(Fault(error))
            self._fail(flight, error)
        self._tally.ended_step(now_us() - flight.launched_us)
        self._inbox.put(StepDone(step_id=flight.step_id))
        if not is_well:
            self._check(flight)
        if scores is not None:
            self._ledger.add(flight.parts, scores)

    def _check(self, flight: Flight) -> None:
        """Ends what should not have been let in, and was computed for nothing."""
        for one in flight.unchecked:
            try:
                self._preparer.check(one.samples)
            except InputError as error:
                self._ledger.end(one.request.id, error)

    def _wait(self, flight: Flight) -> tuple[bool, np.ndarray | None]:
        """Once the step has ended, whether all samples of its slice are known to be well, and the
        scores on the host; None if it makes none.
        """
        for result in (flight.x, flight.landed):
            if result is not None:
                result.block_until_ready()
        scores = np.asarray(flight.x) if flight.parts else None
        is_well = not flight.unchecked or _are_well(flight, scores)
        if flight.buffer is not None:
            self._staging.give_back(flight.buffer)
        return is_well, scores

    def _fail(self, flight: Flight, fault: Exception) -> None:
        fail_step(self._ledger, (part.request_id for _, part in flight.parts), fault)


def _are_well(flight: Flight, scores: np.ndarray | None) -> bool:
    """Whether the device says so of all samples of the slice; False if it was not launched."""
    if flight.buffer is None:
        return False
    samples = flight.buffer.samples
    if flight.is_whole and scores is not None:
        return flight.buffer.fixed_samples[0] >= 0 and not np.isnan(scores[:samples]).any()
    return flight.landed is not None and bool(np.asarray(flight.landed)[:samples].all())
