"""`recflow serve --engine`: the engine of another server, on more ports; it loads no JAX."""

import time
from functools import partial
from pathlib import Path

from recflow_jax.commands.server_process import run_server
from recflow_jax.remote.front_end import FrontEnd
from recflow_jax.serving import logs
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.server import Server

LOOKS_AGAIN_S = 0.1


def serve_engine_of(
    path: Path,
    *,
    server: ServerOptions,
    name: str | None,
    version: str,
    log_level: logs.LogLevel,
    log_format: logs.LogFormat | None,
) -> None:
    """Serves the engine that front ends find at `path`, for which it waits. Raises SystemExit as
    `run_server` does.
    """
    logs.set_up(log_level, log_format)
    made = Server(partial(_found, path), name=name, version=version, options=server)
    run_server(made)


def _found(path: Path) -> FrontEnd:
    """As soon as somebody listens: he may be loading."""
    while True:
        try:
            return FrontEnd(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(LOOKS_AGAIN_S)
