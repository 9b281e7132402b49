"""Bundles are read as they were written, whatever the slot held, and nothing that was not."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.berths import AROUND
from recflow_jax.engine.fixed_bags import bag_offsets
from recflow_jax.remote.arena import SLOTS, Arena, BundleShape, Samples
from recflow_jax.remote.wire import Ask, ProtocolError
from small_models import CONCAT, DOT, FIXED, NO_DENSE, NO_SPARSE

MODELS = (CONCAT, DOT, FIXED, NO_DENSE, NO_SPARSE)


def shape_of(config: DLRMConfig, samples: int = 12) -> BundleShape:
    return BundleShape(config=config, samples=samples, ids=40 * samples, length=60 * samples)


def arena_of(shape: BundleShape) -> Arena:
    arena, handle = Arena.new(shape)
    os.close(handle)
    return arena


def samples_of(batch: JaggedBatch, *, fixed: bool) -> Samples:
    return Samples(
        dense=batch.dense,
        values=batch.values.astype(np.int32),
        offsets=None if fixed else batch.offsets,
        weights=batch.weights,
    )


def ask_for(arena: Arena, slot: int, bundle: Sequence[Samples]) -> Ask:
    samples, ids, are_fixed = arena.write(slot, bundle)
    return Ask(slot=slot, samples=samples, ids=ids, priority=0, are_fixed=are_fixed)


def seen(arena: Arena, ask: Ask) -> JaggedBatch:
    if not ask.are_fixed:
        return arena.read(ask)
    dense, weights = arena.floats(ask)
    values = arena.berth(ask.slot).room(ask.ids).array
    offsets = bag_offsets(arena._shape.config.fixed_bags or (), ask.samples)
    for array in (values, offsets):  # the engine's own
        array.setflags(write=False)
    return JaggedBatch(dense=dense, values=values, offsets=offsets, weights=weights)


def assert_are(found: JaggedBatch, expected: JaggedBatch) -> None:
    for field in dataclasses.fields(JaggedBatch):
        one, other = (getattr(batch, field.name) for batch in (found, expected))
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
            assert not one.flags.writeable


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@settings(max_examples=30)
@given(
    bundles=st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    one_is_jagged=st.booleans(),
)
def test_bundles_are_read_as_written(
    config: DLRMConfig, bundles: list[tuple[int, list[int]]], one_is_jagged: bool
):
    arena, expected = arena_of(shape_of(config)), {}
    for seed, (slot, sizes) in enumerate(bundles):
        parts = [generate(config, n, seed=10 * seed + i) for i, n in enumerate(sizes)]
        fixed = config.fixed_bags is not None
        bundle = [
            samples_of(part, fixed=fixed and not (one_is_jagged and i == 1))
            for i, part in enumerate(parts)
        ]
        expected[slot] = (ask_for(arena, slot, bundle), JaggedBatch.join(parts))
    for ask, batch in expected.values():
        assert_are(seen(arena, ask), batch)


def test_ids_lie_in_a_berth_and_nothing_else_does():
    arena = arena_of(shape_of(FIXED))
    batch = generate(FIXED, 3, seed=0)
    ask = ask_for(arena, 1, [samples_of(batch, fixed=False)])
    arena.scores(1, 3)[:] = 7
    berth = arena.berth(1)
    ids = slice(AROUND, AROUND + ask.ids)
    berth.array[: ids.start] = berth.array[ids.stop :] = -1
    assert len(berth.array) >= 2 * AROUND + shape_of(FIXED).length
    assert_are(arena.read(ask), batch)
    assert np.all(arena.scores(1, 3) == 7)


def test_both_ends_see_the_same_memory():
    shape = shape_of(DOT)
    arena, handle = Arena.new(shape)
    other = Arena(shape, handle)
    os.close(handle)
    batch = generate(DOT, 3, seed=0)
    assert_are(other.read(ask_for(arena, 1, [samples_of(batch, fixed=False)])), batch)
    other.scores(1, 3)[:] = [[1], [2], [3]]
    assert arena.scores(1, 3).tolist() == [[1], [2], [3]]
    assert arena.scores(2, 3).tolist() == [[0], [0], [0]]


LIES = [{"slot": SLOTS}, {"samples": 0}, {"samples": 13}, {"ids": 481}, {"ids": 10}, {"samples": 2}]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_what_no_slot_holds_is_refused(lie: dict[str, int]):
    arena = arena_of(shape_of(FIXED))
    ask = ask_for(arena, 0, [samples_of(generate(FIXED, 1, seed=0), fixed=True)])
    with pytest.raises(ProtocolError):
        arena.floats(dataclasses.replace(ask, **lie))


def test_a_jagged_model_has_no_fixed_bags():
    arena = arena_of(shape_of(DOT))
    ask = ask_for(arena, 0, [samples_of(generate(DOT, 1, seed=0), fixed=False)])
    with pytest.raises(ProtocolError):
        arena.read(dataclasses.replace(ask, are_fixed=True, ids=0))


def test_too_little_memory_is_refused():
    shape = shape_of(DOT)
    handle = os.memfd_create("test")
    os.ftruncate(handle, SLOTS * shape.slot_bytes - 1)
    with pytest.raises(ProtocolError, match="an arena of"):
        Arena(shape, handle)
    os.close(handle)


def test_memory_that_could_become_less_is_refused(tmp_path: Path):
    """Whoever read it then would be killed."""
    shape = shape_of(DOT)
    for handle in (os.memfd_create("test"), os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)):
        os.ftruncate(handle, SLOTS * shape.slot_bytes)
        with pytest.raises(ProtocolError, match="could become smaller"):
            Arena(shape, handle)
        os.close(handle)
    _, handle = Arena.new(shape)
    with pytest.raises(PermissionError):
        os.ftruncate(handle, SLOTS * shape.slot_bytes - 1)
    os.close(handle)
