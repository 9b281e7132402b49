"""`recflow serve`: one model behind the Open Inference Protocol, until it is told to end."""

from functools import partial
from pathlib import Path

from recflow_jax.commands.server_process import run_server
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.params import init_params, load_params
from recflow_jax.remote.front_ends import check_free
from recflow_jax.serving import logs
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.server import Server


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
    run_server(made)
