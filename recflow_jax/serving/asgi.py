"""The HTTP side of one exchange: a body within limits in, a response out."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.responses import Response

from recflow_jax.serving.door import Stay
from recflow_jax.serving.failures import ClientGone, TooLarge, TooSlow, failure_of, message_of

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]


async def read_body(
    receive: Receive, headers: dict[bytes, bytes], stay: Stay, *, most: int, within_s: float
) -> bytes:
    """The whole body, which `stay` carries in. Raises TooLarge, TooSlow, Busy, ClientGone."""
    announced = int(headers.get(b"content-length", b"0"))  # the HTTP parser lets nothing else by
    if announced > most:
        raise TooLarge(f"the request has {announced} bytes, at most {most} are allowed")
    try:
        async with asyncio.timeout(within_s):
            return await _joined(receive, stay, most)
    except TimeoutError:
        raise TooSlow(f"the request did not come within {within_s:g} s") from None


async def _joined(receive: Receive, stay: Stay, most: int) -> bytes:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was complete")
        chunks.append(message["body"])
        more = message["more_body"]
        stay.carry_in(len(chunks[-1]))
        if stay.bytes > most:
            raise TooLarge(f"the request has more than the {most} bytes that are allowed")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def respond(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Sends a whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def respond_error(send: Send, error: Exception, *, retry_after_s: int) -> None:
    """Sends what a client is told of an error; what it may still be sending is not waited for."""
    failure = failure_of(error)
    headers = list(JSON)
    if failure.retry:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if failure.http == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if failure.http in (408, 413):
        headers.append((b"connection", b"close"))
    await respond(send, failure.http, orjson.dumps({"error": message_of(error)}), headers)


class ErrorResponse(Response):
    """`respond_error` as Starlette wants it."""

    def __init__(self, error: Exception, retry_after_s: int) -> None:
        super().__init__()
        self._error = error
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The whole response."""
        await respond_error(send, self._error, retry_after_s=self._retry_after_s)
