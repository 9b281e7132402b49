"""The two listening ends, HTTP and gRPC, each started and stopped as one thing."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import uvicorn

from recflow_jax.serving import rest, rpc
from recflow_jax.serving.connections import Connection, UvicornServer
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.service import Service

STOPPING_S = 1  # for connections that have nothing accepted on them
BACKLOG = 2048
BESIDE_INFERENCE = 64  # calls of gRPC for health, metadata and the like


@asynccontextmanager
async def http(service: Service) -> AsyncIterator[int]:
    """Serves HTTP meanwhile, on the port that it yields. Raises OSError."""
    options = service.options
    config = uvicorn_config(rest.Application(service), options)
    _load(config)
    listening = _socket(options.host, options.http_port)
    server = UvicornServer(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.001)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def grpc_aio(service: Service) -> AsyncIterator[int | None]:
    """Serves gRPC meanwhile, on the port that it yields; on none if so told. Raises OSError."""
    options = service.options
    if options.grpc_port is None:
        yield None
        return
    server = grpc.aio.server(
        options=_grpc_options(options),
        maximum_concurrent_rpcs=options.max_requests + BESIDE_INFERENCE,
    )
    server.add_generic_rpc_handlers((rpc.handlers(service),))
    port = _bind(server, options, options.grpc_port)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(STOPPING_S)


def uvicorn_config(application: Any, options: ServerOptions) -> uvicorn.Config:
    """How an ASGI application is served."""
    return uvicorn.Config(
        application,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        backlog=BACKLOG,
        timeout_graceful_shutdown=STOPPING_S,
    )


def _load(config: uvicorn.Config) -> None:
    try:
        config.load()
    except ssl.SSLError as error:
        pair = f"{config.ssl_certfile}, {config.ssl_keyfile}"
        raise OSError(f"{pair}: not a certificate and its key in PEM: {error}") from error


def _socket(host: str, port: int) -> socket.socket:
    """Bound here: uvicorn would end the process where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise OSError(f"cannot listen on {host}, port {port}: {why}") from error


def _grpc_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a port that another server has is an error, not shared
        ("grpc.max_receive_message_length", options.max_body_bytes),
        ("grpc.max_send_message_length", -1),
    ]


def _bind(server: grpc.aio.Server, options: ServerOptions, port: int) -> int:
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{port}"
    try:
        if options.tls_certificate is None or options.tls_key is None:
            return server.add_insecure_port(address)
        pair = (options.tls_key.read_bytes(), options.tls_certificate.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
