"""Open Inference Protocol v2 over gRPC: handlers without generated code, on grpc.aio."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from recflow_jax.batch import InputError
from recflow_jax.serving.failures import failure_of, is_internal, message_of
from recflow_jax.serving.rpc_body import decode, encode, parameters_of
from recflow_jax.serving.rpc_messages import MESSAGES, SERVICE
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")

Context = Any  # a grpc.aio.ServicerContext, whose C twin is no subclass of it
Answer = Callable[[Any, Context], Awaitable[Any]]


def handlers(service: Service) -> grpc.GenericRpcHandler:
    """All methods of the protocol's service."""
    rpc = _Rpc(service)
    methods = {
        "ServerLive": rpc.open(lambda _: {"live": True}),
        "ServerReady": rpc.open(lambda _: {"ready": service.ready}),
        "ModelReady": rpc.open(rpc.model_ready),
        "ServerMetadata": rpc.told(lambda _: service.metadata()),
        "ModelMetadata": rpc.told(lambda m: service.model(m.name, m.version).metadata()),
        "ModelConfig": rpc.told(
            lambda m: {"config": service.model(m.name, m.version).configuration()}
        ),
        "ModelStatistics": rpc.told(lambda m: service.statistics(m.name, m.version)),
        "RepositoryIndex": rpc.told(lambda _: {"models": service.index()}),
        "RepositoryModelLoad": rpc.changed(service.load),
        "RepositoryModelUnload": rpc.changed(service.unload),
        "ModelInfer": rpc.infer,
    }
    return grpc.method_handlers_generic_handler(
        SERVICE, {name: rpc.handler(name, answer) for name, answer in methods.items()}
    )


class _Rpc:
    """What is behind each method."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def handler(self, method: str, answer: Answer) -> grpc.RpcMethodHandler:
        """Requests stay bytes until here, so that those that are none get a clear answer."""
        request = MESSAGES[f"{method}Request"]

        async def handle(data: bytes, context: Context) -> bytes:
            try:
                return (await answer(parsed(request, data), context)).SerializeToString()
            except Exception as error:
                if is_internal(error):
                    log.exception("request failed", extra={"method": method})
                return await self._abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    def open(self, tell: Callable[[Any], dict[str, Any]]) -> Answer:
        """Answers with what `tell` tells, without a token."""

        async def answer(message: Any, context: Context) -> Any:
            name = type(message).__name__.removesuffix("Request")
            return json_format.ParseDict(tell(message), MESSAGES[f"{name}Response"]())

        return answer

    def told(self, tell: Callable[[Any], dict[str, Any]]) -> Answer:
        """The same for clients with the token."""
        answer = self.open(tell)

        async def checked(message: Any, context: Context) -> Any:
            self._check_token(context)
            return await answer(message, context)

        return checked

    def changed(self, change: Callable[[str, dict[str, Any]], Awaitable[None]]) -> Answer:
        """Changes the model of that name by the parameters."""

        async def answer(message: Any, context: Context) -> Any:
            self._check_token(context)
            await change(message.model_name, parameters_of(message))
            name = type(message).__name__.removesuffix("Request")
            return MESSAGES[f"{name}Response"]()

        return answer

    def model_ready(self, message: Any) -> dict[str, Any]:
        """Whether the model of that name takes requests."""
        self._service.model(message.name, message.version)
        return {"ready": self._service.ready}

    async def infer(self, message: Any, context: Context) -> Any:
        """Scores. A client that leaves or runs out of time cancels this coroutine."""
        with self._service.visit("grpc", _metadata(context)) as visit:
            self._check_token(context)
            visit.carry_in(message.ByteSize())
            call = decode(message, timeout_s=context.time_remaining())
            pending = self._service.submit(visit, call)
            return encode(self._service.answer(visit, call, await pending.scores()))

    def _check_token(self, context: Context) -> None:
        self._service.check_token(_metadata(context).get("authorization", ""))

    async def _abort(self, context: Context, error: Exception) -> Any:
        failure = failure_of(error)
        wait_s = self._service.options.retry_after_s
        trailing = (
            (("retry-after", str(wait_s)), ("grpc-retry-pushback-ms", str(1000 * wait_s)))
            if failure.retry
            else ()
        )
        await context.abort(failure.grpc, message_of(error), trailing)


def _metadata(context: Context) -> dict[str, str]:
    pairs = context.invocation_metadata() or ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def parsed(message: Any, data: bytes) -> Any:
    """The message that the bytes are. Raises InputError if they are none."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise InputError(f"the request is no {message.__name__}: {error}") from error
