"""A server on a thread of its own, on free ports, for as long as a test needs it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx
import uvloop

from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.served import Served
from recflow_jax.serving.server import Ending, Ports, Server

SOON_S = 60
FREE_PORTS: dict[str, Any] = {"http_port": 0, "grpc_port": 0}


class RunningServer:
    """What a test needs of it: addresses, a way to stop it, and how it ended."""

    def __init__(
        self, load: Callable[[], Served], repository: Repository | None = None, **options: Any
    ) -> None:
        self._ports: Future[Ports] = Future()
        self._ending: Future[Ending] = Future()
        told = ServerOptions(**FREE_PORTS | options)
        self._server = Server(load, options=told, repository=repository)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        ports = self._ports.result(SOON_S)
        scheme = "https" if "tls_certificate" in options else "http"
        self.http = f"{scheme}://127.0.0.1:{ports.http}"
        self.http_address = f"127.0.0.1:{ports.http}"
        self.grpc_address = f"127.0.0.1:{ports.grpc}"

    def wait_until_ready(self) -> None:
        with httpx.Client(base_url=self.http) as client:
            wait_for(lambda: client.get("/v2/health/ready").status_code == 200)

    def stop(self) -> None:
        if not self._ending.done():
            self._loop.call_soon_threadsafe(self._stop.set)

    def ending(self) -> Ending:
        return self._ending.result(SOON_S)

    def _run(self) -> None:
        try:
            self._ending.set_result(uvloop.run(self._main()))
        except BaseException as error:
            self._ending.set_exception(error)
            if not self._ports.done():
                self._ports.set_exception(error)

    async def _main(self) -> Ending:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        return await self._server.run(self._stop, self._ports.set_result)


def wait_for(holds: Callable[[], bool]) -> None:
    """Asks until it does; fails after a minute."""
    tries = threading.Event()
    for _ in range(SOON_S * 100):
        if holds():
            return
        tries.wait(0.01)
    raise AssertionError("it never came to pass")


@contextmanager
def serving(
    load: Callable[[], Served], repository: Repository | None = None, **options: Any
) -> Iterator[RunningServer]:
    """A server that is ready, and stopped at the end if the test has not done so."""
    server = RunningServer(load, repository, **options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
        server.ending()
