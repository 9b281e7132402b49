"""What changes a model over HTTP: loading and unloading versions of it, writing rows of tables."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recflow_jax.serving.asgi import ErrorResponse, read_body
from recflow_jax.serving.door import Stay
from recflow_jax.serving.failures import is_internal
from recflow_jax.serving.rest_body import decode_request, parameters_of
from recflow_jax.serving.service import Service

MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

log = logging.getLogger("recflow.serving")

Act = Callable[[Request, Stay], Awaitable[dict[str, Any]]]


class Admin:
    """The endpoints; each is for clients with the token, and off unless the server is told."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """All of them."""
        acts: dict[str, Act] = {
            "/v2/repository/models/{model}/load": self._load,
            "/v2/repository/models/{model}/unload": self._unload,
            **{f"{path}/tables/{{table}}/rows": self._update_rows for path in MODELS},
        }
        return [Route(path, self._acting(act), methods=["POST"]) for path, act in acts.items()]

    def _acting(self, act: Act) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                self._service.check_token(request.headers.get("authorization", ""))
                told = await act(request, Stay(self._service.door))
                return Response(orjson.dumps(told), media_type="application/json")
            except Exception as error:
                if is_internal(error):
                    log.exception("request failed", extra={"path": request.url.path})
                return ErrorResponse(error, self._service.options.retry_after_s)

        return endpoint

    async def _load(self, request: Request, stay: Stay) -> dict[str, Any]:
        """It has left before it waits: a server that ends does not wait for what is loaded."""
        with stay:
            parameters = parameters_of(await self._body(request, stay))
        await self._service.load(request.path_params["model"], parameters)
        return {}

    async def _unload(self, request: Request, stay: Stay) -> dict[str, Any]:
        with stay:
            parameters = parameters_of(await self._body(request, stay))
        await self._service.unload(request.path_params["model"], parameters)
        return {}

    async def _update_rows(self, request: Request, stay: Stay) -> dict[str, Any]:
        with stay:
            body = await self._body(request, stay)
            call = decode_request(body, dict(request.scope["headers"]), request.path_params).call
            return await self._service.update_rows(call, request.path_params["table"])

    async def _body(self, request: Request, stay: Stay) -> bytes:
        options, headers = self._service.options, dict(request.scope["headers"])
        return await read_body(
            *(request.receive, headers, stay),
            most=options.max_body_bytes,
            within_s=options.body_timeout_s,
        )
