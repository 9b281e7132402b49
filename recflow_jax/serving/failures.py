"""Why a request fails, as each protocol says it."""

from dataclasses import dataclass

import grpc

from recflow_jax.batch import InputError
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed, QueueFull, StepFailed


class ServingError(RuntimeError):
    """A request that the server itself turns away."""


class Unauthorized(ServingError):
    """The request brought no token, or a wrong one."""


class Forbidden(ServingError):
    """The server was not told to allow it."""


class LoadFailed(ServingError):
    """A version could not be loaded; what was served before still is."""


class NoSuchModel(ServingError):
    """No model of that name or version is served here."""


class TooLarge(ServingError):
    """The request has more bytes than are allowed."""


class TooSlow(ServingError):
    """The client did not send its request in time."""


class Unsupported(ServingError):
    """The request is encoded in a way that the server does not read."""


class Busy(ServingError):
    """As many requests are inside as are allowed."""


class NotReady(ServingError):
    """No model is loaded, or the server is about to end."""


class ClientGone(ServingError):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A kind of error in both protocols; `retry`: the same request may succeed later."""

    reason: str
    http: int
    grpc: grpc.StatusCode
    retry: bool = False


INTERNAL = Failure(reason="internal", http=500, grpc=grpc.StatusCode.INTERNAL)

KINDS: dict[type[Exception], Failure] = {
    InputError: Failure(reason="input", http=400, grpc=grpc.StatusCode.INVALID_ARGUMENT),
    Unauthorized: Failure(reason="token", http=401, grpc=grpc.StatusCode.UNAUTHENTICATED),
    Forbidden: Failure(reason="off", http=403, grpc=grpc.StatusCode.PERMISSION_DENIED),
    NoSuchModel: Failure(reason="model", http=404, grpc=grpc.StatusCode.NOT_FOUND),
    TooSlow: Failure(reason="slow_body", http=408, grpc=grpc.StatusCode.DEADLINE_EXCEEDED),
    TooLarge: Failure(reason="size", http=413, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED),
    Unsupported: Failure(reason="encoding", http=415, grpc=grpc.StatusCode.UNIMPLEMENTED),
    QueueFull: Failure(
        reason="queue_full", http=429, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, retry=True
    ),
    Busy: Failure(reason="busy", http=429, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, retry=True),
    ClientGone: Failure(reason="cancelled", http=499, grpc=grpc.StatusCode.CANCELLED),
    LoadFailed: Failure(reason="load", http=500, grpc=grpc.StatusCode.INTERNAL),
    StepFailed: Failure(reason="device", http=500, grpc=grpc.StatusCode.INTERNAL),
    NotReady: Failure(reason="not_ready", http=503, grpc=grpc.StatusCode.UNAVAILABLE, retry=True),
    EngineClosed: Failure(
        reason="not_ready", http=503, grpc=grpc.StatusCode.UNAVAILABLE, retry=True
    ),
    DeadlineExceeded: Failure(reason="deadline", http=504, grpc=grpc.StatusCode.DEADLINE_EXCEEDED),
}


def failure_of(error: Exception) -> Failure:
    """What `error` is to a client; INTERNAL for what nobody foresaw."""
    return KINDS.get(type(error), INTERNAL)


def message_of(error: Exception) -> str:
    """What a client is told: nothing of the inside for an error that nobody foresaw."""
    return str(error) if type(error) in KINDS else "internal error"


def is_internal(error: Exception) -> bool:
    """Whether the error is the server's own, or its device's, and belongs in the log."""
    return failure_of(error).http == INTERNAL.http
