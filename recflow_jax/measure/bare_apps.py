"""A server whose engine answers at once: our whole application, and two bare ones beside it.

`echo` reads the body and answers with bytes: what uvicorn costs. `bare` parses the same request by
hand and asks the same engine, without routes, checks, limits, deadlines, cancellation and metrics:
what no server of the protocol can do without. `served` is the whole of ours.
"""

import asyncio
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import orjson
import uvloop

from recflow_jax.backend import Backend, choose_backend
from recflow_jax.config import DLRMConfig
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure.clients import HEADER_LENGTH
from recflow_jax.serving.asgi import Receive, Send, respond
from recflow_jax.serving.calls import InferCall
from recflow_jax.serving.connections import UvicornServer
from recflow_jax.serving.listeners import uvicorn_config
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.options import ServerOptions
from recflow_jax.serving.pending import Landing
from recflow_jax.serving.rest import Application
from recflow_jax.serving.service import Service
from recflow_jax.serving.tensors import DTYPES

MODEL = "m"
PATHS = {"echo": "/echo", "bare": "/bare", "served": f"/v2/models/{MODEL}/infer"}
CPU = "/cpu"  # tells the process's CPU seconds
TIMEOUT_S = 10.0


def serve(config: DLRMConfig, port: Connection) -> None:
    """Until the process is terminated; sends the port that it listens on."""
    uvloop.run(_serving(config, port))


async def _serving(config: DLRMConfig, port: Connection) -> None:
    options = ServerOptions(http_port=0, grpc_port=None)
    service, landing = Service(options), Landing(asyncio.get_running_loop())
    model = ServedModel(
        InstantEngine(config),
        name=MODEL,
        version="1",
        landing=landing,
        max_body_bytes=options.max_body_bytes,
    )
    service.control.serve(model)
    listening = socket.create_server(("127.0.0.1", 0))
    port.send(listening.getsockname()[1])
    apps = Apps(model, Application(service))
    await UvicornServer(uvicorn_config(apps, options)).serve(sockets=[listening])


class InstantEngine(Engine):
    """Scores of 0, there when they are asked for."""

    def __init__(self, config: DLRMConfig) -> None:
        self._of = config

    @property
    def config(self) -> DLRMConfig:
        """The model that would be run."""
        return self._of

    @property
    def options(self) -> EngineOptions:
        """The default ones."""
        return EngineOptions()

    @property
    def max_ids_per_sample(self) -> int:
        """As many as the largest slice would hold."""
        return self.options.slice_buckets(self._of)[-1].ids

    @property
    def backend(self) -> Backend:
        """None is used."""
        return choose_backend("xla")

    def submit(self, dense: Any, sparse: Any = None, **_: Any) -> Answer:
        """Answered at once, unchecked."""
        answer = Answer()
        answer.set_result(np.zeros((dense.samples, self._of.outputs), np.float32))
        return answer


class Apps:
    """Each by its path."""

    def __init__(self, model: ServedModel, ours: Application) -> None:
        self._model = model
        self._apps = {PATHS["echo"]: self._echo, PATHS["bare"]: self._bare, CPU: self._cpu}
        self._ours = ours

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._apps.get(scope["path"], self._ours)(scope, receive, send)

    async def _cpu(self, scope: Any, receive: Receive, send: Send) -> None:
        await respond(send, 200, str(time.process_time()).encode(), [])

    async def _echo(self, scope: Any, receive: Receive, send: Send) -> None:
        body = await _whole(receive)
        await respond(send, 200, body[-4:], [(HEADER_LENGTH, b"0")])

    async def _bare(self, scope: Any, receive: Receive, send: Send) -> None:
        body = await _whole(receive)
        call = InferCall(model=MODEL, tensors=_tensors(body, dict(scope["headers"])))
        due_s = time.monotonic() + TIMEOUT_S
        pending = self._model.submit(self._model.batch(call), due_s=due_s, priority=0)
        scores = await pending.scores()
        output = {"name": "scores", "datatype": "FP32", "shape": scores.shape}
        output["parameters"] = {"binary_data_size": scores.nbytes}
        head = orjson.dumps({"model_name": MODEL, "outputs": [output]})
        headers = [(HEADER_LENGTH, str(len(head)).encode())]
        await respond(send, 200, head + scores.tobytes(), headers)


async def _whole(receive: Receive) -> bytes:
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message["body"])
        more = message["more_body"]
    return b"".join(chunks)


def _tensors(body: bytes, headers: dict[bytes, bytes]) -> dict[str, np.ndarray]:
    at = int(headers[HEADER_LENGTH])
    tensors = {}
    for entry in orjson.loads(body[:at])["inputs"]:
        size, dtype = entry["parameters"]["binary_data_size"], DTYPES[entry["datatype"]]
        flat = np.frombuffer(body, dtype, count=size // dtype.itemsize, offset=at)
        tensors[entry["name"]] = flat.reshape(entry["shape"])
        at += size
    return tensors
