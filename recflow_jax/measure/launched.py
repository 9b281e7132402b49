"""A `recflow serve` of one's own, in a process of its own, for as long as it is measured.

Its ports are such as the system says are free, and its model has a name that no other server knows:
whoever answers to it is the one that was launched.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

ENDS_IN_S = 60
OWN_PORTS = ("--http-port", "0", "--grpc-port", "0", "--log-format", "json")
# Beside another process on the same GPU, memory is taken as it is needed.
SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class NotLaunched(RuntimeError):
    """The server ended before it was ready; the message is the last that it said."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Where the server listens, the name of its model, and its process."""

    http_port: int
    grpc_port: int
    model: str
    process_id: int


@contextmanager
def launched(arguments: Sequence[str]) -> Iterator[Launched]:
    """`recflow serve` with these arguments, ready. Raises NotLaunched."""
    model = f"measured-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "recflow_jax", "serve", *OWN_PORTS, "--name", model]
    command += arguments
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**SHARING, **os.environ}
    )
    assert process.stderr is not None
    try:
        http_port, grpc_port = until_ready(process.stderr)
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()  # a full pipe would stop the server
        yield Launched(
            http_port=http_port, grpc_port=grpc_port, model=model, process_id=process.pid
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(ENDS_IN_S)
        process.stderr.close()


def until_ready(lines: Iterable[str]) -> tuple[int, int]:
    """Reads a server's log until it is ready; its ports, of HTTP and gRPC. Raises NotLaunched if
    the log ends before.
    """
    ports, line = None, ""
    for line in lines:
        told = json.loads(line) if line.startswith("{") else {}
        if told.get("event") == "listening":
            ports = told["http_port"], told["grpc_port"]
        if told.get("event") == "ready" and ports is not None:
            return ports
    raise NotLaunched(f"the server did not start: {line.strip()}")
