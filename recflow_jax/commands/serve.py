"""`recflow serve`: one model behind the Open Inference Protocol, until it is told to end."""

import asyncio
import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jax

from recflow_jax.config import DLRMConfig
from recflow_jax.console import Missing
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.params import init_params, load_params
from recflow_jax.remote.front_end import FrontEnd
from recflow_jax.remote.front_ends import check_free

try:
    import uvloop

    from recflow_jax.serving import logs
    from recflow_jax.serving.options import ServerOptions
    from recflow_jax.serving.repository import Repository
    from recflow_jax.serving.server import Ending, Server
except ModuleNotFoundError as error:
    raise Missing(f"{error}: pip install 'recflow-jax[serve]'") from error

LOOKS_AGAIN_S = 0.1


def serve(
    config: DLRMConfig | None,
    *,
    params: Path | None,
    random: bool,
    profile: Path | None,
    engine: EngineOptions,
    server: ServerOptions,
    name: str | None,
    version: str,
    model_control: Path | None,
    front_ends: Path | None,
    log_level: logs.LogLevel,
    log_format: logs.LogFormat | None,
) -> None:
    """Serves until SIGTERM or SIGINT. Raises SystemExit if what was accepted was not all answered.

    config: None takes that of the file `params`. random: drawn parameters instead, to try things.
    model_control: a folder of versions that clients may load. front_ends: a path where front ends
    of other processes find the engine, see `serve_engine_of`. Raises ValueError if there is neither
    params nor random or both, OSError for ports and paths that are taken and a folder that is none.
    """
    if (params is None) != random or (random and config is None):
        raise ValueError("serve takes --params FILE, or --model with --random-params to try it")
    if model_control is not None and not model_control.is_dir():
        raise NotADirectoryError(f"--model-control: {model_control} is no folder")
    if front_ends is not None and model_control is not None:
        raise ValueError("--front-ends: they keep the engine that they found, --model-control not")
    if front_ends is not None:
        check_free(front_ends)
    logs.set_up(log_level, log_format)

    def load(path: Path | None) -> Engine:
        if path is None:
            assert config is not None
            return Engine(config, init_params(config), options=engine, profile=profile)
        found, loaded = load_params(path, config=config)
        return Engine(found, loaded, options=engine, profile=profile)

    made = Server(
        partial(load, params),
        name=name,
        version=version,
        options=server,
        repository=None if model_control is None else Repository(folder=model_control, load=load),
        front_ends=front_ends,
    )
    _leave(uvloop.run(_until_signal(made)))


def serve_engine_of(
    path: Path,
    *,
    server: ServerOptions,
    name: str | None,
    version: str,
    log_level: logs.LogLevel,
    log_format: logs.LogFormat | None,
) -> None:
    """As `serve`, the engine of another server, whose front ends find it at `path`; waits for it.
    Raises SystemExit too when that engine is gone.
    """
    logs.set_up(log_level, log_format)
    jax.config.update("jax_platforms", "cpu")  # the GPU is the engine's
    made = Server(partial(_found, path), name=name, version=version, options=server)
    _leave(uvloop.run(_until_signal(made)))


def _found(path: Path) -> FrontEnd:
    """As soon as somebody listens: he may be loading."""
    while True:
        try:
            return FrontEnd(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(LOOKS_AGAIN_S)


async def _until_signal(server: Server) -> Ending:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    return await server.run(stop)


def _leave(ending: Ending) -> None:
    """A thread that waits for a device that never answers would keep Python from ending."""
    code = 0 if ending.drained and ending.stopped else 1
    if not ending.quiet:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)
