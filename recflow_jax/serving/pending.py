"""From the engine's threads to the event loop: answers cross together, one wake-up for many."""

import asyncio
from collections import deque

import numpy as np

from recflow_jax.engine.answer import Answer
from recflow_jax.engine.errors import DeadlineExceeded
from recflow_jax.serving.failures import ClientGone


class Landing:
    """Where answers arrive that were made on other threads, for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._landed: deque[Pending] = deque()
        self._awake = False

    def put(self, pending: "Pending") -> None:
        """Called on any thread. Many answers of one batch wake the loop once."""
        self._landed.append(pending)
        if not self._awake:
            self._awake = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False  # first: what is put from here on wakes the loop anew
        while self._landed:
            self._landed.popleft().settle()


class Pending:
    """An answer that a coroutine waits for: until it is there, too late, or given up."""

    def __init__(self, answer: Answer, landing: Landing, timeout_s: float) -> None:
        self._answer = answer
        self._future: asyncio.Future[np.ndarray] = landing.loop.create_future()
        # The engine keeps deadlines itself, unless its device never returns.
        self._timer = landing.loop.call_later(timeout_s, self._expire, timeout_s)
        answer.add_done_callback(lambda _: landing.put(self))

    async def scores(self) -> np.ndarray:
        """float32 [samples, outputs]. Raises what the engine raises, and ClientGone after `cancel`.

        A coroutine that is cancelled here cancels the request.
        """
        try:
            return await self._future
        finally:
            self._timer.cancel()
            self._answer.cancel()

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._fail(ClientGone("the client has gone"))

    def settle(self) -> None:
        """Takes over what the engine has made of the request."""
        if self._future.done():
            return
        if self._answer.cancelled():
            self._fail(ClientGone("the request was cancelled"))
        elif error := self._answer.exception():
            self._fail(error)
        else:
            self._future.set_result(self._answer.result())

    def _expire(self, timeout_s: float) -> None:
        self._fail(DeadlineExceeded(f"no answer came within {1000 * timeout_s:.3f} ms"))

    def _fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)
