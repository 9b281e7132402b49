"""Open engines keep what was there before them out of garbage collections, closed ones do not."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fake_segments import OPTIONS, FakeSegments
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.heap import FrozenHeap


class Owner:
    """Something that may be in a reference cycle."""

    def __init__(self) -> None:
        self.me: Owner | None = self


def is_frozen() -> bool:
    """Whether what JAX has loaded is left out: more than the few objects that Python itself is."""
    return gc.get_freeze_count() > 10_000


@pytest.fixture(autouse=True)
def nothing_is_frozen_before_and_after() -> Iterator[None]:
    assert not is_frozen()
    yield
    assert not is_frozen()


def test_garbage_is_collected_first_and_the_rest_is_left_out():
    gone, kept = weakref.ref(Owner()), Owner()
    seen = weakref.ref(kept)
    thaw = FrozenHeap().freeze(owner := Owner())
    assert gone() is None and is_frozen()
    del kept
    gc.collect()
    assert seen() is not None
    thaw()
    gc.collect()
    assert seen() is None and owner.me is owner


def test_it_is_frozen_until_the_last_owner_has_thawed_it():
    heap, owners = FrozenHeap(), (Owner(), Owner())
    first, second = (heap.freeze(owner) for owner in owners)
    first()
    first()
    assert is_frozen()
    second()


def test_an_owner_that_is_gone_thaws_it():
    owner = Owner()
    FrozenHeap().freeze(owner)
    owner.me = None
    del owner


def test_an_engine_freezes_the_heap_while_it_is_open():
    with Engine.from_segments(FakeSegments(replace(OPTIONS, freeze_heap=True))) as engine:
        assert is_frozen()
        engine.close()
        assert not is_frozen()


def test_an_engine_that_is_told_not_to_leaves_the_heap_alone():
    with Engine.from_segments(FakeSegments(OPTIONS)):
        assert not is_frozen()
