"""Floods, clients that leave or lie, engines that end: what was accepted has exactly one end."""

import asyncio
import gc
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import httpx
import numpy as np
import pytest

from fake_clients import INFER, message, tensors
from fake_segments import FakeSegments, samples, scores
from fake_server import FakeServer, Start, starting
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import DeadlineExceeded
from recflow_jax.measure.memory import is_flat, sampled
from recflow_jax.serving.pending import Pending
from request_tensors import as_json
from running_server import SOON_S, wait_for

EIGHT = tensors(*range(8))
GONE = (503, grpc.StatusCode.UNAVAILABLE)


@pytest.fixture(params=["http", "grpc"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    with starting(request.param) as start:
        yield start


@pytest.fixture
def start_http() -> Iterator[Start]:
    with starting("http") as start:
        yield start


@pytest.fixture
def start_grpc() -> Iterator[Start]:
    with starting("grpc") as start:
        yield start


def assert_nothing_is_left(fake: FakeServer) -> None:
    """Of all that was accepted: no sample in the queue, no request inside, no object alive."""
    wait_for(lambda: fake.engine.stats().queued_samples == 0)
    wait_for(lambda: "recflow_inside 0.0" in httpx.get(fake.server.http + "/metrics").text)
    wait_for(lambda: not pending_alive())
    assert fake.outcome(1).scores == scores(1)


def pending_alive() -> int:
    gc.collect()
    return sum(type(found) is Pending for found in gc.get_objects())


def connected(fake: FakeServer) -> socket.socket:
    host, port = fake.server.http_address.split(":")
    return socket.create_connection((host, int(port)), timeout=SOON_S)


def posted(body: bytes, *headers: bytes, said: int | None = -2) -> bytes:
    """A request, with its length as it is said to be (-2: as it is)."""
    length = len(body) if said == -2 else said
    lengths = [] if said is None else [b"Content-Length: %d" % length]
    head = [b"POST %b HTTP/1.1" % INFER.encode(), b"Host: h", *lengths, *headers]
    return b"\r\n".join([*head, b"", body])


# --- more than it can do


@dataclass(frozen=True)
class Flooded:
    """One request of a flood: its status, and how long that took."""

    status: int
    seconds: float


async def flood(url: str, per_s: float, seconds: float) -> list[Flooded]:
    """Eight samples a request, sent when due, whatever has been answered; answers are checked."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=SOON_S) as client:

        async def ask(due_s: float) -> Flooded:
            await asyncio.sleep(due_s)
            started = time.perf_counter()
            answer = await client.post(INFER, json=as_json(EIGHT))
            if answer.status_code == 200:
                data = answer.json()["outputs"][0]["data"]
                assert [[score] for score in data] == scores(*range(8))
            return Flooded(answer.status_code, time.perf_counter() - started)

        return await asyncio.gather(*(ask(i / per_s) for i in range(int(seconds * per_s))))


def test_a_flood_is_answered_in_bounded_time_or_refused_at_once(start_http: Start) -> None:
    """Ten times what the device can do, for 20 seconds. An accepted request waits for a full queue
    at most, and memory, of client and server together, stays flat. So slow a device leaves time to
    the client, whose own delays would count as the server's.
    """
    fake = start_http()
    fake.device.takes_s = 0.09
    started = time.perf_counter()
    seen = sampled(os.getpid(), lambda: 0, every_s=0.25, on_sample=lambda memory: None)
    with seen as memory:
        outcomes = asyncio.run(flood(fake.server.http, per_s=27, seconds=20))
    assert is_flat(memory)
    answered_per_s = fake.engine.stats().samples_answered / (time.perf_counter() - started)
    assert {outcome.status for outcome in outcomes} == {200, 429}
    taken = {s: [o.seconds for o in outcomes if o.status == s] for s in (200, 429)}
    assert 10 * len(taken[200]) < 4 * len(outcomes)
    queue_s = fake.engine.options.max_queued_samples / answered_per_s
    assert np.percentile(taken[200], 99) < 3 * queue_s
    assert np.median(taken[429]) < 0.5 * np.median(taken[200])
    stats = fake.engine.stats()
    assert stats.requests_accepted == stats.requests_answered == len(taken[200])
    assert stats.rejected == {"queue_full": len(taken[429])}
    assert_nothing_is_left(fake)


# --- a device that is slow


def test_a_slow_device_answers_in_time_or_not_at_all() -> None:
    """Steps of 30 ms and a full queue: some requests are answered, others would be too late."""
    device = FakeSegments()
    device.takes_s = 0.03
    with Engine.from_segments(device) as engine:
        asked = {i: engine.submit(samples(*range(i, i + 4)), deadline_ms=500) for i in range(16)}
        late = [i for i, answer in asked.items() if answer.exception(SOON_S)]
        stats = engine.stats()
    right = {i: answer.result() for i, answer in asked.items() if i not in late}
    assert all(right[i].tolist() == scores(*range(i, i + 4)) for i in right)
    assert all(isinstance(asked[i].exception(), DeadlineExceeded) for i in late)
    assert right and late and stats.requests_accepted == 16
    assert (stats.requests_answered, stats.rejected["deadline"]) == (len(right), len(late))


# --- clients that leave


@pytest.mark.usefixtures("unchecked")
def test_ten_thousand_are_cancelled_at_random_moments() -> None:
    """Requests that wait, that are on the device, and whose answers are on their way."""
    device, random_, right, cancelled = FakeSegments(), random.Random(1), 0, 0
    device.takes_s = 0.0002
    with Engine.from_segments(device) as engine:
        inside: list[tuple[int, Answer]] = []
        for value in itertools.count():
            if cancelled >= 10_000:
                break
            inside.append((value, engine.submit(samples(value, value + 1))))
            if len(inside) > random_.randrange(20):
                asked, answer = inside.pop(random_.randrange(len(inside)))
                if random_.random() >= 0.1 and answer.cancel():
                    cancelled += 1
                else:
                    assert answer.result(SOON_S).tolist() == scores(asked, asked + 1)
                    right += 1
        assert right > 500
        for asked, answer in inside:
            assert answer.result(SOON_S).tolist() == scores(asked, asked + 1)
        stats = engine.stats()
    assert stats.requests_accepted == stats.requests_answered + stats.cancelled
    assert (stats.requests_answered, stats.cancelled) == (right + len(inside), cancelled)
    assert stats.queued_samples == 0


@pytest.mark.usefixtures("unchecked")
def test_thousands_of_calls_cancelled_at_random(start_grpc: Start) -> None:
    fake = start_grpc()
    fake.device.takes_s = 0.0005
    random_, calls, right = random.Random(1), [], 0
    for i in range(1500):
        calls.append((i, fake.asker.infer.future(message(tensors(i, i + 1)))))
        if len(calls) > 12:
            value, call = calls.pop(random_.randrange(len(calls)))
            if random_.random() < 0.8:
                call.cancel()
            else:
                found = np.frombuffer(call.result(SOON_S).raw_output_contents[0], "<f4")
                assert [[score] for score in found] == scores(value, value + 1)
                right += 1
    assert right > 200
    for _, call in calls:
        call.cancel()
    assert_nothing_is_left(fake)
    stats = fake.engine.stats()
    assert stats.requests_accepted == stats.requests_answered + stats.cancelled
    assert stats.failed == 0 and stats.requests_answered >= right


def test_connections_closed_at_random(start_http: Start) -> None:
    fake = start_http()
    fake.device.takes_s = 0.0005
    random_ = random.Random(1)
    sent = posted(json.dumps(as_json(tensors(1, 2))).encode())
    open_, right = [], 0
    for _ in range(500):
        open_.append(connected(fake))
        open_[-1].sendall(sent[: random_.choice([5, 100, len(sent), len(sent), len(sent)])])
        if len(open_) > 8:
            with open_.pop(random_.randrange(len(open_))) as client:
                if random_.random() < 0.2:
                    client.shutdown(socket.SHUT_WR)
                    right += b" 200 OK" in client.makefile("rb").readline()
    for client in open_:
        client.close()
    assert_nothing_is_left(fake)
    stats = fake.engine.stats()
    assert stats.requests_accepted == stats.requests_answered + stats.cancelled
    assert stats.failed == 0 and stats.requests_answered >= right


# --- clients that lie


BODY = json.dumps(as_json(tensors(1, 2))).encode()
LIES = {
    "longer than said": posted(BODY, said=len(BODY) - 9),
    "shorter than said": posted(BODY, said=len(BODY) + 9),
    "a length below nothing": posted(BODY, said=-1),
    "two lengths": posted(BODY, b"Content-Length: 3"),
    "chunks and a length": posted(BODY, b"Transfer-Encoding: chunked"),
    "a gap in its chunks": posted(b"5\r\n{}\r\n", b"Transfer-Encoding: chunked", said=None),
    "tensors longer than the body": posted(BODY, b"Inference-Header-Content-Length: 999999"),
    "headers without an end": b"POST / HTTP/1.1\r\nHost: " + b"h" * 2**18,
    "no HTTP": b"\x16\x03\x01" + bytes(range(256)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_harms_nobody_else(start_http: Start, lie: str) -> None:
    """It gets an error or nothing, and its connection is closed once it sends no more."""
    fake = start_http(body_timeout_s=0.2)
    answers = b""
    with connected(fake) as client, suppress(OSError):  # it may be closed by now
        client.sendall(LIES[lie])
        assert fake.outcome(1).scores == scores(1)
        client.shutdown(socket.SHUT_WR)
        answers = client.makefile("rb").read()
    assert b" 200 " not in answers
    assert_nothing_is_left(fake)


LIES_TO_GRPC = {
    "half a preface": b"PRI * HTTP/2.0\r\n\r",
    "no frames": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)),
    "a frame longer than the rest": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 9 + b"x" * 99,
    "another protocol": BODY,
}


@pytest.mark.parametrize("lie", LIES_TO_GRPC)
def test_a_lie_over_grpc_harms_nobody_else(start_grpc: Start, lie: str) -> None:
    fake = start_grpc()
    host, port = fake.server.grpc_address.split(":")
    with socket.create_connection((host, int(port)), timeout=SOON_S) as client:
        client.sendall(LIES_TO_GRPC[lie])
        assert fake.outcome(1).scores == scores(1)
    assert_nothing_is_left(fake)


# --- what the server asks by itself


def test_statistics_leave_out_what_the_heartbeat_asks(start: Start) -> None:
    fake = start(heartbeat_s=0.01)
    wait_for(lambda: fake.engine.stats().requests_answered > 2)
    assert fake.outcome(1).scores == scores(1)
    (model,) = httpx.get(fake.server.http + "/v2/models/fake/stats").json()["model_stats"]
    assert model["inference_count"] == 1


# --- an engine that ends


@pytest.mark.parametrize("drain", [True, False])
def test_an_engine_closed_while_busy(start: Start, drain: bool) -> None:
    fake = start(heartbeat_s=0.05)
    fake.device.takes_s = 0.005
    asked = {i: fake.ask(i) for i in range(30)}
    wait_for(lambda: fake.engine.stats().requests_accepted > 10)
    fake.engine.close(drain=drain)
    outcomes = {i: future.result(SOON_S) for i, future in asked.items()}
    right = [i for i, outcome in outcomes.items() if outcome.scores == scores(i)]
    assert all(outcomes[i].status in GONE for i in outcomes if i not in right)
    stats = fake.engine.stats()  # of the heartbeat's samples too
    assert len(right) <= stats.requests_answered
    assert stats.requests_accepted == stats.requests_answered + stats.failed + stats.cancelled
    assert stats.failed == 0 or not drain
    assert fake.outcome(1).status in GONE
    wait_for(lambda: httpx.get(fake.server.http + "/v2/health/ready").status_code == 503)
