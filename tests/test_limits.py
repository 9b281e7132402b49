"""What a server lets in, how long it waits and what it says of the rest, over both protocols."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import suppress
from unittest.mock import Mock

import grpc
import httpx
import pytest

from fake_clients import INFER, message, tensors
from fake_segments import scores
from fake_server import FakeServer, Start, starting
from recflow_jax.serving import connections
from request_tensors import as_json
from running_server import SOON_S, wait_for

Code = grpc.StatusCode
OK = (200, Code.OK)
FULL = (429, Code.RESOURCE_EXHAUSTED)


@pytest.fixture(params=["http", "grpc"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts a server with options and an asker over one protocol."""
    with starting(request.param) as start:
        yield start


@pytest.fixture
def start_http() -> Iterator[Start]:
    with starting("http") as start:
        yield start


# --- admission


def test_the_queue_is_bounded_exactly(start: Start) -> None:
    """64 samples fit: not one more is let in, and those that are in are all answered."""
    fake = start()
    fake.device.hold()
    inside = [fake.ask(*range(i, i + 16)) for i in range(4)]
    fake.wait_until_accepted(4)
    assert fake.engine.stats().queued_samples == 64
    refused = fake.outcome(0)
    assert refused.status in FULL and refused.retry_after == "1"
    assert refused.message == "64 of at most 64 samples wait, 1 more do not fit"
    fake.device.go_on()
    for i, answer in enumerate(inside):
        assert answer.result(SOON_S).scores == scores(*range(i, i + 16))
    assert fake.outcome(0).status in OK


def test_requests_inside_are_bounded(start: Start) -> None:
    fake = start(max_requests=2)
    fake.device.hold()
    inside = [fake.ask(i) for i in range(2)]
    fake.wait_until_accepted(2)
    refused = fake.outcome(0)
    assert refused.status in FULL and refused.retry_after == "1"
    fake.device.go_on()
    assert all(answer.result(SOON_S).status in OK for answer in inside)


def test_bytes_inside_are_bounded(start: Start) -> None:
    fake = start(max_buffered_bytes=1500)  # a body, and its samples laid out
    fake.device.hold()
    inside = fake.ask(*range(16))
    fake.wait_until_accepted(1)
    assert "more do not fit" in fake.outcome(*range(60)).message
    fake.device.go_on()
    assert inside.result(SOON_S).status in OK
    assert all(fake.outcome(*range(16)).status in OK for _ in range(3))


def test_samples_laid_out_are_bytes_inside(start_http: Start) -> None:
    asked = tensors(*range(40))
    body, laid_out = (
        len(httpx.Request("POST", "http://h", json=as_json(asked)).content),
        40 * 16 + 8,
    )
    for room, statuses in ((laid_out - 1, {429}), (laid_out, {200})):
        fake = start_http(max_buffered_bytes=body + room)
        assert {fake.asker.ask(asked).result(SOON_S).status} == statuses


# --- deadlines, cancellation, priorities


def test_deadlines_reach_the_engine(start: Start) -> None:
    fake = start()
    fake.device.hold()
    late = fake.outcome(1, deadline_s=0.05)
    assert late.status in (504, Code.DEADLINE_EXCEEDED)
    in_the_request = fake.outcome(2, timeout=50_000)
    assert in_the_request.status in (504, Code.DEADLINE_EXCEEDED)
    wait_for(lambda: fake.engine.stats().queued_samples == 0)
    fake.device.go_on()
    assert fake.outcome(3, deadline_s=SOON_S, timeout=10**9).scores == scores(3)


@pytest.mark.parametrize("terms", [{"deadline_s": 20, "timeout": 10**9}, {"deadline_s": 999}])
def test_the_engine_is_told_the_earliest(
    start: Start, terms: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = start(default_timeout_s=1)
    submit = Mock(side_effect=fake.engine.submit)
    monkeypatch.setattr(fake.engine, "submit", submit)
    asked_ms = 1000 * terms["deadline_s"]
    for more in ({}, {"timeout": 15_000_000}):
        assert fake.outcome(1, **terms | more).status in OK
        least_ms = min([asked_ms, *(us / 1000 for us in more.values())])
        told_ms = submit.call_args.kwargs["deadline_ms"]  # gRPC rounds timeouts up, by 1 % at most
        assert 0.5 * least_ms < told_ms <= 1.01 * least_ms


def test_a_timeout_may_be_longer_than_any_clock(start_http: Start) -> None:
    fake = start_http()
    for terms in ({"deadline_s": 1e305}, {"timeout": 2**63 - 1}):
        assert fake.outcome(1, **terms).status == 200


def test_requests_without_a_deadline_get_one(start: Start) -> None:
    fake = start(default_timeout_s=0.05)
    fake.device.hold()
    assert fake.outcome(1).status in (504, Code.DEADLINE_EXCEEDED)


def test_lower_priorities_run_first(start: Start) -> None:
    fake = start()
    fake.device.hold()
    first = fake.ask(*range(16))
    wait_for(lambda: fake.engine.stats().steps == fake.device.options.max_steps_in_flight)
    later = []
    for accepted, priority in ((2, 2), (3, 1)):
        later.append(fake.ask(100.0 * priority, priority=priority))
        fake.wait_until_accepted(accepted)
    fake.device.go_on()
    wait([first, *later], SOON_S)
    seen = [value for batch in fake.device.batches_seen for value in batch]
    assert seen.index(110.0) < seen.index(210.0)


def test_a_client_that_leaves_cancels_over_http(start_http: Start) -> None:
    fake = start_http()
    fake.device.hold()
    body = json.dumps(as_json(tensors(1, 2))).encode()
    head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
    with _connected(fake) as client:
        client.sendall(head % (INFER.encode(), len(body)) + body)
        fake.wait_until_accepted(1)
    wait_for(lambda: fake.engine.stats().cancelled == 1)
    assert fake.engine.stats().queued_samples == 0


def test_a_client_that_leaves_cancels_over_grpc() -> None:
    with starting("grpc") as start:
        fake = start()
        fake.device.hold()
        call = fake.asker.infer.future(message(tensors(1, 2)))
        fake.wait_until_accepted(1)
        call.cancel()
        wait_for(lambda: fake.engine.stats().cancelled == 1)
        assert fake.engine.stats().queued_samples == 0


# --- a device that fails


@pytest.mark.parametrize("how", ["break_next", "lose_next"])
@pytest.mark.parametrize("what", ["embed", "start", "run"])
def test_a_failed_step_fails_its_requests_alone(start: Start, how: str, what: str) -> None:
    fake = start()
    getattr(fake.device, how)(what)
    failed = fake.outcome(1)
    assert failed.status in (500, Code.INTERNAL)
    assert failed.message.startswith("a step of the request's batch failed: DeviceBroke")
    assert fake.outcome(2).scores == scores(2)


def test_a_device_that_hangs_makes_the_server_unready(start_http: Start) -> None:
    fake = start_http(heartbeat_s=0.05)
    fake.device.hold()
    ready = fake.server.http + "/v2/health/ready"
    wait_for(lambda: httpx.get(ready).status_code == 503)
    assert fake.outcome(1, deadline_s=0.05).status == 504
    fake.device.go_on()
    wait_for(lambda: httpx.get(ready).status_code == 200)


# --- clients that stall


def test_half_a_body_is_not_waited_for(start_http: Start) -> None:
    fake = start_http(body_timeout_s=0.05)
    with _connected(fake) as client:
        client.sendall(
            b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{" % INFER.encode()
        )
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 0.05 s" in answer


def test_half_a_head_is_not_waited_for(start_http: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)
    fake = start_http()
    for said in (b"", b"POST /v2 HTTP/1.1\r\nHo"):
        with _connected(fake) as client:
            client.sendall(said)
            assert client.recv(1) == b""


def test_headers_without_an_end_are_not_kept(
    start_http: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 10 * SOON_S)
    fake = start_http()
    with _connected(fake) as client, suppress(ConnectionError):
        client.sendall(b"GET / HTTP/1.1\r\nHost: " + b"h" * 2**18)
        assert client.recv(1) == b""


def test_a_request_may_take_longer_than_its_headers(
    start_http: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)
    fake = start_http()
    fake.device.hold()
    assert fake.outcome(1, deadline_s=0.3).status == 504


def test_bodies_of_unknown_length_are_bounded(start_http: Start) -> None:
    fake = start_http(max_body_bytes=1000)
    answer = httpx.post(fake.server.http + INFER, content=(b" " * 100 for _ in range(11)))
    assert answer.status_code == 413 and "more than the 1000 bytes" in answer.json()["error"]


def _connected(fake: FakeServer) -> socket.socket:
    host, port = fake.server.http_address.split(":")
    return socket.create_connection((host, int(port)), timeout=SOON_S)
