"""uvicorn as this server needs it: no signals taken, no connection that waits for ever."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10  # for a new connection, and from a request's first byte to its last header
HEADERS_BYTES = 2**16
LOST, CALL = "recflow.lost", "call"


class UvicornServer(uvicorn.Server):
    """Leaves signals to the one who runs both listening ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


class Connection(HttpToolsProtocol):
    """Closed if headers do not come in time, or never end; uvicorn itself waits for ever.

    A request's scope has, as extensions[LOST][CALL], a function that takes what to call when the
    client leaves, or None: cheaper than a task that waits for uvicorn to say so.
    """

    _due: asyncio.TimerHandle | None = None
    _bytes = 0
    _on_lost: Callable[[], None] | None = None

    def connection_made(self, transport: Any) -> None:
        """The first request is awaited."""
        super().connection_made(transport)
        self._due = self.loop.call_later(HEADERS_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Counts what comes before the last header."""
        super().data_received(data)
        if self._due is not None:
            self._bytes += len(data)
            if self._bytes > HEADERS_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        """A later request has begun."""
        super().on_message_begin()
        self.scope["extensions"] = {LOST: {CALL: self._call_when_lost}}
        if self._due is None:
            self._due = self.loop.call_later(HEADERS_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """The request's body has its own limit."""
        self._forget()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is awaited, or wanted."""
        self._forget()
        if self._on_lost is not None:
            self._on_lost()
        super().connection_lost(exc)

    def _call_when_lost(self, function: Callable[[], None] | None) -> None:
        self._on_lost = function

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due, self._bytes = None, 0
