"""Clients that cost little: requests encoded ahead, many connections, their own event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import grpc.aio
import httptools
import numpy as np
import uvloop

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.closing import Closing
from recflow_jax.engine.errors import DeadlineExceeded, QueueFull
from recflow_jax.measure.encoded import grpc_request, http_request, packed_tensors
from recflow_jax.serving.rpc_messages import MESSAGES, SERVICE

HEADER_LENGTH = b"inference-header-content-length"
REFUSED = {429: QueueFull, 504: DeadlineExceeded}
REFUSED_BY_GRPC = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


class ServerError(RuntimeError):
    """A server that answered otherwise than it should."""


class Client(Closing):
    """Takes requests as `Engine.submit` does. Only those that were given to it at first.

    Answers raise QueueFull and DeadlineExceeded as the engine's do, and ServerError.
    """

    def __init__(self, encoded: dict[int, bytes], outputs: int) -> None:
        self._encoded = encoded
        self._outputs = outputs
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._open()).result()

    def submit(self, batch: JaggedBatch) -> Future[np.ndarray]:
        """Sends a request; never waits."""
        return self._run(self._ask(self._encoded[id(batch)]))

    def close(self) -> None:
        """Ends the connections and the loop's thread."""
        self._run(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> None:
        raise NotImplementedError

    async def _close(self) -> None:
        raise NotImplementedError

    async def _ask(self, request: bytes) -> np.ndarray:
        raise NotImplementedError

    def _scores(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, "<f4").reshape(-1, self._outputs)


class HttpClient(Client):
    """Over so many connections; a request waits while all are busy."""

    def __init__(
        self,
        port: int,
        path: str,
        requests: Sequence[JaggedBatch],
        *,
        outputs: int,
        connections: int = 64,
    ) -> None:
        self._port = port
        self._connections = connections
        self._idle: asyncio.Queue[_Connection] = asyncio.Queue()
        super().__init__({id(r): http_request(path, packed_tensors(r)) for r in requests}, outputs)

    async def _open(self) -> None:
        for _ in range(self._connections):
            self._idle.put_nowait(await self._connected())

    async def _connected(self) -> "_Connection":
        _, made = await self._loop.create_connection(_Connection, "127.0.0.1", self._port)
        return made

    async def _close(self) -> None:
        for _ in range(self._connections):
            (await self._idle.get()).close()

    async def _ask(self, request: bytes) -> np.ndarray:
        connection = await self._idle.get()
        try:
            if connection.is_lost:  # servers close those that were idle for long
                connection = await self._connected()
            status, headers, body = await connection.ask(request)
        except asyncio.CancelledError:
            connection.close()  # its answer may still come, and would be taken for the next one's
            raise
        finally:
            self._idle.put_nowait(connection)
        if status != 200:
            raise REFUSED.get(status, ServerError)(f"status {status}: {body.decode()}")
        return self._scores(body[int(headers[HEADER_LENGTH]) :])


class _Connection(asyncio.Protocol):
    """One request at a time. httptools calls the methods that begin with on_."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._answer: asyncio.Future[Any] | None = None
        self.is_lost = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._headers, self._body = {}, []
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.is_lost = True
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ServerError("the server closed the connection"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        assert self._answer is not None
        if not self._answer.done():  # given up, while the answer was on its way
            self._answer.set_result((status, self._headers, b"".join(self._body)))


class GrpcClient(Client):
    """Over a few channels, in turn."""

    def __init__(
        self,
        port: int,
        model: str,
        requests: Sequence[JaggedBatch],
        *,
        outputs: int,
        channels: int = 4,
    ) -> None:
        self._port = port
        self._channels = channels
        super().__init__({id(r): grpc_request(model, packed_tensors(r)) for r in requests}, outputs)

    async def _open(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # else all would share one connection
        self._made = [
            grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=options)
            for _ in range(self._channels)
        ]
        self._methods = deque(c.unary_unary(f"/{SERVICE}/ModelInfer") for c in self._made)

    async def _close(self) -> None:
        for channel in self._made:
            await channel.close()

    async def _ask(self, request: bytes) -> np.ndarray:
        self._methods.rotate()
        try:
            answer = await self._methods[0](request)
        except grpc.aio.AioRpcError as error:
            raise REFUSED_BY_GRPC.get(error.code(), ServerError)(error.details()) from error
        return self._scores(
            MESSAGES["ModelInferResponse"].FromString(answer).raw_output_contents[0]
        )
