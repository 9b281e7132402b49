"""Whether the engine still answers: where no client shows it, one sample is tried."""

import asyncio
import logging

from recflow_jax.engine.errors import EngineError
from recflow_jax.remote.front_end import FrontEnd
from recflow_jax.serving.failures import ServingError
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")


async def watch(service: Service) -> None:
    """Sets `service.healthy` every `heartbeat_s` seconds, until it is cancelled, or the engine is
    one of another process, and gone.

    A device that hangs makes the server not ready until it answers again; requests are still let
    in, up to the bound of the queue, and fail at their deadlines.
    """
    every_s, answered_before = service.options.heartbeat_s, _answered(service)
    while True:
        await asyncio.sleep(every_s)
        if _is_gone(service):
            log.error("the engine is gone")
            return
        answered = _answered(service)
        healthy = answered != answered_before or await _answers(service, every_s)
        answered_before = answered
        if healthy != service.healthy:
            service.healthy = healthy
            log.warning("health changed", extra={"healthy": healthy})


def _is_gone(service: Service) -> bool:
    model = service.control.model
    return model is not None and isinstance(model.engine, FrontEnd) and model.engine.is_gone


def _answered(service: Service) -> tuple[str, int] | None:
    """The version in use, and how many requests it has answered."""
    model = service.control.model
    return None if model is None else (model.version, model.engine.stats().requests_answered)


async def _answers(service: Service, within_s: float) -> bool:
    """Whether the model in use does; nothing is wrong with none."""
    if service.control.model is None:
        return True
    try:
        await service.control.model.try_out(within_s).scores()
        return True
    except (EngineError, ServingError):
        return False
