"""A server from its first port to its last answer: loading, draining, ending; who may ask it."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import tritonclient.grpc
import trustme
from tritonclient.utils import InferenceServerException

from fake_clients import INFER, asking, tensors
from fake_segments import FakeSegments, scores
from fake_server import Start, starting
from recflow_jax.engine.engine import Engine
from recflow_jax.serving import control
from request_tensors import as_json
from running_server import SOON_S, RunningServer, serving, wait_for


@pytest.fixture(params=["http", "grpc"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    with starting(request.param) as start:
        yield start


def load() -> Engine:
    return Engine.from_segments(FakeSegments())


class SlowLoad:
    """Loads when it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def __call__(self) -> Engine:
        self.let.wait(SOON_S)
        return load()


@contextmanager
def triton(server: RunningServer, **options: Any) -> Iterator[Any]:
    with closing(tritonclient.grpc.InferenceServerClient(server.grpc_address, **options)) as client:
        yield client


def status(server: RunningServer, path: str) -> int:
    return httpx.get(server.http + path).status_code


# --- loading


def test_it_listens_while_it_loads_and_says_so() -> None:
    load_later = SlowLoad()
    server = RunningServer(load_later)
    with asking(server, "http") as web, asking(server, "grpc") as rpc:
        assert status(server, "/v2/health/live") == 200
        assert status(server, "/v2/health/ready") == 503
        assert status(server, "/v2/models/fake/ready") == 503
        refused = web.ask(tensors(1)).result(SOON_S)
        assert (refused.status, refused.retry_after) == (503, "1")
        assert rpc.ask(tensors(1)).result(SOON_S).status == grpc.StatusCode.UNAVAILABLE
        load_later.let.set()
        server.wait_until_ready()
        assert web.ask(tensors(1)).result(SOON_S).scores == scores(1)
    server.stop()
    assert server.ending().drained


def test_it_ends_while_it_loads() -> None:
    load_later = SlowLoad()
    server = RunningServer(load_later)
    server.stop()
    ending = server.ending()
    load_later.let.set()
    assert ending.drained and not ending.quiet


def test_what_loading_raises_ends_it() -> None:
    def fail() -> Engine:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        RunningServer(fail).ending()


@pytest.mark.parametrize("name", ["http_port", "grpc_port"])
def test_a_port_that_is_taken_is_named(name: str) -> None:
    with serving(load) as server:
        address = server.http_address if name == "http_port" else server.grpc_address
        port = int(address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1.*{port}"):
            RunningServer(load, None, **{name: port})


# --- draining


def test_what_was_accepted_is_answered_and_nothing_else_let_in(start: Start) -> None:
    fake = start()
    fake.device.hold()
    inside = [fake.ask(i) for i in range(3)]
    fake.wait_until_accepted(3)
    fake.server.stop()
    wait_for(lambda: status(fake.server, "/v2/health/ready") == 503)
    refused = fake.outcome(4)
    assert refused.status in (503, grpc.StatusCode.UNAVAILABLE)
    assert (refused.message, refused.retry_after) == ("the server is about to end", "1")
    fake.device.go_on()
    assert [answer.result(SOON_S).scores for answer in inside] == [scores(i) for i in range(3)]
    ending = fake.server.ending()
    assert ending.drained and ending.quiet


def test_a_device_that_hangs_does_not_keep_it_from_ending(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CLOSING_S", 0.2)
    fake = start(drain_s=0.2)
    fake.device.hold()
    inside = fake.ask(1)
    fake.wait_until_accepted(1)
    fake.server.stop()
    outcome = inside.result(SOON_S)
    assert outcome.status in (503, grpc.StatusCode.UNAVAILABLE)
    assert outcome.message == "the engine was closed before it came to the request"
    ending = fake.server.ending()
    assert not ending.drained and not ending.quiet


# --- who may ask


def test_a_token_is_asked_for() -> None:
    with serving(load, token="open sesame") as server:
        body, right = as_json(tensors(1)), {"authorization": "Bearer open sesame"}
        for wrong in ({}, {"authorization": "Bearer open"}, {"authorization": "sesame"}):
            answer = httpx.post(server.http + INFER, json=body, headers=wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert httpx.get(server.http + "/metrics", headers=wrong).status_code == 401
            assert httpx.get(server.http + "/v2", headers=wrong).status_code == 401
        assert httpx.post(server.http + INFER, json=body, headers=right).status_code == 200
        with triton(server) as client:
            assert client.is_server_ready()
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.get_model_metadata("fake")
            assert client.get_model_metadata(
                "fake", headers={k.lower(): v for k, v in right.items()}
            )


def test_a_certificate_that_is_none_is_named(tmp_path: Path) -> None:
    pair = {"tls_certificate": tmp_path / "chain.pem", "tls_key": tmp_path / "key.pem"}
    for path in pair.values():
        path.write_text("no certificate")
    with pytest.raises(OSError, match="chain.pem.*key.pem: not a certificate and its key in PEM"):
        RunningServer(load, None, **pair)


def test_tls(tmp_path: Path) -> None:
    authority, files = trustme.CA(), {n: tmp_path / n for n in ("ca.pem", "chain.pem", "key.pem")}
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files["ca.pem"])
    issued.private_key_pem.write_to_path(files["key.pem"])
    for pem in issued.cert_chain_pems:
        pem.write_to_path(files["chain.pem"], append=True)
    pair = {"tls_certificate": files["chain.pem"], "tls_key": files["key.pem"]}
    server = RunningServer(load, None, **pair)
    trusted = ssl.create_default_context(cafile=files["ca.pem"])
    with httpx.Client(base_url=server.http, verify=trusted) as client:
        wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.post(INFER, json=as_json(tensors(1))).status_code == 200
    with triton(server, ssl=True, root_certificates=str(files["ca.pem"])) as client:
        assert client.is_server_ready()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.http + "/v2/health/live")
    server.stop()
    assert server.ending().drained
