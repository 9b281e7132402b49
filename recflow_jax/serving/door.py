"""Who is inside: so many requests at most, with so many bytes at most, and none that come late."""

import asyncio
from types import TracebackType
from typing import Self

from recflow_jax.serving.failures import Busy, NotReady


class Door:
    """Counts requests in and out, exactly. Used on the event loop alone."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0
        self.shut = False
        self._empty = asyncio.Event()

    def enter(self) -> None:
        """Lets a request in. Raises Busy, NotReady."""
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

    def leave(self, size: int) -> None:
        """A request goes, with its bytes."""
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


class Stay:
    """One request inside, with its bytes, as a context. Entering raises Busy, NotReady."""

    def __init__(self, door: Door) -> None:
        self.bytes = 0
        self._door = door

    def __enter__(self) -> Self:
        self._door.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._door.leave(self.bytes)

    def carry_in(self, size: int) -> None:
        """So many bytes more, until it leaves. Raises Busy."""
        self._door.carry_in(size)
        self.bytes += size
