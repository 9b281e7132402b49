"""Slices packed on the host and unpacked on the device are the same samples."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow_jax.batch import InputError, JaggedBatch, check_batch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine import free_copies
from recflow_jax.engine import staging as staging_module
from recflow_jax.engine.prepared import Prepared, Preparer
from recflow_jax.engine.staging import Buffer, Staging
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch
from scheduling.request import SliceBucket
from small_models import CONCAT, DOT, FIXED, JAGGED, NO_DENSE, NO_SPARSE, device_batch

BUCKET = SliceBucket(samples=8, ids=384)
LARGER = SliceBucket(samples=16, ids=768)
MODELS = (CONCAT, DOT, FIXED, NO_DENSE, NO_SPARSE)
VARIED = dataclasses.replace(
    FIXED,
    features=tuple(
        dataclasses.replace(f, bag=dataclasses.replace(JAGGED, max=3)) for f in FIXED.features
    ),
)
"""FIXED's model, but bags that are not as FIXED expects them."""


def staging(config: DLRMConfig) -> Staging:
    return Staging(config, Layout.of(config))


def prepared(config: DLRMConfig, batch: JaggedBatch) -> Prepared:
    return Preparer(config, Layout.of(config), max_ids=BUCKET.ids).prepare(batch)


def drawn(config: DLRMConfig, samples: int, seed: int) -> Prepared:
    return prepared(config, generate(config, samples, seed=seed))


def unpacked(packer: Staging, bucket: SliceBucket, buffer: Buffer) -> tuple[int, DeviceBatch]:
    row, batch = packer.shape(bucket).unpack(jnp.asarray(buffer.array))
    return int(row), batch


def assert_holds(config: DLRMConfig, found: DeviceBatch, expected: JaggedBatch) -> None:
    """The samples of `expected` and behind them samples of zeros with empty bags."""
    n, ids, plain = expected.samples, len(expected.values), device_batch(config, expected)
    np.testing.assert_array_equal(found.dense[:n], plain.dense)
    assert not np.any(found.dense[n:])
    np.testing.assert_array_equal(found.rows[:ids], plain.rows)
    np.testing.assert_array_equal(found.offsets[: len(plain.offsets)], plain.offsets)
    assert np.all(found.offsets[len(plain.offsets) :] == ids)
    if config.weighted:
        np.testing.assert_array_equal(found.weights[:ids], plain.weights)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 3, 7), (0, 2, 2, 7), (2, 3)])
def test_parts_arrive_as_one_batch(config: DLRMConfig, cuts: tuple[int, ...]):
    whole = generate(config, 7, seed=3)
    parts = [prepared(config, whole.part(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    packer = staging(config)
    row, batch = unpacked(packer, BUCKET, packer.pack(BUCKET, 5, parts))
    assert row == 5
    assert_holds(config, batch, whole.part(cuts[0], cuts[-1]))


@pytest.mark.parametrize("are_many", [True, False])
def test_ids_are_copied_freely_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch, are_many: bool
):
    whole, joined, join = generate(FIXED, 7, seed=3), [], free_copies.join
    monkeypatch.setattr(staging_module, "LARGE_IDS", len(whole.values) + (not are_many))
    monkeypatch.setattr(free_copies, "join", lambda *joins: joined.append("copied") or join(*joins))

    @contextmanager
    def aside() -> Iterator[None]:
        joined.append("aside")
        yield
        joined.append("back")

    parts = [prepared(FIXED, whole.part(a, b)) for a, b in ((0, 3), (3, 7))]
    packer = staging(FIXED)
    _, batch = unpacked(packer, BUCKET, packer.pack(BUCKET, 0, parts, aside=aside))
    assert_holds(FIXED, batch, whole)
    assert joined == (["aside", "copied", "back"] if are_many else [])


@st.composite
def slices(draw: st.DrawFn, config: DLRMConfig) -> list[tuple[JaggedBatch, tuple[int, ...]]]:
    """Requests that fit a slice together, and of each the samples [start, stop) that are in it."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(lambda n: sum(n) <= 8))
    parts = []
    for samples in sizes:
        source = draw(st.sampled_from([config, VARIED])) if config is FIXED else config
        before, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        seed = draw(st.integers(0, 99))
        request = generate(source, before + samples + behind, seed=seed)
        parts.append((request, (before, before + samples)))
    return parts


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
@given(data=st.data())
@settings(max_examples=30)
def test_slices_are_those_packed_plainly_whatever_the_buffer_held(
    config: DLRMConfig, data: st.DataObject
):
    """Parts of requests with all kinds of features, one slice after another in the same buffer."""
    packer, used = staging(config), None
    for parts in data.draw(st.lists(slices(config), min_size=1, max_size=4)):
        cut = [prepared(config, request).part(*place) for request, place in parts]
        buffer = packer.pack(BUCKET, 3, cut)
        assert used is None or buffer is used
        joined = JaggedBatch.join([request.part(*place) for request, place in parts])
        assert_holds(config, unpacked(packer, BUCKET, buffer)[1], joined)
        packer.give_back(buffer)
        used = buffer


@pytest.mark.parametrize("beside", [FIXED, VARIED], ids=["fixed", "jagged"])
def test_no_row_is_outside_its_table(beside: DLRMConfig):
    """Whatever is not checked yet, alone or beside bags that are not as expected."""
    wild = generate(FIXED, 3, seed=1)
    wild.values[::2], wild.values[1::2] = -7, 10**9
    tame = JaggedBatch.join([wild])
    limits = np.repeat(FIXED.feature_rows, FIXED.fixed_bags or 0)
    tame.values[:] = np.clip(wild.values.reshape(3, -1), 0, limits - 1).ravel()
    other, packer = generate(beside, 2, seed=2), staging(FIXED)
    makes = Preparer(FIXED, Layout.of(FIXED), max_ids=BUCKET.ids)
    parts = [makes.prepare(wild.frozen(), checks_later=True), makes.prepare(other)]
    _, batch = unpacked(packer, BUCKET, packer.pack(BUCKET, 0, parts))
    assert_holds(FIXED, batch, JaggedBatch.join([tame, other]))


def test_what_an_unchecked_slice_leaves_behind_is_no_row():
    """The padding of the next slice in the same buffer, if its rows are of groups already."""
    wild = generate(FIXED, 8, seed=1)
    wild.values[:] = 10**9
    makes, packer = Preparer(FIXED, Layout.of(FIXED), max_ids=BUCKET.ids), staging(FIXED)
    packer.give_back(packer.pack(BUCKET, 0, [makes.prepare(wild.frozen(), checks_later=True)]))
    few = next(b for s in range(99) if not is_fixed(b := generate(VARIED, 1, seed=s)))
    _, batch = unpacked(packer, BUCKET, packer.pack(BUCKET, 0, [makes.prepare(few)]))
    assert int(jnp.max(batch.rows)) < max(table.rows for table in FIXED.tables) * len(FIXED.tables)


WEIGHTED = dataclasses.replace(
    FIXED, features=tuple(dataclasses.replace(f, weighted=f.bag.mean == 4) for f in FIXED.features)
)


def well(packer: Staging, buffer: Buffer, bucket: SliceBucket = BUCKET) -> list[bool]:
    return np.asarray(packer.shape(bucket).are_well(jnp.asarray(buffer.array))).tolist()


@pytest.mark.parametrize("config", [FIXED, WEIGHTED], ids=["plain", "weighted"])
@given(data=st.data())
@settings(max_examples=40)
def test_the_device_tells_which_samples_are_well(config: DLRMConfig, data: st.DataObject):
    """As `check` does, one by one; whatever lies behind."""
    makes, packer = Preparer(config, Layout.of(config), max_ids=BUCKET.ids), staging(config)
    worst = generate(config, 8, seed=0)
    worst.values[:], worst.dense[:] = -1, np.nan
    packer.give_back(packer.pack(BUCKET, 0, [makes.prepare(worst.frozen(), checks_later=True)]))
    batch = generate(config, data.draw(st.integers(1, 8)), seed=1)
    limits = np.tile(np.repeat(config.feature_rows, config.fixed_bags or 0), batch.samples)
    for place in data.draw(st.lists(st.integers(0, len(limits) - 1), max_size=2)):
        others = [0, int(limits[place]) - 1, int(limits[place]), -1, 2**31 - 1, -(2**31)]
        batch.values[place] = data.draw(st.sampled_from(others))
    for floats in (batch.dense, batch.weights):
        if floats is not None and data.draw(st.booleans()):
            place = data.draw(st.integers(0, floats.size - 1))
            floats.flat[place] = data.draw(st.sampled_from([3e38, -0.0, np.inf, -np.inf, np.nan]))
    buffer = packer.pack(BUCKET, 0, [makes.prepare(batch.frozen(), checks_later=True)])
    expected = [is_well(config, batch.part(i, i + 1)) for i in range(batch.samples)]
    assert well(packer, buffer)[: batch.samples] == expected
    assert marked(packer, buffer)[: batch.samples] == [not one for one in expected]


def marked(packer: Staging, buffer: Buffer, bucket: SliceBucket = BUCKET) -> list[bool]:
    """Which scores the device gives up."""
    scores, packed = jnp.ones((bucket.samples, 2)), jnp.asarray(buffer.array)
    found = np.isnan(packer.shape(bucket).marked(scores, packed))
    assert (found.all(axis=1) == found.any(axis=1)).all()
    return found.any(axis=1).tolist()


def is_well(config: DLRMConfig, sample: JaggedBatch) -> bool:
    try:
        check_batch(config, sample)
    except InputError:
        return False
    return True


def test_the_device_vouches_for_no_bags_beside_jagged_ones():
    few = next(b for s in range(99) if not is_fixed(b := generate(VARIED, 1, seed=s)))
    packer = staging(FIXED)
    parts = [drawn(FIXED, 2, seed=1), prepared(FIXED, few)]
    buffer = packer.pack(BUCKET, 0, parts)
    assert well(packer, buffer) == marked(packer, buffer) == [False] * 8


def test_a_slice_with_room_for_fewer_bags_than_samples_is_looked_at():
    """None of its samples is passed over, none that is not there is asked for."""
    per_sample = sum(FIXED.fixed_bags or ())
    narrow, packer = SliceBucket(samples=8, ids=3 * per_sample + 1), staging(FIXED)
    buffer = packer.pack(narrow, 0, [drawn(FIXED, 3, seed=1)])
    assert well(packer, buffer, narrow) == [True] * 3
    assert not any(marked(packer, buffer, narrow)[:3])
    assert_holds(
        FIXED, packer.shape(narrow).unpack(jnp.asarray(buffer.array))[1], generate(FIXED, 3, seed=1)
    )


@pytest.mark.parametrize("config", [CONCAT, NO_SPARSE], ids=lambda c: c.name)
def test_samples_that_are_checked_before_are_well(config: DLRMConfig):
    packer = staging(config)
    buffer = packer.pack(BUCKET, 0, [drawn(config, 2, seed=1)])
    assert all(well(packer, buffer)) and not any(marked(packer, buffer))


def is_fixed(batch: JaggedBatch) -> bool:
    return prepared(FIXED, batch).slot_offsets is None


def test_a_larger_bucket_after_a_smaller_one_has_offsets_of_its_own():
    packer = staging(FIXED)
    for bucket, samples in ((BUCKET, 8), (LARGER, 16), (BUCKET, 3)):
        batch = generate(FIXED, samples, seed=samples)
        buffer = packer.pack(bucket, 0, [prepared(FIXED, batch)])
        assert_holds(FIXED, unpacked(packer, bucket, buffer)[1], batch)


def test_offsets_of_fixed_bags_are_not_written():
    packer = staging(FIXED)
    buffer = packer.pack(BUCKET, 0, [drawn(FIXED, 3, seed=1)])
    buffer.offsets[:] = 7
    packer.give_back(buffer)
    again = packer.pack(BUCKET, 0, [drawn(FIXED, 1, seed=2), drawn(FIXED, 3, seed=3)])
    assert again is buffer and np.all(again.offsets == 7)


def test_a_buffer_is_reused_only_after_it_is_given_back():
    packer, few = staging(DOT), drawn(DOT, 2, seed=2)
    first = packer.pack(BUCKET, 0, [few])
    second = packer.pack(BUCKET, 0, [few])
    assert first is not second
    packer.give_back(first)
    assert packer.pack(LARGER, 0, [few]) is not first
    assert packer.pack(BUCKET, 0, [few]) is first


def test_bits_survive():
    """Denormals and negative zero travel as they are."""
    dense = np.array([[1e-42, -0.0, 3.4e38, 0.1, -1]], np.float32)
    sample = dataclasses.replace(generate(CONCAT, 1, seed=0), dense=dense)
    packer = staging(CONCAT)
    buffer = packer.pack(BUCKET, 0, [prepared(CONCAT, sample)])
    place = packer.shape(BUCKET).places["dense"]
    assert buffer.array[place].tobytes()[:20] == dense.tobytes()
