"""Threads of one Python process on a virtual clock: one of them computes at a time.

A thread is a generator that yields what it does next: it computes, or it sleeps. As in CPython (see
`sys.setswitchinterval`), one that computes keeps the interpreter until it sleeps, or until another
has waited for the switch interval and seen nobody get it; they get it in the order in which they
asked.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Compute:
    """For so many microseconds of its own, with the interpreter."""

    us: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Without the interpreter, until this time or until it is woken; then it asks for it again. It
    keeps it if the time has come.
    """

    until_us: float = math.inf


@dataclass(slots=True, eq=False)
class Thread:
    """One that was started. left_us: of what it computes. event: the number of the last one that is
    to move it on; those before it have been overtaken.
    """

    does: Iterator[Compute | Sleep]
    sleeps: bool = True
    left_us: float = 0.0
    event: int | None = None


class Interpreter:
    """Runs threads until all have ended, or sleep for good. switch_us: the switch interval."""

    def __init__(self, switch_us: float) -> None:
        self.now_us = 0.0
        self._switch_us = switch_us
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Thread]] = []
        self._asking: deque[tuple[float, Thread]] = deque()
        self._holder: Thread | None = None
        self._given_us = 0.0  # when the holder got it
        self._end_us = 0.0  # of what it computes, if it is left alone

    def start(self, does: Iterator[Compute | Sleep]) -> Thread:
        """A thread that asks for the interpreter now."""
        thread = Thread(does)
        self._ask(thread)
        return thread

    def wake(self, thread: Thread) -> None:
        """Ends its sleep, if it sleeps."""
        if thread.sleeps:
            self._expect(thread, self.now_us)

    def run(self) -> None:
        """Raises what a thread raises."""
        while self._events:
            at_us, number, thread = heapq.heappop(self._events)
            if number != thread.event:
                continue
            self.now_us = at_us
            if thread is not self._holder:
                self._ask(thread)
            elif at_us < self._end_us:
                thread.left_us = self._end_us - at_us
                self._asking.append((at_us, thread))
                self._let_go()
            else:
                self._go_on(thread)

    def _expect(self, thread: Thread, at_us: float) -> None:
        """That it is moved on then, and not before."""
        thread.event = next(self._numbers)
        heapq.heappush(self._events, (at_us, thread.event, thread))

    def _ask(self, thread: Thread) -> None:
        thread.sleeps, thread.left_us = False, 0.0
        self._asking.append((self.now_us, thread))
        if self._holder is None:
            self._let_go()
        elif len(self._asking) == 1:
            self._expect_turn(self._holder)

    def _let_go(self) -> None:
        """Whoever has asked first has the interpreter."""
        self._holder = None
        if self._asking:
            _, thread = self._asking.popleft()
            self._holder, self._given_us = thread, self.now_us
            if thread.left_us:
                self._compute(thread, thread.left_us)
            else:
                self._go_on(thread)

    def _go_on(self, thread: Thread) -> None:
        """Until it computes, sleeps or ends."""
        for doing in thread.does:
            if isinstance(doing, Compute):
                if doing.us:
                    return self._compute(thread, doing.us)
            elif doing.until_us > self.now_us:
                thread.sleeps = True
                if doing.until_us < math.inf:
                    self._expect(thread, doing.until_us)
                break
        self._let_go()

    def _compute(self, thread: Thread, us: float) -> None:
        self._end_us = self.now_us + us
        self._expect_turn(thread)

    def _expect_turn(self, holder: Thread) -> None:
        """It computes on until it is done, or has kept another waiting."""
        at_us = self._end_us
        if self._asking:
            asked_us, _ = self._asking[0]
            at_us = min(at_us, max(asked_us, self._given_us) + self._switch_us)
        self._expect(holder, at_us)
