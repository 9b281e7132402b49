"""What a server is told: where it listens, what it lets in, how long it waits."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

SECONDS = ("default_timeout_s", "body_timeout_s", "drain_s", "heartbeat_s")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Ports and limits of a server. Raises ValueError that names the field.

    host: the address to listen on; other machines reach the server only if it is not loopback.
    http_port, grpc_port: 0 takes a free one; grpc_port None serves HTTP alone.
    max_body_bytes: a longer request is refused before it is read.
    max_requests: requests inside at once, over all connections; more are refused unread.
    max_buffered_bytes: of all requests inside, as they come and as samples laid out; what would
        exceed it is refused.
    default_timeout_s: the deadline of requests that bring none: none waits for ever.
    body_timeout_s: how long a client may take to send its request.
    retry_after_s: what refused clients are told to wait.
    drain_s: how long accepted requests get to be answered once the server is to end.
    heartbeat_s: how often the engine's health is tried where no answers show it.
    tls_certificate, tls_key: PEM files; both or neither.
    token: what clients must send as `Authorization: Bearer <token>`, on all but health.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    max_body_bytes: int = 64 * 2**20
    max_requests: int = 1024
    max_buffered_bytes: int = 2**30
    default_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    retry_after_s: int = 1
    drain_s: float = 30.0
    heartbeat_s: float = 5.0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SECONDS and not 0 < value < math.inf:
                raise ValueError(f"server: {field.name} is {value!r}, not above 0")
            if field.name.startswith("max_") and value < 1:
                raise ValueError(f"server: {field.name} is {value!r}, not above 0")
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 2**16:
                raise ValueError(f"server: {name} is {port}, not in [0, 65536)")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("server: TLS takes a certificate and a key, not one of them")
        if self.token is not None and not (self.token and self.token.isascii()):
            raise ValueError("server: token is empty or not ASCII")
