"""Who listens for front ends: nobody is harmed by one who does not keep to the protocol."""

import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fake_segments import FakeSegments, samples, scores
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import QueueFull
from recflow_jax.remote.arena import SLOTS, Arena, BundleShape
from recflow_jax.remote.front_end import FrontEnd
from recflow_jax.remote.front_ends import FrontEnds, check_free
from recflow_jax.remote.wire import Ask, Greeting, new_socket, send_handle

SOON_S = 20
ASK = Ask(slot=0, samples=1, ids=2, priority=0, are_fixed=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.from_segments(FakeSegments()) as engine:
        yield engine


@pytest.fixture
def front_ends(engine: Engine, tmp_path: Path) -> Iterator[FrontEnds]:
    with FrontEnds(engine, tmp_path / "engine") as front_ends:
        yield front_ends


@pytest.fixture
def visitor(front_ends: FrontEnds) -> Iterator[socket.socket]:
    """One who has heard the greeting."""
    with new_socket() as visitor:
        visitor.settimeout(SOON_S)
        visitor.connect(str(front_ends.path))
        Greeting.receive(visitor)
        yield visitor


def bring_arena(visitor: socket.socket, engine: Engine) -> None:
    room = engine.largest_slice
    shape = BundleShape(
        config=engine.config, samples=room.samples, ids=room.ids, length=engine.slice_length
    )
    _, handle = Arena.new(shape)
    send_handle(visitor, handle)
    os.close(handle)


def assert_sent_home(visitor: socket.socket) -> None:
    try:
        assert visitor.recv(100) == b""
    except ConnectionResetError:
        pass


def answered(front_end: FrontEnd) -> np.ndarray:
    """Scores of one sample, asked for again for as long as others fill the engine's queue."""
    limit = time.monotonic() + SOON_S
    while True:
        try:
            return front_end.predict(samples(1))
        except QueueFull:
            assert time.monotonic() < limit, "nobody else is answered"


def test_only_its_user_may_connect(front_ends: FrontEnds):
    assert stat.S_IMODE(front_ends.path.stat().st_mode) == 0o600


def test_a_path_that_is_taken(front_ends: FrontEnds, engine: Engine):
    for wants in (partial(FrontEnds, engine), check_free):
        with pytest.raises(OSError, match=re.escape(f"at {front_ends.path}: ")):
            wants(front_ends.path)
    with FrontEnd(front_ends.path) as front_end:
        assert front_end.predict(samples(1)).tolist() == scores(1)


def test_a_path_that_is_free_stays_so(tmp_path: Path):
    for _ in range(2):
        check_free(tmp_path / "engine")


def test_the_path_is_free_again_when_it_is_closed(engine: Engine, tmp_path: Path):
    for _ in range(2):
        front_ends = FrontEnds(engine, tmp_path / "engine")
        front_ends.close()
        front_ends.close()
        assert not front_ends.path.exists()


def test_elsewhere_than_on_linux(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="darwin"):
        FrontEnds(engine, tmp_path / "engine")


def test_a_greeting_says_what_is_served(front_ends: FrontEnds, engine: Engine):
    with FrontEnd(front_ends.path) as front_end:
        assert front_end.config == engine.config


def test_who_brings_no_arena_is_sent_home(visitor: socket.socket):
    visitor.send(b"no handle")
    assert_sent_home(visitor)


def test_who_brings_too_small_an_arena_is_sent_home(visitor: socket.socket):
    handle = os.memfd_create("small")
    send_handle(visitor, handle)
    os.close(handle)
    assert_sent_home(visitor)


@pytest.mark.parametrize(
    "message",
    [b"?", b"?" * 1000, Ask(slot=SLOTS, samples=1, ids=2, priority=0, are_fixed=True).encoded()],
    ids=["short", "long", "no slot"],
)
def test_who_asks_for_nothing_is_sent_home(
    visitor: socket.socket, engine: Engine, front_ends: FrontEnds, message: bytes
):
    with FrontEnd(front_ends.path) as other:
        bring_arena(visitor, engine)
        visitor.send(message)
        assert_sent_home(visitor)
        assert other.predict(samples(1)).tolist() == scores(1)


def test_who_leaves_before_the_answer_harms_nobody(
    visitor: socket.socket, engine: Engine, front_ends: FrontEnds
):
    bring_arena(visitor, engine)
    for _ in range(50):
        visitor.send(ASK.encoded())
    visitor.close()
    with FrontEnd(front_ends.path) as other:
        assert other.predict(samples(1)).tolist() == scores(1)


def test_who_reads_no_replies_is_sent_home(
    visitor: socket.socket, engine: Engine, front_ends: FrontEnds
):
    """Of more than his end holds, while others are answered."""
    bring_arena(visitor, engine)
    with suppress(ConnectionError), FrontEnd(front_ends.path) as other:
        for asked in range(100_000):
            visitor.send(ASK.encoded())
            if asked % 200 == 0:
                assert answered(other).tolist() == scores(1)
    limit = time.monotonic() + SOON_S
    while front_ends._guests:
        assert time.monotonic() < limit, "he is there still"
        time.sleep(0.01)
