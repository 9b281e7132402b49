"""One request while it is inside: let in at the door, counted, told of, and let out."""

import asyncio
import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from recflow_jax.serving.door import Door, Stay
from recflow_jax.serving.failures import INTERNAL, ServingError, failure_of
from recflow_jax.serving.metrics import Metrics
from recflow_jax.serving.tracing import Tracer

log = logging.getLogger("recflow.serving")


class Visit(Stay):
    """From a request's first byte to its end, as a context. Entering raises Busy, NotReady."""

    def __init__(
        self,
        protocol: str,
        headers: Mapping[str, str],
        *,
        door: Door,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        super().__init__(door)
        self.arrived_s = time.monotonic()
        self.model, self.version = "", ""
        self._protocol = protocol
        self._metrics = metrics
        self._spanning = tracer.span("infer", headers)
        self.span = self._spanning.__enter__()

    def __enter__(self) -> Self:
        self._metrics.arrived(self._protocol)
        try:
            super().__enter__()
        except ServingError as error:
            self._tell(failure_of(error).reason)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._tell(_outcome(error))

    def is_of(self, model: str, version: str) -> None:
        """Which model will answer, even if another is served by then."""
        self.model, self.version = model, version
        self.span.tell(model=model, version=version)

    def _tell(self, outcome: str) -> None:
        seconds = time.monotonic() - self.arrived_s
        self._metrics.ended(self._protocol, outcome, seconds)
        self.span.tell(protocol=self._protocol, outcome=outcome)
        self._spanning.__exit__(None, None, None)
        if log.isEnabledFor(logging.DEBUG):
            extra = {"protocol": self._protocol, "outcome": outcome, "seconds": seconds}
            log.debug("request", extra=extra)


def _outcome(error: BaseException | None) -> str:
    match error:
        case None:
            return "ok"
        case asyncio.CancelledError():
            return "cancelled"
        case Exception():
            return failure_of(error).reason
    return INTERNAL.reason
