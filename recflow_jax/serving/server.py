"""A whole server: listens, loads, serves, drains."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from recflow_jax.engine.engine import Engine
from recflow_jax.serving import heartbeat, listeners
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Landing
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")

CLOSING_S = 2  # the engine is idle by then, or its device hangs

Load = Callable[[], Engine]


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a server listens."""

    http: int
    grpc: int | None


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a server ended. drained: all that was accepted was answered. quiet: no thread of the
    engine, or of its loading, is left.
    """

    drained: bool
    quiet: bool


class Server:
    """Serves the engine that `load` makes, under a name (None: its model's) and a version."""

    def __init__(
        self, load: Load, *, name: str | None = None, version: str = "1", options: ServerOptions
    ) -> None:
        self._load = load
        self._name = name
        self._version = version
        self._service = Service(options)

    async def run(
        self, stop: asyncio.Event, on_listening: Callable[[Ports], None] | None = None
    ) -> Ending:
        """Until `stop` is set, and what was accepted is answered. Raises OSError for ports that
        are taken, and whatever `load` raises.

        It listens while it loads, and says that it is not ready.
        """
        drain_s = self._service.options.drain_s
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(listeners.http(self._service))
            grpc = await stack.enter_async_context(listeners.grpc_aio(self._service))
            log.info("listening", extra={"http_port": http, "grpc_port": grpc})
            if on_listening is not None:
                on_listening(Ports(http=http, grpc=grpc))
            loading = _in_thread(self._load, "recflow-load")
            engine = await self._serve(loading, stop)
            door = self._service.door
            log.info("draining", extra={"inside": door.requests})
            drained = await door.drain(drain_s)
            quiet = engine is not None and await _close(engine, drain=drained)
        log.info("ended", extra={"drained": drained})
        return Ending(drained=drained, quiet=quiet)

    async def _serve(self, loading: "asyncio.Future[Engine]", stop: asyncio.Event) -> Engine | None:
        """Until the stop; the engine, unless that came first."""
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, loading], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return None
        engine = loading.result()
        landing = Landing(asyncio.get_running_loop())
        name = self._name or engine.config.name
        model = ServedModel(
            engine,
            name=name,
            version=self._version,
            landing=landing,
            max_body_bytes=self._service.options.max_body_bytes,
        )
        self._service.serve(model)
        log.info("ready", extra={"model": name, "backend": engine.backend.name})
        beating = asyncio.create_task(heartbeat.watch(self._service, model))
        await stopping
        beating.cancel()
        return engine


async def _close(engine: Engine, *, drain: bool) -> bool:
    """Whether the engine's threads have ended in time: not if its device hangs.

    What is still inside then fails, so that its clients are told.
    """
    closing = _in_thread(partial(engine.close, drain=drain), "recflow-close")
    done, _ = await asyncio.wait([closing], timeout=CLOSING_S)
    return bool(done)


def _in_thread(function: Callable[[], Any], name: str) -> "asyncio.Future[Any]":
    """Runs `function` on a thread that keeps no process alive, as an executor's would."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(future)
