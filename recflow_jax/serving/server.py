"""A whole server: listens, loads, serves, drains."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from recflow_jax.engine.engine import Engine
from recflow_jax.serving import heartbeat, listeners
from recflow_jax.serving.background import in_thread
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")

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
    """Serves the engine that `load` makes, under a name (None: its model's) and a version.

    repository: other versions, which clients may load in its place; None: they may not.
    """

    def __init__(
        self,
        load: Load,
        *,
        name: str | None = None,
        version: str = "1",
        options: ServerOptions,
        repository: Repository | None = None,
    ) -> None:
        self._load = load
        self._version = version
        self._service = Service(options, name=name, repository=repository)

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
            loaded = await self._load_before(stop)
            if loaded:
                await self._beat_until(stop)
            door = self._service.door
            log.info("draining", extra={"inside": door.requests})
            drained = await door.drain(drain_s)
            quiet = await self._service.control.close(drain=drained) and loaded
        log.info("ended", extra={"drained": drained})
        return Ending(drained=drained, quiet=quiet)

    async def _load_before(self, stop: asyncio.Event) -> bool:
        """Puts the model into service; whether that came before the stop."""
        stopping, loading = asyncio.create_task(stop.wait()), in_thread(self._load, "recflow-load")
        await asyncio.wait([stopping, loading], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            return False
        control = self._service.control
        model = control.served(loading.result(), self._version)
        control.serve(model)
        log.info("ready", extra={"model": model.name, "backend": model.engine.backend.name})
        return True

    async def _beat_until(self, stop: asyncio.Event) -> None:
        beating = asyncio.create_task(heartbeat.watch(self._service))
        await stop.wait()
        beating.cancel()
