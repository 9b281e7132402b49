"""What an engine's threads tell each other.

Callers and the completion thread write to the launcher's inbox; the launcher writes flights and
updates to the completion thread.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event as ThreadEvent
from threading import RLock, get_ident
from typing import Any

from recflow_jax.engine.clock import now_us
from recflow_jax.engine.prepared import Prepared
from recflow_jax.engine.staging import Buffer
from recflow_jax.engine.updates import Update
from scheduling.host_costs import LARGE_IDS, REST_STEP_US
from scheduling.pipeline import Arrive, StepDone
from scheduling.request import Part

LONGEST_WAIT_S = 3600.0
ARRIVALS_TO_WAKE = 32
LONGEST_TURN_S = 0.005


@dataclass(slots=True, kw_only=True, eq=False)
class Submitted(Arrive):
    """A request was accepted, with these samples, when so many steps had ended."""

    samples: Prepared
    steps_ended: int = 0


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nobody waits for this request any more: it was cancelled or has failed."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A step raised on the device: whatever it left there is lost."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Close:
    """End, after all that was accepted is answered (`drain`) or at once."""

    drain: bool


Message = Submitted | Dropped | Fault | Close | StepDone | Update


@dataclass(slots=True, kw_only=True)
class Flight:
    """A launched step: its results, on their way, and whose answers it makes.

    waits: of the requests of which it carries the first samples, from arrival to its launch, in
        microseconds and in steps that ended. unchecked: of all whose samples it carries, those that
        are to be checked. landed: which samples of its slice are known to be well. x: what its
        segment makes, scores where there are parts to answer. is_whole: whether these tell which
        samples of the slice are well (see PackedShape.marked), as all of it is in this batch.
    """

    step_id: int
    launched_us: int
    waits: Sequence[tuple[int, int]] = ()
    unchecked: Sequence[Submitted] = ()
    landed: Any = None
    x: Any = None
    is_whole: bool = False
    parts: tuple[tuple[int, Part], ...] = ()
    buffer: Buffer | None = None


@dataclass(slots=True, kw_only=True)
class Written:
    """A launched update: the array that is ready when its rows have landed."""

    update: Update
    landed: Any


Passed = ThreadEvent
"""Whoever launches waits until all that was launched before has been dealt with."""


class Inbox:
    """The launcher's mail: any thread puts, one thread takes all that is there.

    Putting rings the bell only where that thread sleeps, and would want to know. has_berths: in a
    launch, whether it alone may use berths now. is_crowded: as the launcher says, whether enough
    waits for its next launch.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._asleep = False
        self._has_urgent = False
        self._has_large = False
        self._arrivals_to_wake = 1
        self._callers: set[int] = set()
        self.is_crowded = False
        # A callback may submit on the launcher's own thread.
        self._turn, self._berthing = RLock(), RLock()
        self._launching = False
        self.has_berths = False
        self._aside_us = 0

    def caller_enters(self) -> None:
        """A caller makes a request ready, on this thread, until it leaves; waits for what is being
        launched, but not for long. Python runs one thread at a time: a launch gives its turn away
        several times, and gets it back late from callers who keep on computing.
        """
        self._callers.add(get_ident())
        if self._launching and self._turn.acquire(timeout=LONGEST_TURN_S):
            self._turn.release()

    def caller_leaves(self) -> None:
        """Behind `caller_enters`, on the same thread, whatever came of the request."""
        self._callers.discard(get_ident())

    def may_berth(self) -> bool:
        """Whether this thread alone may use berths, until `leave_berths`; waits for others, but not
        for long.
        """
        return self._berthing.acquire(timeout=LONGEST_TURN_S)

    def leave_berths(self) -> None:
        """Behind a `may_berth` that was granted, on the same thread."""
        self._berthing.release()

    @contextmanager
    def launching(self) -> Iterator[None]:
        """While the launcher launches."""
        self._take_turn()
        try:
            yield
        finally:
            self._leave_turn()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In a launch, while it leaves the interpreter to others: callers go on, unless it is
        crowded, and more requests could wait no less where they are.
        """
        if self.is_crowded:
            yield
            return
        started_us = now_us()
        self._leave_turn()
        try:
            yield
        finally:
            self._take_turn()
            self._aside_us += now_us() - started_us

    def _take_turn(self) -> None:
        self._turn.acquire()
        self._launching = True
        # Callers who use berths now are through soon; the next ones wait for the turn.
        self.has_berths = self._berthing.acquire(timeout=LONGEST_TURN_S)

    def _leave_turn(self) -> None:
        if self.has_berths:
            self.has_berths = False
            self._berthing.release()
        self._launching = False
        self._turn.release()

    def take_aside_us(self) -> int:
        """How long launches were aside since this was asked before."""
        aside_us, self._aside_us = self._aside_us, 0
        return aside_us

    def put(self, message: Message) -> None:
        """Something that the launcher wants to know at once."""
        self._messages.append(message)
        self._has_urgent = True
        self._ring()

    def put_arrival(self, message: Submitted) -> None:
        """A request that may wait for as long as nothing can be launched."""
        self._messages.append(message)
        if message.request.ids >= LARGE_IDS:
            self._has_large = True
        if len(self._messages) >= self._arrivals_to_wake:
            self._ring()

    def wait(self, timeout_s: float | None, *, can_launch: bool = True) -> list[Message]:
        """All messages, as soon as there is one; after `timeout_s` seconds, or rarely, none.

        Unless it `can_launch`, the launcher sleeps until there are several arrivals.
        """
        self._arrivals_to_wake = 1 if can_launch else ARRIVALS_TO_WAKE
        # A message is put before the bell is looked at, and looked for after it is hung up.
        self._asleep = True
        if not self._has_urgent and len(self._messages) < self._arrivals_to_wake:
            self._sleep(timeout_s)
        self._asleep = self._has_urgent = False
        return self.read()

    def read(self) -> list[Message]:
        """All messages that are there."""
        self._has_large = False
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def rest(self, longest_us: int) -> None:
        """Leaves the interpreter to others for so long, but only while messages come, or callers
        make requests; not where it is crowded, and until a large request is there, which is worth a
        launch of its own.
        """
        end_us, seen = now_us() + longest_us, 0
        while not (self.is_crowded or self._has_large):
            if not self._callers and len(self._messages) <= seen:
                return
            left_us = end_us - now_us()
            if left_us <= 0:
                return
            seen = len(self._messages)
            time.sleep(min(left_us, REST_STEP_US) / 1e6)

    def _sleep(self, timeout_s: float | None) -> None:
        if timeout_s is not None:
            timeout_s = min(max(timeout_s, 0), LONGEST_WAIT_S)
        with suppress(Empty):
            self._bell.get(timeout=timeout_s)

    def _ring(self) -> None:
        if self._asleep:
            self._asleep = False
            self._bell.put(None)
