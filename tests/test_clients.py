"""Real clients of the protocol against a server: answers are the engine's, errors say why."""

import asyncio
from collections.abc import Iterator
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
from request_tensors import BOTH_SIDES, Tensors, packed, request
from running_server import RunningServer, serving
from small_models import assert_same_scores, compiled, params_of, reference_scores

NAME = BOTH_SIDES.name
BATCH = request(BOTH_SIDES, 5, seed=3, one_user=True)
TENSORS = packed(BOTH_SIDES, BATCH, one_user=True)
OUTSIDE = TENSORS | {"user_values": TENSORS["user_values"] + 1000}
DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(lambda: Engine.from_segments(compiled(BOTH_SIDES)), max_body_bytes=2**20) as it:
        yield it


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http) as client:
        yield client


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Any]:
    """tritonclient's, over each protocol."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    made = module.InferenceServerClient(getattr(server, f"{request.param}_address"))
    yield made
    made.close()


def module_of(client: Any) -> Any:
    return tritonclient.http if ".http." in type(client).__module__ else tritonclient.grpc


def inputs(module: Any, tensors: Tensors, **how: bool) -> list[Any]:
    made = []
    for name, array in tensors.items():
        tensor = module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        tensor.set_data_from_numpy(array, **how)
        made.append(tensor)
    return made


def assert_right(scores: Any) -> None:
    expected = reference_scores(BOTH_SIDES, params_of(BOTH_SIDES), BATCH)
    assert_same_scores(BOTH_SIDES, np.asarray(scores), expected)


def test_health(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(NAME)


def test_answers_are_the_engines(client: Any) -> None:
    answer = client.infer(NAME, inputs(module_of(client), TENSORS), request_id="7", timeout=10**7)
    assert_right(answer.as_numpy("scores"))


def test_json_says_the_same(server: RunningServer) -> None:
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        asked = [tritonclient.http.InferRequestedOutput("scores", binary_data=False)]
        listed = inputs(tritonclient.http, TENSORS, binary_data=False)
        answer = client.infer(NAME, listed, outputs=asked)
    assert "data" in (answer.get_output("scores") or {})
    assert_right(answer.as_numpy("scores"))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_clients_on_an_event_loop(server: RunningServer, protocol: str) -> None:
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]

    async def ask() -> Any:
        address = getattr(server, f"{protocol}_address")
        async with module.aio.InferenceServerClient(address) as client:
            return await client.infer(NAME, inputs(module, TENSORS))

    assert_right(asyncio.run(ask()).as_numpy("scores"))


def test_what_the_server_and_its_model_are(server: RunningServer) -> None:
    with (
        tritonclient.http.InferenceServerClient(server.http_address) as web,
        tritonclient.grpc.InferenceServerClient(server.grpc_address) as rpc,
    ):
        assert web.get_server_metadata() == told(rpc.get_server_metadata)
        by_web, by_rpc = web.get_model_metadata(NAME), told(rpc.get_model_metadata, NAME)
        names = {tensor["name"] for tensor in by_web["inputs"]}
        assert names == {tensor["name"] for tensor in by_rpc["inputs"]} >= {*TENSORS}
        config = told(rpc.get_model_config, NAME)["config"]
        optional = {tensor["name"] for tensor in config["input"] if tensor.get("optional")}
        assert optional == names - {"dense", "values", "lengths"}
        (ours,) = told(rpc.get_inference_statistics, NAME)["model_stats"]
        (same,) = web.get_inference_statistics(NAME)["model_stats"]
        assert int(ours.get("inference_count", 0)) == same["inference_count"]


def told(ask: Any, *arguments: str) -> dict[str, Any]:
    """What a gRPC client gets, as JSON."""
    return ask(*arguments, as_json=True)


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        (NAME, OUTSIDE, r"feature 'user', sample 0: id \d+ is not in \[0, 50\)"),
        (NAME, {"values": TENSORS["values"]}, "input 'dense' is missing"),
        ("other", TENSORS, "no model 'other' is served here"),
    ],
)
def test_errors_say_why(client: Any, model: str, tensors: Tensors, message: str) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.infer(model, inputs(module_of(client), tensors))
    assert raised.match(message)


def test_a_deadline_that_has_passed(web: httpx.Client) -> None:
    body = {
        "inputs": [
            {
                "name": name,
                "datatype": DATATYPES[array.dtype.name],
                "shape": array.shape,
                "data": array.ravel().tolist(),
            }
            for name, array in TENSORS.items()
        ]
    }
    path = f"/v2/models/{NAME}/infer"
    assert web.post(path, json=body, headers={"Inference-Timeout-Ms": "0"}).status_code == 504
    assert web.post(path, json=body, headers={"Inference-Timeout-Ms": "60000"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "3"}, 400),
        (b"{}", {"Inference-Timeout-Ms": "soon"}, 400),
        (b"{}", {"Content-Encoding": "gzip"}, 415),
        (b" " * (2**20 + 1), {}, 413),
    ],
)
def test_bodies_that_are_refused(
    web: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = web.post(f"/v2/models/{NAME}/infer", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_metrics_count_requests_and_what_the_engine_did(web: httpx.Client) -> None:
    text = web.get("/metrics").text
    assert "recflow_ready 1.0" in text
    assert f'recflow_engine_queued_samples{{model="{NAME}",version="1"}} 0.0' in text
