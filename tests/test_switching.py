"""Open engines have Python change threads more often; when the last is closed it is as before."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fake_segments import OPTIONS, FakeSegments
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.switching import SwitchInterval

BEFORE_S = 0.004


class Owner:
    """Something that can go."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    found_s = sys.getswitchinterval()
    sys.setswitchinterval(BEFORE_S)
    yield
    assert interval_ms() == 1000 * BEFORE_S
    sys.setswitchinterval(found_s)


def interval_ms() -> float:
    return round(1000 * sys.getswitchinterval(), 6)


def test_the_shortest_that_is_wanted_holds():
    switching, owners = SwitchInterval(), (Owner(), Owner(), Owner())
    restore = [
        switching.shorten(owner, ms / 1000) for owner, ms in zip(owners, (1, 0.5, 9), strict=True)
    ]
    assert interval_ms() == 0.5
    restore[1]()
    restore[1]()
    assert interval_ms() == 1
    restore[0]()
    assert interval_ms() == 1000 * BEFORE_S
    restore[2]()


def test_an_owner_that_is_gone_wants_nothing():
    owner = Owner()
    SwitchInterval().shorten(owner, 0.001)
    assert interval_ms() == 1
    del owner


@pytest.mark.parametrize(("wanted_ms", "found_ms"), [(0.5, 0.5), (None, 4), (7.0, 4)])
def test_an_engine_shortens_it_while_it_is_open(wanted_ms: float | None, found_ms: float):
    options = replace(OPTIONS, switch_interval_ms=wanted_ms)
    with Engine.from_segments(FakeSegments(options)) as engine:
        assert interval_ms() == found_ms
        engine.close()
        assert interval_ms() == 1000 * BEFORE_S


@pytest.mark.parametrize("ms", [0, -1.0, float("inf")])
def test_an_interval_is_a_time(ms: float):
    with pytest.raises(ValueError, match="options: switch_interval_ms is"):
        replace(OPTIONS, switch_interval_ms=ms)
