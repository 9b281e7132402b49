"""What the server does, in plain values: both protocols are a thin skin around it."""

import asyncio
import hmac
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from recflow_jax.serving.calls import InferAnswer, InferCall
from recflow_jax.serving.failures import (
    INTERNAL,
    Busy,
    NoSuchModel,
    NotReady,
    Unauthorized,
    failure_of,
)
from recflow_jax.serving.metrics import Metrics
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Pending

SERVER = "recflow"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "schedule_policy"]
EXTENSIONS += ["statistics"]

log = logging.getLogger("recflow.serving")


class Service:
    """The models that are served, and who may ask them. Used on the event loop alone."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.inside = 0
        self.draining = False
        self.healthy = True
        self._model: ServedModel | None = None
        self.metrics.ready.set_function(lambda: self.ready)
        self.metrics.inside.set_function(lambda: self.inside)
        self._empty = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether requests will be answered: all is compiled, the engine works, nothing ends."""
        return self._model is not None and self.healthy and not self.draining

    def serve(self, model: ServedModel) -> None:
        """Takes requests for `model` from now on."""
        self._model = model
        self.metrics.watch(model)

    def check_token(self, authorization: str) -> None:
        """Raises Unauthorized if a token is asked for and this is not it."""
        token = self.options.token
        if token is None:
            return
        given = authorization.encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Unauthorized("the request needs the header Authorization: Bearer <token>")

    @contextmanager
    def request(self, protocol: str) -> Iterator[None]:
        """One request from its first byte to its end, let in and counted. Raises Busy, NotReady."""
        started = time.perf_counter()
        outcome = INTERNAL.reason
        self._enter()
        try:
            yield
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            outcome = failure_of(error).reason
            raise
        finally:
            self._leave()
            self.metrics.ended(protocol, outcome, time.perf_counter() - started)

    def submit(self, model: ServedModel, call: InferCall) -> Pending:
        """Hands the request to the model's engine. Raises InputError, EngineError."""
        timeout_s = call.timeout_s
        if timeout_s is None:
            timeout_s = self.options.default_timeout_s
        return model.submit(call, timeout_s)

    def answer(self, model: ServedModel, call: InferCall, scores: np.ndarray) -> InferAnswer:
        """The scores as an answer to `call`."""
        self.metrics.answered(len(scores))
        return InferAnswer(model=model.name, version=model.version, id=call.id, scores=scores)

    def model(self, name: str, version: str = "") -> ServedModel:
        """The model of that name and version ("": any). Raises NotReady, NoSuchModel."""
        if self.draining:
            raise NotReady("the server is about to end")
        if self._model is None:
            raise NotReady("the model is not loaded yet")
        if name != self._model.name or version not in ("", self._model.version):
            suffix = f", version {version!r}" if version else ""
            raise NoSuchModel(f"no model {name!r}{suffix} is served here")
        return self._model

    def metadata(self) -> dict[str, Any]:
        """What the server is."""
        return {"name": SERVER, "version": _version(), "extensions": EXTENSIONS}

    def index(self) -> list[dict[str, str]]:
        """Which models there are, and whether they are ready."""
        if self._model is None:
            return []
        state = "READY" if self.ready else "UNAVAILABLE"
        return [{"name": self._model.name, "version": self._model.version, "state": state}]

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """What the model ("": all) has done so far. Raises NotReady, NoSuchModel."""
        if not name and self._model is not None:
            name = self._model.name
        model = self.model(name, version)
        return {"model_stats": [self.metrics.statistics(model)]}

    async def drain(self, timeout_s: float) -> bool:
        """Turns new requests away; whether those inside have all ended in time."""
        self.draining = True
        self._empty.clear()
        if not self.inside:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _enter(self) -> None:
        if self.draining:
            raise NotReady("the server is about to end")
        if self.inside >= self.options.max_requests:
            raise Busy(f"{self.inside} requests are inside, as many as are allowed")
        self.inside += 1

    def _leave(self) -> None:
        self.inside -= 1
        if not self.inside:
            self._empty.set()


def _version() -> str:
    try:
        return version("recflow-jax")
    except PackageNotFoundError:
        return "unknown"
