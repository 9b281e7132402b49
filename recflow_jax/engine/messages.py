"""What an engine's threads tell each other.

Callers and the completion thread write to the launcher's inbox; the launcher writes flights to
the completion thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from scheduling.pipeline import StepDone
from scheduling.request import Part, Request

LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request was accepted, with these samples."""

    request: Request
    samples: JaggedBatch


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


Message = Submitted | Dropped | Fault | Close | StepDone


@dataclass(slots=True, kw_only=True)
class Flight:
    """A launched step: the arrays that are ready when it has ended, and whose answers it makes."""

    step_id: int
    launched_us: int
    results: list[Any]
    parts: tuple[tuple[int, Part], ...] = ()
    scores: Any = None
    buffer: np.ndarray | None = None


class Inbox:
    """The launcher's mail: any thread puts, one thread takes all that is there."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self.put: Callable[[Message], None] = self._messages.put

    def wait(self, timeout_s: float | None) -> list[Message]:
        """All messages, as soon as there is one; none after `timeout_s` seconds."""
        if timeout_s is not None:
            timeout_s = min(max(timeout_s, 0), LONGEST_WAIT_S)
        messages: list[Message] = []
        try:
            messages.append(self._messages.get(timeout=timeout_s))
            while True:
                messages.append(self._messages.get_nowait())
        except Empty:
            pass
        return messages


def now_us() -> int:
    """The clock of all times and deadlines, in microseconds."""
    return time.monotonic_ns() // 1000
