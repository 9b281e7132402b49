"""A server as a whole process: until it is told to end, to its exit status."""

import asyncio
import logging
import os
import signal
import sys

from recflow_jax.console import Missing

try:
    import uvloop

    from recflow_jax.serving.server import Ending, Server
except ModuleNotFoundError as error:
    raise Missing(f"{error}: pip install 'recflow-jax[serve]'") from error


def run_server(server: Server) -> None:
    """Until SIGTERM or SIGINT, or until the engine of another process is gone. Raises SystemExit in
    that case, and where what was accepted was not all answered.
    """
    _leave(uvloop.run(_until_signal(server)))


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
