"""Clients of the fake device's model, over both protocols: each request a future of its outcome."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np

from fake_segments import samples
from recflow_jax.serving.rpc_messages import MESSAGES, SERVICE
from request_tensors import Tensors, as_json
from running_server import SOON_S, RunningServer

INFER = "/v2/models/fake/infer"
AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a request ended: HTTP's status or gRPC's, and its scores, or why there are none."""

    status: int | grpc.StatusCode
    scores: list[list[float]] | None = None
    message: str = ""
    retry_after: str | None = None


def tensors(*dense: float, ids: int = 1) -> Tensors:
    """`samples` of the fake with the same arguments, packed."""
    batch = samples(*dense, ids=ids)
    lengths = np.full((1, len(dense)), ids, np.int32)
    return {"dense": batch.dense, "values": batch.values, "lengths": lengths}


class HttpAsker:
    """Asks over HTTP, on threads."""

    def __init__(self, server: RunningServer) -> None:
        self._client = httpx.Client(base_url=server.http, timeout=SOON_S)
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def ask(
        self, asked: Tensors, *, deadline_s: float | None = None, **parameters: Any
    ) -> Future[Outcome]:
        headers = {"Inference-Timeout-Ms": str(1000 * deadline_s)} if deadline_s else {}
        body = as_json(asked, **parameters)
        return self._pool.submit(self._post, body, headers)

    def _post(self, body: dict[str, Any], headers: dict[str, str]) -> Outcome:
        answer = self._client.post(INFER, json=body, headers=headers)
        if answer.status_code != 200:
            message, retry_after = answer.json()["error"], answer.headers.get("retry-after")
            return Outcome(status=answer.status_code, message=message, retry_after=retry_after)
        (output,) = answer.json()["outputs"]
        return Outcome(status=200, scores=np.reshape(output["data"], output["shape"]).tolist())

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()


class GrpcAsker:
    """Asks over gRPC."""

    def __init__(self, server: RunningServer) -> None:
        self._channel = grpc.insecure_channel(server.grpc_address)
        self.infer = self._channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )

    def ask(
        self, asked: Tensors, *, deadline_s: float | None = None, **parameters: int
    ) -> Future[Outcome]:
        outcome: Future[Outcome] = Future()
        call = self.infer.future(message(asked, **parameters), timeout=deadline_s)
        call.add_done_callback(lambda done: outcome.set_result(_outcome(done)))
        return outcome

    def close(self) -> None:
        self._channel.close()


def message(asked: Tensors, **parameters: int) -> Any:
    """A ModelInferRequest."""
    made = MESSAGES["ModelInferRequest"](model_name="fake")
    for name, value in parameters.items():
        made.parameters[name].int64_param = value
    for entry, array in zip(as_json(asked)["inputs"], asked.values(), strict=True):
        del entry["data"]
        made.inputs.add(**entry)
        made.raw_input_contents.append(array.tobytes())
    return made


def _outcome(call: Any) -> Outcome:
    if call.code() != grpc.StatusCode.OK:
        trailing = dict(call.trailing_metadata() or ())
        retry_after = trailing.get("retry-after")
        return Outcome(status=call.code(), message=call.details(), retry_after=retry_after)
    answer = call.result()
    scores = np.frombuffer(answer.raw_output_contents[0], "<f4")
    return Outcome(status=call.code(), scores=scores.reshape(answer.outputs[0].shape).tolist())


ASKERS: dict[str, Callable[[RunningServer], Any]] = {"http": HttpAsker, "grpc": GrpcAsker}


@contextmanager
def asking(server: RunningServer, protocol: str) -> Iterator[Any]:
    """An asker, closed at the end."""
    asker = ASKERS[protocol](server)
    try:
        yield asker
    finally:
        asker.close()
