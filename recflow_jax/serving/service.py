"""What the server does, in plain values: both protocols are a thin skin around it."""

import hmac
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.serving import tracing
from recflow_jax.serving.calls import InferAnswer, InferCall
from recflow_jax.serving.door import Door
from recflow_jax.serving.failures import NoSuchModel, NotReady, Unauthorized
from recflow_jax.serving.metrics import Metrics
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Pending
from recflow_jax.serving.visit import Visit

SERVER = "recflow"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "schedule_policy"]
EXTENSIONS += ["statistics"]
LONGEST_TIMEOUT_S = 86400.0  # for clients that ask for more


class Service:
    """The models that are served, and who may ask them. Used on the event loop alone."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.door = Door(max_requests=options.max_requests, max_bytes=options.max_buffered_bytes)
        self.healthy = True
        self.tracer = tracing.tracer()
        self._model: ServedModel | None = None
        self.metrics.ready.set_function(lambda: self.ready)
        self.metrics.inside.set_function(lambda: self.door.requests)

    @property
    def ready(self) -> bool:
        """Whether requests will be answered: all is compiled, the engine works, nothing ends."""
        return self._model is not None and self.healthy and not self.door.shut

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

    def visit(self, protocol: str, headers: Mapping[str, str]) -> Visit:
        """One request's stay, as a context; headers: those that `tracer` looks at."""
        return Visit(protocol, headers, door=self.door, metrics=self.metrics, tracer=self.tracer)

    def submit(self, visit: Visit, call: InferCall) -> Pending:
        """Hands a request to its model's engine. Raises NotReady, NoSuchModel, InputError, Busy,
        and what `Engine.submit` raises.
        """
        model = self.model(call.model, call.version)
        batch = model.batch(call)
        visit.carry_in(_bytes_of(batch))
        timeout_s = self.options.default_timeout_s if call.timeout_s is None else call.timeout_s
        due_s = visit.arrived_s + min(timeout_s, LONGEST_TIMEOUT_S)
        pending = model.submit(batch, due_s=due_s, priority=call.priority)
        visit.span.tell(model=model.name, version=model.version)
        visit.span.event("submitted")
        return pending

    def answer(self, call: InferCall, scores: np.ndarray) -> InferAnswer:
        """The scores as an answer to `call`."""
        model = self.model(call.model, call.version)
        self.metrics.answered(len(scores))
        return InferAnswer(model=model.name, version=model.version, id=call.id, scores=scores)

    def model(self, name: str, version: str = "") -> ServedModel:
        """The model of that name and version ("": any). Raises NotReady, NoSuchModel."""
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


def _bytes_of(batch: JaggedBatch) -> int:
    arrays = (batch.dense, batch.values, batch.offsets, batch.weights)
    return sum(array.nbytes for array in arrays if array is not None)


def _version() -> str:
    try:
        return version("recflow-jax")
    except PackageNotFoundError:
        return "unknown"
