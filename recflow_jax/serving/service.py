"""What the server does, in plain values: both protocols are a thin skin around it."""

import hmac
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.serving import rows, tracing
from recflow_jax.serving.calls import InferAnswer, InferCall, check_known, version_of
from recflow_jax.serving.control import ModelControl
from recflow_jax.serving.door import Door
from recflow_jax.serving.failures import NoSuchModel, NotReady, Unauthorized
from recflow_jax.serving.metrics import Metrics
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Pending
from recflow_jax.serving.repository import Repository
from recflow_jax.serving.visit import Visit

SERVER = "recflow"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "schedule_policy"]
EXTENSIONS += ["model_repository", "statistics"]
LONGEST_TIMEOUT_S = 86400.0  # for clients that ask for more


class Service:
    """The model that is served, and who may ask it. Used on the event loop alone.

    name: what it is served under; None: what its config says. repository: of its versions, if
    clients may change it.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        name: str | None = None,
        repository: Repository | None = None,
    ) -> None:
        self.options = options
        self.metrics = Metrics(lambda: self.control.model)
        self.control = ModelControl(options, self.metrics, name=name, repository=repository)
        self.door = Door(max_requests=options.max_requests, max_bytes=options.max_buffered_bytes)
        self.healthy = True
        self.tracer = tracing.tracer()
        self.metrics.ready.set_function(lambda: self.ready)
        self.metrics.inside.set_function(lambda: self.door.requests)

    @property
    def ready(self) -> bool:
        """Whether requests will be answered: all is compiled, the engine works, nothing ends."""
        return self.control.model is not None and self.healthy and not self.door.shut

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
        visit.is_of(model.name, model.version)
        visit.span.event("submitted")
        return pending

    def answer(self, visit: Visit, call: InferCall, scores: np.ndarray) -> InferAnswer:
        """The scores as an answer to `call`."""
        self.metrics.answered(visit.model, visit.version, len(scores))
        return InferAnswer(model=visit.model, version=visit.version, id=call.id, scores=scores)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """`ModelControl.load` as clients ask for it. Raises InputError too."""
        self._check_may_change(name)
        await self.control.load(version_of(parameters))

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """`ModelControl.unload` as clients ask for it. Raises InputError too."""
        self._check_may_change(name)
        check_known(parameters, "unload_dependents")  # no model depends on another
        await self.control.unload()

    async def update_rows(self, call: InferCall, table: str) -> dict[str, Any]:
        """Writes the rows in the call's tensors. Raises what `submit` and `rows.update` do."""
        timeout_s = self.options.default_timeout_s if call.timeout_s is None else call.timeout_s
        return await rows.update(
            lambda: self.model(call.model, call.version),
            table,
            call.tensors,
            timeout_s=min(timeout_s, LONGEST_TIMEOUT_S),
        )

    def model(self, name: str, version: str = "") -> ServedModel:
        """The model of that name and version ("": any). Raises NotReady, NoSuchModel."""
        model = self.control.model
        if model is None:
            raise NotReady("the model is not loaded")
        if name != model.name or version not in ("", model.version):
            suffix = f", version {version!r}" if version else ""
            raise NoSuchModel(f"no model {name!r}{suffix} is served here")
        return model

    def _check_may_change(self, name: str) -> None:
        self.control.check_allowed()
        if self.control.name is None:
            raise NotReady("the model is not loaded yet")
        if name != self.control.name:
            raise NoSuchModel(f"no model {name!r} is served here")

    def metadata(self) -> dict[str, Any]:
        """What the server is."""
        return {"name": SERVER, "version": _version(), "extensions": EXTENSIONS}

    def index(self) -> list[dict[str, str]]:
        """Which versions of the model there are, and whether they are ready."""
        return self.control.index(ready=self.ready)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """What the model ("": all) has done so far. Raises NotReady, NoSuchModel."""
        model = self.model(name or self.control.name or "", version)
        return {"model_stats": [self.metrics.statistics(model)]}


def _bytes_of(batch: JaggedBatch) -> int:
    arrays = (batch.dense, batch.values, batch.offsets, batch.weights)
    return sum(array.nbytes for array in arrays if array is not None)


def _version() -> str:
    try:
        return version("recflow-jax")
    except PackageNotFoundError:
        return "unknown"
