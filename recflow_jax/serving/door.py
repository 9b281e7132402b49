"""Who is inside: so many requests at most, with so many bytes at most, and none that come late."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from recflow_jax.serving.failures import Busy, NotReady
from recflow_jax.serving.tracing import Span


class Door:
    """Counts requests in and out, exactly. Used on the event loop alone."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0
        self.shut = False
        self._empty = asyncio.Event()

    @contextmanager
    def visit(self, arrived_s: float, span: Span) -> Iterator["Visit"]:
        """One request from its way in to its end. Raises Busy, NotReady."""
        self._enter()
        visit = Visit(door=self, arrived_s=arrived_s, span=span)
        try:
            yield visit
        finally:
            self._leave(visit.bytes)

    def _enter(self) -> None:
        if self.shut:
            raise NotReady("the server is about to end")
        if self.requests >= self._max_requests:
            raise Busy(f"{self.requests} requests are inside, as many as are allowed")
        self.requests += 1

    def carry_in(self, size: int) -> None:
        """Lets `size` bytes in. Raises Busy."""
        if self.bytes + size > self._max_bytes:
            raise Busy(
                f"the requests inside have {self.bytes} of {self._max_bytes} bytes, {size} more "
                "do not fit"
            )
        self.bytes += size

    def _leave(self, size: int) -> None:
        self.requests -= 1
        self.bytes -= size
        if not self.requests:
            self._empty.set()

    async def drain(self, timeout_s: float) -> bool:
        """Lets nobody in any more; whether those inside have all gone in time."""
        self.shut = True
        self._empty.clear()
        if not self.requests:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request while it is inside: since when, with how many bytes, and what is told of it."""

    door: Door
    arrived_s: float
    span: Span
    bytes: int = 0

    def carry_in(self, size: int) -> None:
        """So many bytes more, until it leaves. Raises Busy."""
        self.door.carry_in(size)
        self.bytes += size
