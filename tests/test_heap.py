"""Open engines keep what was there before them out of garbage collections, closed ones do not."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fake_segments import OPTIONS, FakeSegments
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.heap import YOUNG_OBJECTS, FrozenHeap
from recflow_jax.measure.serial_server import SerialServer
from scheduling import Collecting


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


@pytest.fixture
def threshold() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(700, 11, 12)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_fewer_collections_until_the_last_owner_has_thawed_it(threshold: tuple[int, int, int]):
    heap, owners = FrozenHeap(), (Owner(), Owner())
    first, second = (heap.freeze(owner) for owner in owners)
    assert gc.get_threshold() == (YOUNG_OBJECTS, *threshold[1:])
    first()
    assert gc.get_threshold() == (YOUNG_OBJECTS, *threshold[1:])
    second()
    assert gc.get_threshold() == threshold


@pytest.mark.parametrize("own", [0, YOUNG_OBJECTS + 1])
def test_who_wants_none_or_even_fewer_keeps_his_own(own: int, threshold: tuple[int, int, int]):
    gc.set_threshold(own, *threshold[1:])
    thaw = FrozenHeap().freeze(Owner())
    assert gc.get_threshold() == (own, *threshold[1:])
    thaw()
    assert gc.get_threshold() == (own, *threshold[1:])


def test_what_was_set_meanwhile_stays(threshold: tuple[int, int, int]):
    thaw = FrozenHeap().freeze(owner := Owner())
    gc.set_threshold(5000, *threshold[1:])
    thaw()
    assert gc.get_threshold() == (5000, *threshold[1:]) and owner.me is owner


def test_an_engine_freezes_the_heap_while_it_is_open():
    with Engine.from_segments(FakeSegments(replace(OPTIONS, freeze_heap=True))) as engine:
        assert is_frozen()
        engine.close()
        assert not is_frozen()


def test_serial_batching_that_is_told_anew_how_to_collect_keeps_the_heap_frozen(
    monkeypatch: pytest.MonkeyPatch,
):
    """As it was: looking at all of it once more takes longer than a few batches."""
    segments = FakeSegments(replace(OPTIONS, freeze_heap=True))
    with SerialServer.from_segments(segments, batching=Collecting(wait_ms=0)) as server:
        monkeypatch.setattr(gc, "collect", lambda: pytest.fail("the heap was looked at"))
        server.collect(Collecting(wait_ms=1))
        assert is_frozen() and server.options.batching == Collecting(wait_ms=1)
    assert not is_frozen()


def test_an_engine_that_is_told_not_to_leaves_the_heap_alone():
    with Engine.from_segments(FakeSegments(OPTIONS)):
        assert not is_frozen()
