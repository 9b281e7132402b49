"""Real clients of the protocol against a server: answers are the engine's, errors say why."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from recflow_jax.engine.engine import Engine
from request_tensors import BOTH_SIDES, Tensors, as_inputs, as_json, packed, request
from running_server import RunningServer, serving
from small_models import assert_same_scores, compiled, params_of, reference_scores

NAME = BOTH_SIDES.name
BATCH = request(BOTH_SIDES, 5, seed=3, one_user=True)
TENSORS = packed(BOTH_SIDES, BATCH, one_user=True)
OUTSIDE = TENSORS | {"user_values": TENSORS["user_values"] + 1000}
NOT_FINITE = TENSORS | {"dense": np.where(np.arange(5) == 3, np.nan, TENSORS["dense"])}
INFER = f"/v2/models/{NAME}/infer"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(lambda: Engine.from_segments(compiled(BOTH_SIDES)), max_body_bytes=2**20) as it:
        yield it


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http) as client:
        yield client


class OnLoop:
    """A client whose methods are coroutines, called as if they were not."""

    def __init__(self, kind: Any, address: str) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._made(kind, address))

    async def _made(self, kind: Any, address: str) -> Any:
        return kind(address)

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self._runner.run(
            getattr(self._client, name)(*given, **named)
        )

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@dataclass(frozen=True)
class Clients:
    """One of tritonclient's, and the module that its inputs are of."""

    ask: Any
    module: Any

    def infer(self, tensors: Tensors, model: str = NAME, **terms: Any) -> np.ndarray:
        answer = self.ask.infer(model, as_inputs(self.module, tensors), **terms)
        return answer.as_numpy("scores")

    def told(self, method: str, *arguments: str) -> Any:
        """What a method tells, as JSON."""
        as_json = {"as_json": True} if self.module is tritonclient.grpc else {}
        return getattr(self.ask, method)(*arguments, **as_json)


@pytest.fixture(scope="module", params=["http", "grpc", "http aio", "grpc aio"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Clients]:
    """Over each protocol, blocking and on an event loop."""
    protocol, *aio = request.param.split()
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    address = getattr(server, f"{protocol}_address")
    kind = module.InferenceServerClient
    made = OnLoop(module.aio.InferenceServerClient, address) if aio else kind(address)
    yield Clients(made, module)
    made.close()


def assert_right(scores: Any) -> None:
    expected = reference_scores(BOTH_SIDES, params_of(BOTH_SIDES), BATCH)
    assert_same_scores(BOTH_SIDES, np.asarray(scores), expected)


def test_health(client: Clients) -> None:
    assert client.ask.is_server_live() and client.ask.is_server_ready()
    assert client.ask.is_model_ready(NAME) and client.ask.is_model_ready(NAME, "1")


def test_answers_are_the_engines(client: Clients) -> None:
    assert_right(client.infer(TENSORS))
    assert_right(client.infer(packed(BOTH_SIDES, BATCH), model_version="1", request_id="7"))
    assert_right(client.infer(TENSORS, timeout=10**7, priority=2))


def test_what_the_server_and_its_models_are(client: Clients, web: httpx.Client) -> None:
    assert client.told("get_server_metadata") == web.get("/v2").json()
    index = client.told("get_model_repository_index")
    (model,) = index if isinstance(index, list) else index["models"]
    assert (model["name"], model["version"], model["state"]) == (NAME, "1", "READY")


def test_statistics_are_of_what_was_asked(client: Clients) -> None:
    before = counted(client)
    client.infer(TENSORS)
    assert [counted(client)[i] - before[i] for i in range(2)] == [5, 1]


def counted(client: Clients) -> tuple[int, int]:
    """Samples, and requests that had an answer."""
    (model,) = client.told("get_inference_statistics", NAME)["model_stats"]
    success = model["inference_stats"]["success"]
    return int(model.get("inference_count", 0)), int(success.get("count", 0))


def test_metadata_is_enough_to_build_a_request(client: Clients) -> None:
    config = client.told("get_model_config", NAME)
    config = config.get("config", config)
    said = {name: value["string_value"] for name, value in config["parameters"].items()}
    inputs = client.told("get_model_metadata", NAME)["inputs"]
    tensors = built(inputs, json.loads(said["features"]), json.loads(said["optional_inputs"]))
    assert client.infer(tensors).shape == (4, 2)


def test_metadata_over_http_is_enough_alone(web: httpx.Client) -> None:
    told = web.get(f"/v2/models/{NAME}").json()
    said = {name: json.loads(told["properties"][name]) for name in ("features", "optional_inputs")}
    tensors = built(told["inputs"], said["features"], said["optional_inputs"])
    answer = web.post(INFER, json=as_json(tensors)).json()
    assert answer["outputs"][0]["shape"] == [4, 2]


def built(inputs: list[Any], features: list[Any], optional: list[str], samples: int = 4) -> Tensors:
    """A request of one id a bag, from what a server says of its model."""
    shapes = {t["name"]: [int(n) for n in t["shape"]] for t in inputs if t["name"] not in optional}
    assert {*shapes} == {"dense", "values", "lengths"}
    ids = [s % feature["rows"] for feature in features for s in range(samples)]
    return {
        "dense": np.zeros([samples, shapes["dense"][1]], np.float32),
        "values": np.array(ids, np.int64),
        "lengths": np.ones([shapes["lengths"][0], samples], np.int32),
    }


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        (NAME, OUTSIDE, r"feature 'user', sample 0: id \d+ is not in \[0, 50\)"),
        (NAME, NOT_FINITE, "sample 0"),
        (NAME, {"values": TENSORS["values"]}, "input 'dense' is missing"),
        ("other", TENSORS, "no model 'other' is served here"),
    ],
)
def test_errors_say_why(client: Clients, model: str, tensors: Tensors, message: str) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.infer(tensors, model=model)
    assert raised.match(message)
    status = {
        NAME: ("400", "StatusCode.INVALID_ARGUMENT"),
        "other": ("404", "StatusCode.NOT_FOUND"),
    }
    assert raised.value.status() in status[model]


def test_tensors_in_shared_memory_are_refused(client: Clients) -> None:
    inputs = as_inputs(client.module, TENSORS)
    dense = next(tensor for tensor in inputs if tensor.name() == "dense")
    dense.set_shared_memory("region", 20)
    with pytest.raises(InferenceServerException, match="input 'dense': shared memory is not used"):
        client.ask.infer(NAME, inputs)
    scores = client.module.InferRequestedOutput("scores")
    scores.set_shared_memory("region", 40)
    with pytest.raises(InferenceServerException, match="output 'scores': shared memory is not"):
        client.infer(TENSORS, outputs=[scores])


def test_classes_are_refused(client: Clients) -> None:
    classes = client.module.InferRequestedOutput("scores", class_count=2)
    with pytest.raises(InferenceServerException, match="'scores': no classification is done here"):
        client.infer(TENSORS, outputs=[classes])


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config"])
def test_of_other_models_nothing_is_told(client: Clients, method: str) -> None:
    with pytest.raises(InferenceServerException, match="no model 'concat', version '2' is served"):
        getattr(client.ask, method)("concat", "2")


def test_tensors_may_come_as_json(server: RunningServer) -> None:
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        asked = [tritonclient.http.InferRequestedOutput("scores", binary_data=False)]
        listed = as_inputs(tritonclient.http, TENSORS, binary_data=False)
        answer = client.infer(NAME, listed, outputs=asked)
    assert "data" in (answer.get_output("scores") or {})
    assert_right(answer.as_numpy("scores"))


def test_plain_http_with_json(web: httpx.Client) -> None:
    answer = web.post(f"/v2/models/{NAME}/versions/1/infer", json=as_json(TENSORS) | {"id": "42"})
    assert (answer.status_code, answer.json()["id"]) == (200, "42")
    (output,) = answer.json()["outputs"]
    assert (output["name"], output["datatype"]) == ("scores", "FP32")
    assert_right(np.array(output["data"], np.float32).reshape(output["shape"]))


def test_plain_http_with_bytes(web: httpx.Client) -> None:
    body = as_json(TENSORS, binary_data_output=True)
    for entry, array in zip(body["inputs"], TENSORS.values(), strict=True):
        del entry["data"]
        entry["parameters"] = {"binary_data_size": array.nbytes}
    header = json.dumps(body).encode()
    content = header + b"".join(array.tobytes() for array in TENSORS.values())
    length = {"Inference-Header-Content-Length": str(len(header))}
    answer = web.post(INFER, content=content, headers=length)
    said = int(answer.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(answer.content[:said])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer.content) - said
    assert_right(np.frombuffer(answer.content[said:], "<f4").reshape(output["shape"]))


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats"])
def test_paths_may_name_the_version(web: httpx.Client, path: str) -> None:
    plain = web.get(f"/v2/models/{NAME}{path}")
    assert plain.status_code == 200
    assert web.get(f"/v2/models/{NAME}/versions/1{path}").json() == plain.json()
    assert web.get(f"/v2/models/{NAME}/versions/2{path}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/stats", 200),
        ("POST", "/v2/repository/index", 200),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/nothing", 404),
    ],
)
def test_paths(web: httpx.Client, method: str, path: str, status: int) -> None:
    answer = web.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"] if status >= 400 else answer.json()


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "3"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, 400),
        (b"{}", {"Inference-Timeout-Ms": "soon"}, 400),
        (b"{}", {"Content-Encoding": "gzip"}, 415),
        (b" " * (2**20 + 1), {}, 413),
    ],
)
def test_bodies_that_are_refused(
    web: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = web.post(INFER, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]
