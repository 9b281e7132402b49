"""Open Inference Protocol v2 over HTTP, as a Starlette application."""

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recflow_jax.serving.asgi import (
    JSON,
    ErrorResponse,
    Headers,
    Receive,
    Send,
    read_body,
    respond,
    respond_error,
)
from recflow_jax.serving.connections import CALL, LOST
from recflow_jax.serving.failures import ClientGone, ServingError, is_internal
from recflow_jax.serving.pending import Pending
from recflow_jax.serving.rest_admin import MODELS, Admin
from recflow_jax.serving.rest_body import HEADER_LENGTH, decode_request, encode, named
from recflow_jax.serving.service import Service
from recflow_jax.serving.tracing import Tracer
from recflow_jax.serving.visit import Visit

INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?/infer")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger("recflow.serving")


class Application:
    """All paths of the protocol, and /metrics: inference by a short way, as it has to be fast, and
    the others by Starlette's routes.
    """

    def __init__(self, service: Service) -> None:
        rest = _Rest(service)
        self._infer = InferEndpoint(service)
        self._others = Starlette(
            routes=[*rest.server_routes(), *rest.model_routes(), *Admin(service).routes()],
            exception_handlers={HTTPException: _http_error, ServingError: rest.serving_error},
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        asked = INFER.fullmatch(scope["path"])
        if asked is None:
            await self._others(scope, receive, send)
        elif scope["method"] != "POST":
            told = _json({"error": f"{scope['path']}: Method Not Allowed, it takes POST"}, 405)
            await told(scope, receive, send)
        else:
            scope["path_params"] = asked.groupdict(default="")
            await self._infer(scope, receive, send)


class _Rest:
    """What is behind each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def server_routes(self) -> list[Route]:
        service = self._service
        return [
            Route("/v2/health/live", _live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._telling(lambda _: service.metadata())),
            Route("/v2/models/stats", self._telling(lambda _: service.statistics())),
            Route(
                "/v2/repository/index",
                self._telling(lambda _: service.index()),
                methods=["POST"],
            ),
            Route("/metrics", self._metrics),
        ]

    def model_routes(self) -> list[Route]:
        told = {
            "": lambda r: self._service.model(*named(r.path_params)).metadata(),
            "/config": lambda r: self._service.model(*named(r.path_params)).configuration(),
            "/stats": lambda r: self._service.statistics(*named(r.path_params)),
        }
        routes = []
        for path in MODELS:
            routes.append(Route(f"{path}/ready", self._model_ready))
            routes += [Route(path + end, self._telling(tell)) for end, tell in told.items()]
        return routes

    async def serving_error(self, request: Request, error: Exception) -> Response:
        """Errors of all paths but inference."""
        return ErrorResponse(error, self._service.options.retry_after_s)

    def _telling(self, tell: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self._service.check_token(request.headers.get("authorization", ""))
            return _json(tell(request))

        return endpoint

    async def _ready(self, request: Request) -> Response:
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def _model_ready(self, request: Request) -> Response:
        name, version = named(request.path_params)
        model = self._service.model(name, version)
        return _json(
            {"name": model.name, "version": model.version, "ready": self._service.ready},
            200 if self._service.ready else 503,
        )

    async def _metrics(self, request: Request) -> Response:
        self._service.check_token(request.headers.get("authorization", ""))
        return Response(self._service.metrics.text(), media_type=METRICS_TYPE)


class InferEndpoint:
    """POST .../infer, straight on ASGI: this one has to be fast, and to see its client leave."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            with self._service.visit("http", _traced(headers, self._service.tracer)) as visit:
                content, about = await self._answer(visit, scope, headers, receive)
        except ClientGone:
            return
        except Exception as error:
            if is_internal(error):
                log.exception("request failed", extra={"path": scope["path"]})
            retry_after_s = self._service.options.retry_after_s
            await respond_error(send, error, retry_after_s=retry_after_s)
        else:
            await respond(send, 200, content, about)

    async def _answer(
        self, visit: Visit, scope: Any, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[bytes, Headers]:
        self._service.check_token(headers.get(b"authorization", b"").decode("latin-1"))
        options = self._service.options
        body = await read_body(
            receive, headers, visit, most=options.max_body_bytes, within_s=options.body_timeout_s
        )
        asked = decode_request(body, headers, scope["path_params"])
        pending = self._service.submit(visit, asked.call)
        scores = await _scores(pending, scope["extensions"][LOST][CALL])
        answer = self._service.answer(visit, asked.call, scores)
        content, header_length = encode(answer, binary=asked.binary)
        if header_length is None:
            return content, JSON
        length = (HEADER_LENGTH, str(header_length).encode())
        return content, [(b"content-type", b"application/octet-stream"), length]


async def _scores(pending: Pending, call_when_lost: Callable[[Any], None]) -> np.ndarray:
    """The answer, unless the client leaves first."""
    call_when_lost(pending.cancel)
    try:
        return await pending.scores()
    finally:
        call_when_lost(None)


def _traced(headers: dict[bytes, bytes], tracer: Tracer) -> dict[str, str]:
    """Those that the tracer looks at."""
    return {
        name: headers[name.encode()].decode("latin-1")
        for name in tracer.headers
        if name.encode() in headers
    }


async def _live(request: Request) -> Response:
    return _json({"live": True})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": f"{request.url.path}: {error.detail}"}, error.status_code)


def _json(data: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(data), status, media_type="application/json")
