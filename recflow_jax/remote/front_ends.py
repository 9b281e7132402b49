"""The engine's end: front ends come and go, and each bundle of theirs is a request."""

import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.closing import Closing
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import EngineError
from recflow_jax.remote.arena import Arena, BundleShape
from recflow_jax.remote.wire import (
    MOST_BYTES,
    Ask,
    Greeting,
    ProtocolError,
    Reply,
    new_socket,
    receive_handle,
)

PAUSE_S = 0.01


def check_free(path: Path) -> None:
    """Raises OSError where front ends could not be let in at `path`."""
    _bound(path).close()
    path.unlink()


class FrontEnds(Closing):
    """Lets front ends (`FrontEnd`) ask an engine, from when this is made until it is closed.

    They find it at `path`, a Unix socket that only this user may connect to. Closing leaves the
    engine open. Raises OSError where something is at the path, or no such socket can be.
    """

    def __init__(self, engine: Engine, path: str | Path) -> None:
        self.path = Path(path)
        self._engine = engine
        config, room = engine.config, engine.largest_slice
        self._greeting = Greeting(
            config=config.to_toml(),
            samples=room.samples,
            ids=room.ids,
            length=engine.slice_length,
            ids_per_sample=engine.max_ids_per_sample,
            queued_samples=engine.max_queued_samples,
            backend=engine.backend_name,
        )
        self._shape = BundleShape.of(config, self._greeting)
        self._guests: set[_Guest] = set()
        self._closed = False
        self._socket = _bound(self.path)
        self._socket.listen()
        self._thread = Thread(target=self._listen, name="recflow-front-ends", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets nobody in any more, and sends all home: what they have asked for raises EngineClosed
        there. May be called again.
        """
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # who listens wakes up
        self._thread.join()
        self._socket.close()
        self.path.unlink(missing_ok=True)
        for guest in tuple(self._guests):
            guest.leave()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, of one who has left already, or one too many
                time.sleep(PAUSE_S)
                continue
            guest = _Guest(self._engine, self._shape, connection)
            self._guests.add(guest)
            guest.enter(self._greeting, on_leave=partial(self._guests.discard, guest))


class _Guest:
    """One front end, as seen from here, on a thread that listens to it."""

    def __init__(self, engine: Engine, shape: BundleShape, connection: socket.socket) -> None:
        self._engine = engine
        self._shape = shape
        self._connection = connection

    def enter(self, greeting: Greeting, *, on_leave: Callable[[], None]) -> None:
        """Serves it, until it leaves."""
        run = partial(self._serve, greeting, on_leave)
        Thread(target=run, name="recflow-front-end", daemon=True).start()

    def leave(self) -> None:
        """Sends it home; also where it keeps the wrong protocol."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, greeting: Greeting, on_leave: Callable[[], None]) -> None:
        try:
            with self._connection, suppress(OSError, ProtocolError):
                greeting.send(self._connection)
                self._listen(self._arena())
        finally:
            on_leave()

    def _arena(self) -> Arena:
        handle = receive_handle(self._connection)
        try:
            arena = Arena(self._shape, handle)
        finally:
            os.close(handle)
        arena.pin()
        return arena

    def _listen(self, arena: Arena) -> None:
        while message := self._connection.recv(MOST_BYTES):
            self._ask(Ask.decoded(message), arena)

    def _ask(self, ask: Ask, arena: Arena) -> None:
        try:
            answer = self._submitted(ask, arena)
        except (InputError, EngineError) as error:
            self._reply(ask, error)
        else:
            answer.add_done_callback(partial(self._answer, ask, arena))

    def _submitted(self, ask: Ask, arena: Arena) -> Answer:
        engine, priority = self._engine, ask.priority
        if not ask.are_fixed:
            return engine.submit(arena.read(ask), priority=priority)
        dense, weights = arena.floats(ask)
        berth = arena.berth(ask.slot)
        return engine.submit_in_place(dense, berth, weights=weights, priority=priority)

    def _answer(self, ask: Ask, arena: Arena, done: Future[np.ndarray]) -> None:
        """On the engine's thread: another one would wake up first, and wait for the interpreter."""
        error = done.exception()
        if error is None:
            arena.scores(ask.slot, ask.samples)[:] = done.result()
        self._reply(ask, error)

    def _reply(self, ask: Ask, error: BaseException | None) -> None:
        """Waits for nobody: who does not read its replies is sent home."""
        reply = Reply(slot=ask.slot, error=error, is_crowded=self._engine.is_crowded)
        try:
            self._connection.send(reply.encoded(), socket.MSG_DONTWAIT)
        except OSError:
            self.leave()


def _bound(path: Path) -> socket.socket:
    """At `path`, where only this user may connect. Raises OSError."""
    if sys.platform != "linux":
        raise OSError(f"front ends share memory as Linux does, which {sys.platform} does not")
    bound, before = new_socket(), os.umask(0o177)
    try:
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise OSError(f"front ends cannot be let in at {path}: {error}") from error
    finally:
        os.umask(before)
    return bound
