"""What `Engine.submit` gives back: the scores to come."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Self

import numpy as np


class Answer(Future[np.ndarray]):
    """The scores of one request, float32 [samples, outputs]: `.result()`, or await it.

    `.cancel()` works until the answer is there: what of the request still waits is dropped. Raises
    DeadlineExceeded, EngineClosed or StepFailed where that came first, and InputError where samples
    are looked at after they were let in. Callbacks run on a thread of the engine: they should be
    short, and must not wait for another answer.
    """

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._on_cancel = on_cancel

    @classmethod
    def of_no_samples(cls, outputs: int) -> Self:
        """One that is there."""
        answer = cls()
        answer.set_result(np.zeros((0, outputs), np.float32))
        return answer

    def cancel(self) -> bool:
        """Gives the request up; False if its answer is there already."""
        cancelled = super().cancel()
        if cancelled and self._on_cancel is not None:
            self._on_cancel()
        return cancelled

    def __await__(self) -> Generator[Any, None, np.ndarray]:
        return asyncio.wrap_future(self).__await__()


def settle(settle: Callable[[Any], None], outcome: Any) -> None:
    """A caller's callback may raise even SystemExit: that must not end the engine's thread."""
    try:
        settle(outcome)
    except BaseException:
        pass
