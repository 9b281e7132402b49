"""A whole server: listens, loads, serves, drains."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recflow_jax.serving import heartbeat, listeners
from recflow_jax.serving.background import in_thread
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.served import Served
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")

Load = Callable[[], Served]


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a server listens."""

    http: int
    grpc: int | None


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a server ended. drained: all that was accepted was answered. quiet: no thread of the
    engine, or of its loading, is left. stopped: because it was told to; else the engine, that of
    another process, was gone.
    """

    drained: bool
    quiet: bool
    stopped: bool = True


class Server:
    """Serves the engine that `load` makes, under a name (None: its model's) and a version.

    repository: other versions, which clients may load in its place; None: they may not. front_ends:
    a path where front ends find the engine.
    """

    def __init__(
        self,
        load: Load,
        *,
        name: str | None = None,
        version: str = "1",
        options: ServerOptions,
        repository: Repository | None = None,
        front_ends: Path | None = None,
    ) -> None:
        self._load = load
        self._front_ends = front_ends
        self._version = version
        self._service = Service(options, name=name, repository=repository)

    async def run(
        self, stop: asyncio.Event, on_listening: Callable[[Ports], None] | None = None
    ) -> Ending:
        """Until `stop` is set, or the engine of another process is gone, and what was accepted is
        answered. Raises OSError for ports and paths that are taken, and whatever `load` raises.

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
            with self._letting_in():
                if loaded:
                    await self._beat_until(stop)
                door = self._service.door
                log.info("draining", extra={"inside": door.requests})
                drained = await door.drain(drain_s)
            quiet = await self._service.control.close(drain=drained) and loaded
        log.info("ended", extra={"drained": drained})
        return Ending(drained=drained, quiet=quiet, stopped=stop.is_set())

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
        log.info("ready", extra={"model": model.name, "backend": model.engine.backend_name})
        return True

    def _letting_in(self) -> AbstractContextManager[Any]:
        """Front ends, as long as there are to be any."""
        model = self._service.control.model
        if self._front_ends is None or model is None:
            return nullcontext()
        # With JAX: front ends are let in where the engine is.
        from recflow_jax.engine.engine import Engine
        from recflow_jax.remote.front_ends import FrontEnds

        if not isinstance(model.engine, Engine):
            return nullcontext()
        return FrontEnds(model.engine, self._front_ends)

    async def _beat_until(self, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait())
        beating = asyncio.create_task(heartbeat.watch(self._service))
        await asyncio.wait([stopping, beating], return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, beating):
            task.cancel()
