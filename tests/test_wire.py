"""Messages arrive as they were sent, and what is none is refused."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow_jax.batch import InputError
from recflow_jax.engine.errors import EngineError, QueueFull, StepFailed
from recflow_jax.remote import wire
from recflow_jax.remote.wire import (
    MOST_BYTES,
    MOST_TEXT,
    Ask,
    Greeting,
    ProtocolError,
    Reply,
    receive_handle,
    send_handle,
)

GREETING = Greeting(
    config="c" * 500_000,
    samples=8,
    ids=20,
    length=40,
    ids_per_sample=9,
    queued_samples=64,
    backend="xla",
)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


@given(
    st.builds(
        Ask,
        slot=st.integers(0, 2**32 - 1),
        samples=st.integers(0, 2**32 - 1),
        ids=st.integers(0, 2**32 - 1),
        priority=st.integers(-(2**31), 2**31 - 1),
        are_fixed=st.booleans(),
    )
)
def test_an_ask_arrives(ask: Ask):
    assert Ask.decoded(ask.encoded()) == ask


@pytest.mark.parametrize("kind", [InputError, EngineError, QueueFull, StepFailed])
def test_an_error_arrives(kind: type[Exception]):
    found = Reply.decoded(Reply(slot=2, error=kind("feature 'ä' is bad")).encoded())
    assert type(found.error) is kind
    assert (found.slot, str(found.error)) == (2, "feature 'ä' is bad")


def test_scores_arrive_and_other_errors_are_the_engines():
    for reply in (Reply(slot=1), Reply(slot=2, is_crowded=True)):
        assert Reply.decoded(reply.encoded()) == reply
    found = Reply.decoded(Reply(slot=0, error=MemoryError("no room")).encoded())
    assert type(found.error) is EngineError and str(found.error) == "no room"


def test_a_long_error_is_cut():
    message = Reply(slot=0, error=EngineError("ä" * MOST_TEXT)).encoded()
    assert len(message) < MOST_BYTES
    assert str(Reply.decoded(message).error).startswith("ä" * 99)


@given(st.binary(max_size=40))
def test_anything_else_is_refused(message: bytes):
    for kind in (Ask, Reply):
        try:
            kind.decoded(message)
        except ProtocolError:
            pass


def test_a_greeting_that_fits_no_message_arrives(pair: Pair):
    GREETING.send(pair[0])
    assert Greeting.receive(pair[1]) == GREETING


def test_another_versions_greeting_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "PROTOCOL", 0)
    replace(GREETING, config="").send(pair[0])
    monkeypatch.undo()
    with pytest.raises(ProtocolError, match="protocol 0, this front end 1"):
        Greeting.receive(pair[1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocol": 1}', '{"protocol": 1, "a": 2}'])
def test_no_greeting(pair: Pair, text: str):
    handle = os.memfd_create("test")
    os.write(handle, text.encode())
    send_handle(pair[0], handle)
    os.close(handle)
    with pytest.raises(ProtocolError):
        Greeting.receive(pair[1])


def test_a_message_without_a_handle(pair: Pair):
    pair[0].send(b"handle")
    with pytest.raises(ProtocolError, match="no handle"):
        receive_handle(pair[1])
