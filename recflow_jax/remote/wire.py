"""What a front end and an engine's process tell each other over a Unix socket that keeps messages
apart.

The engine's process says first what it serves (`Greeting`); the front end answers with the handle
of its arena. Then it asks for the scores of bundles (`Ask`), and is told when they are there, or
why they are not (`Reply`). Samples and scores lie in the arena.
"""

import json
import os
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Self

from recflow_jax.batch import InputError
from recflow_jax.engine.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    QueueFull,
    StepFailed,
)

PROTOCOL = 1
MOST_BYTES = 2**16  # of a message
MOST_TEXT = 2**12  # of an error
_ASK = struct.Struct("<IIIi?")
_REPLY = struct.Struct("<IB?")
_ANSWERED = 0
_ERRORS: tuple[type[Exception], ...] = (
    EngineError,
    InputError,
    QueueFull,
    DeadlineExceeded,
    EngineClosed,
    StepFailed,
)


def new_socket() -> socket.socket:
    """Neither bound nor connected."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_handle(to: socket.socket, handle: int) -> None:
    """Raises OSError."""
    socket.send_fds(to, [b"handle"], [handle])


def receive_handle(of: socket.socket) -> int:
    """One that is the caller's to close. Raises ProtocolError, and OSError."""
    _, handles, _, _ = socket.recv_fds(of, MOST_BYTES, 1)
    if not handles:
        raise ProtocolError("no handle came")
    return handles[0]


class ProtocolError(ValueError):
    """A message that nobody who keeps to the protocol sends."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What an engine serves. config: the model as TOML. samples, ids: of a bundle at most. length:
    int32 elements of the buffer of a slice of so many. ids_per_sample: at most. queued_samples: of
    what a front end may have waiting. backend: which kernels run.
    """

    config: str
    samples: int
    ids: int
    length: int
    ids_per_sample: int
    queued_samples: int
    backend: str

    def send(self, to: socket.socket) -> None:
        """In a file of its own, as a model with many features fits no message. Raises OSError."""
        handle = os.memfd_create("recflow-greeting")
        with open(handle, "wb") as file:
            file.write(json.dumps({"protocol": PROTOCOL, **asdict(self)}).encode())
            file.flush()
            send_handle(to, handle)

    @classmethod
    def receive(cls, of: socket.socket) -> Self:
        """Raises ProtocolError, for another version's greeting too, and OSError."""
        with open(receive_handle(of), "rb") as file:
            file.seek(0)
            message = file.read()
        try:
            fields = json.loads(message)
            protocol = fields.pop("protocol")
            if protocol == PROTOCOL:
                return cls(**fields)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ProtocolError(f"no engine greets like this: {message[:80]!r}") from error
        raise ProtocolError(f"the engine speaks protocol {protocol}, this front end {PROTOCOL}")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Scores are wanted of a bundle. are_fixed: its bags are all as long as expected, and have no
    offsets.
    """

    slot: int
    samples: int
    ids: int
    priority: int
    are_fixed: bool

    def encoded(self) -> bytes:
        """As a message."""
        return _ASK.pack(self.slot, self.samples, self.ids, self.priority, self.are_fixed)

    @classmethod
    def decoded(cls, message: bytes) -> Self:
        """Raises ProtocolError."""
        try:
            slot, samples, ids, priority, are_fixed = _ASK.unpack(message)
        except struct.error as error:
            raise ProtocolError(f"{len(message)} bytes ask for nothing") from error
        return cls(slot=slot, samples=samples, ids=ids, priority=priority, are_fixed=are_fixed)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The scores of the bundle in `slot` are there, or never will be. is_crowded: whether more
    waits than one batch takes.
    """

    slot: int
    error: BaseException | None = None
    is_crowded: bool = False

    def encoded(self) -> bytes:
        """As a message; an error of another kind becomes an EngineError."""
        if self.error is None:
            return _REPLY.pack(self.slot, _ANSWERED, self.is_crowded)
        kind = _ERRORS.index(type(self.error)) if type(self.error) in _ERRORS else 0
        head = _REPLY.pack(self.slot, 1 + kind, self.is_crowded)
        return head + str(self.error).encode()[:MOST_TEXT]

    @classmethod
    def decoded(cls, message: bytes) -> Self:
        """Raises ProtocolError."""
        try:
            slot, kind, is_crowded = _REPLY.unpack_from(message)
            text = message[_REPLY.size :].decode(errors="replace")
            error = None if kind == _ANSWERED else _ERRORS[kind - 1](text)
        except (struct.error, IndexError) as wrong:
            raise ProtocolError(f"{len(message)} bytes reply to nothing") from wrong
        return cls(slot=slot, error=error, is_crowded=is_crowded)
