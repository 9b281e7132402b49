"""Whether the engine still answers: where no client shows it, one sample is tried."""

import asyncio
import logging

from recflow_jax.engine.errors import EngineError
from recflow_jax.serving.failures import ServingError
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.service import Service

log = logging.getLogger("recflow.serving")


async def watch(service: Service, model: ServedModel) -> None:
    """Sets `service.healthy` every `heartbeat_s` seconds, until it is cancelled.

    A device that hangs makes the server not ready until it answers again; requests are still let
    in, up to the bound of the queue, and fail at their deadlines.
    """
    every_s, answered_before = service.options.heartbeat_s, -1
    while True:
        await asyncio.sleep(every_s)
        answered = model.engine.stats().requests_answered
        healthy = answered != answered_before or await _answers(model, every_s)
        answered_before = answered
        if healthy != service.healthy:
            service.healthy = healthy
            log.warning("health changed", extra={"healthy": healthy})


async def _answers(model: ServedModel, within_s: float) -> bool:
    try:
        await model.try_out(within_s).scores()
        return True
    except (EngineError, ServingError):
        return False
