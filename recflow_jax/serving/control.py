"""Which version of the model is served: loaded beside the one in use, then put in its place."""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from recflow_jax.serving.background import in_thread
from recflow_jax.serving.failures import Forbidden, LoadFailed
from recflow_jax.serving.metrics import Metrics
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Landing
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.served import Served

log = logging.getLogger("recflow.serving")

CLOSING_S = 2  # an engine is idle by then, or its device hangs


class ModelControl:
    """The model in service and its changes, one at a time. Used on the event loop alone.

    name: what it is served under; None: what its config says. repository: None allows no changes.
    """

    def __init__(
        self,
        options: ServerOptions,
        metrics: Metrics,
        *,
        name: str | None,
        repository: Repository | None,
    ) -> None:
        self.model: ServedModel | None = None
        self.name: str | None = None
        self._given_name = name
        self._options = options
        self._metrics = metrics
        self._repository = repository
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._changing: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def serve(self, model: ServedModel) -> None:
        """Takes requests for `model` from now on."""
        self.model, self.name = model, model.name

    def served(self, engine: Served, version: str) -> ServedModel:
        """An engine as a version of this model."""
        return ServedModel(
            engine,
            name=self._given_name or engine.config.name,
            version=version,
            landing=Landing(asyncio.get_running_loop()),
            max_body_bytes=self._options.max_body_bytes,
        )

    def check_allowed(self) -> Repository:
        """Where versions come from. Raises Forbidden."""
        if self._repository is None:
            raise Forbidden("the model is not to be changed here (--model-control allows it)")
        return self._repository

    async def load(self, version: str = "") -> None:
        """Puts a version ("": the latest) in the place of the one in use, without a gap; returns
        when that has been closed. Raises Forbidden, NoSuchModel, and LoadFailed with all as it was.
        """
        repository = self.check_allowed()
        await self._change(self._load(repository, *repository.find(version)))

    async def unload(self) -> None:
        """Answers what was accepted and lets the engine go. Raises Forbidden."""
        self.check_allowed()
        await self._change(self._unload())

    def index(self, *, ready: bool) -> list[dict[str, str]]:
        """Versions and their states; ready: whether the one in use takes requests."""
        if self.name is None:
            return []
        there = self._repository.versions if self._repository else {}
        states = dict.fromkeys(there, "UNAVAILABLE")
        if self.model is not None:
            states[self.model.version] = "READY" if ready else "UNAVAILABLE"
        return [self._told(version, state) for version, state in (states | self._changing).items()]

    async def close(self, *, drain: bool) -> bool:
        """Whether no thread of an engine, or of its loading, is left."""
        changes = [*self._changes]
        for change in changes:
            change.cancel()
        closed = self.model is None or await _close(self.model.engine, drain, CLOSING_S)
        return closed and not changes

    def _told(self, version: str, state: str) -> dict[str, str]:
        reason = self._reasons.get(version)
        told = {"name": str(self.name), "version": version, "state": state}
        return told | {"reason": reason} if reason else told

    async def _change(self, change: Coroutine[Any, Any, None]) -> None:
        """To its end, even if nobody waits for it any more."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _load(self, repository: Repository, version: str, path: Path) -> None:
        async with self._turn:
            with self._state(version, "LOADING"):
                try:
                    engine = await in_thread(partial(repository.load, path), "recflow-load")
                except Exception as error:
                    raise self._failed(version, error) from error
            self._reasons.pop(version, None)
            await self._switch(self.served(engine, version))
            self._metrics.changed("loaded")
            log.info("loaded", extra={"version": version})

    async def _unload(self) -> None:
        async with self._turn:
            if self.model is not None:
                await self._switch(None)
                self._metrics.changed("unloaded")
                log.info("unloaded")

    async def _switch(self, model: ServedModel | None) -> None:
        """All requests from here on are for `model`; those before are answered by the other."""
        before, self.model = self.model, model
        if before is None:
            return
        with self._state(before.version, "UNLOADING"):
            if not await _close(before.engine, True, self._options.drain_s):
                log.warning("closing without answers", extra={"version": before.version})
                await _close(before.engine, False, CLOSING_S)

    def _failed(self, version: str, error: Exception) -> LoadFailed:
        self._reasons[version] = f"{type(error).__name__}: {error}"
        self._metrics.changed("failed")
        return LoadFailed(f"version {version!r} was not loaded: {self._reasons[version]}")

    @contextmanager
    def _state(self, version: str, state: str) -> Iterator[None]:
        self._changing[version] = state
        try:
            yield
        finally:
            del self._changing[version]


async def _close(engine: Served, drain: bool, within_s: float) -> bool:
    """Whether the engine's threads have ended in time: not if its device hangs.

    Without `drain`, what is still inside fails, so that its clients are told.
    """
    closing = in_thread(partial(engine.close, drain=drain), "recflow-close")
    done, _ = await asyncio.wait([closing], timeout=within_s)
    return bool(done)
