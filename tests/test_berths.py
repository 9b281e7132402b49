"""Ids lie where they were copied to until nobody needs them, and slices around them are right."""

import dataclasses
import gc
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.data.workloads import generate
from recflow_jax.engine import berths as berths_module
from recflow_jax.engine import free_copies, held_copies, intake, stays
from recflow_jax.engine import prepared as prepared_module
from recflow_jax.engine.berths import Berth, Berths, Room
from recflow_jax.engine.intake import is_to_berth
from recflow_jax.engine.prepared import FindRoom, Prepared, Preparer
from recflow_jax.engine.staging import Buffer, Staging
from recflow_jax.layout import Layout
from scheduling.request import SliceBucket
from small_models import FIXED, NO_SPARSE, device_batch

PER_SAMPLE = sum(FIXED.fixed_bags or ())
BUCKETS = [SliceBucket(samples=n, ids=n * PER_SAMPLE) for n in (2, 4, 8)]
LARGEST = BUCKETS[-1]
AROUND_SAMPLES = 3


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Berths with little room around them, and requests that are large as soon as that is."""
    for module in (berths_module, stays):
        monkeypatch.setattr(module, "AROUND", AROUND_SAMPLES * PER_SAMPLE)
    monkeypatch.setattr(prepared_module, "LARGE_IDS", AROUND_SAMPLES * PER_SAMPLE)


class Host:
    """What callers and a launcher do with samples, and what has to be there still."""

    def __init__(self) -> None:
        layout = Layout.of(FIXED)
        self.staging = Staging(FIXED, layout)
        self.preparer = Preparer(FIXED, layout, max_ids=LARGEST.ids)
        shape = self.staging.shape(LARGEST)
        dense_at = shape.places["dense"].start
        self.berths = Berths(ids=LARGEST.ids, length=shape.length, dense_at=dense_at)
        self.waiting: list[tuple[JaggedBatch, Prepared]] = []
        self.reserved: list[tuple[int, int, Room]] = []
        self.launched: list[tuple[JaggedBatch, Buffer, SliceBucket]] = []
        self.stayed = self.copied = 0

    def submit(self, samples: int, seed: int, *, berthed: bool = True) -> Prepared:
        return self._prepare(samples, seed, self.berths.room if berthed else None)

    def reserve(self, samples: int, seed: int, *, alone: bool = False) -> None:
        """A large request's room: others come and go before it is filled."""
        room = self.berths.room(samples * PER_SAMPLE, only_free=True, alone=alone)
        if room is not None:
            room.keep()
            self.reserved.append((samples, seed, room))

    def fill(self) -> None:
        """The first of these requests is ready."""
        if self.reserved:
            samples, seed, room = self.reserved.pop(0)
            self._prepare(samples, seed, lambda _: room)

    def _prepare(self, samples: int, seed: int, find_room: FindRoom | None) -> Prepared:
        batch = generate(FIXED, samples, seed=seed)
        prepared = self.preparer.prepare(batch, checks_later=True, find_room=find_room)
        self.waiting.append((JaggedBatch.join([batch]), prepared))
        batch.values[:] = batch.dense[:] = -1  # its caller's again
        return prepared

    def launch(self, samples: int, *, skip: int = 0) -> Buffer | None:
        """A slice of the first that wait, behind `skip` of them; the last may be cut in two."""
        parts, rest, left = [], self.waiting[:skip], min(samples, LARGEST.samples)
        for batch, prepared in self.waiting[skip:]:
            taken = min(left, batch.samples)
            if taken:
                is_whole = taken == batch.samples
                part = prepared if is_whole else prepared.part(0, taken)
                parts.append((batch.part(0, taken), part))
            if taken < batch.samples:
                n = batch.samples
                later = prepared if not taken else prepared.part(taken, n)
                rest.append((batch.part(taken, n), later))
            left -= taken
        self.waiting = rest
        if not parts:
            return None
        whole = JaggedBatch.join([batch for batch, _ in parts])
        bucket = next(b for b in BUCKETS if b.samples >= whole.samples)
        buffer = self.staging.pack(bucket, 0, [part for _, part in parts], may_stay=True)
        self.stayed += buffer.berth is not None
        self.copied += buffer.berth is None
        self.launched.append((whole, buffer, bucket))
        return buffer

    def land(self) -> None:
        """The oldest slice's step ends."""
        if self.launched:
            self.staging.give_back(self.launched.pop(0)[1])

    def check(self) -> None:
        for batch, prepared in self.waiting:
            np.testing.assert_array_equal(prepared.rows, batch.values)
        for batch, buffer, bucket in self.launched:
            row, found = self.staging.shape(bucket).unpack(jnp.asarray(buffer.array.copy()))
            plain, n = device_batch(FIXED, batch), batch.samples
            assert int(row) == 0
            np.testing.assert_array_equal(found.rows[: n * PER_SAMPLE], plain.rows)
            np.testing.assert_array_equal(found.dense[:n], plain.dense)
            np.testing.assert_array_equal(found.offsets[: len(plain.offsets)], plain.offsets)
            assert np.all(found.offsets[len(plain.offsets) :] == n * PER_SAMPLE)


ACTS = ["submit", "submit", "private", "reserve", "fill", "launch", "skip", "drop"]


@given(data=st.data())
@settings(max_examples=80)
def test_nothing_that_waits_or_flies_is_written_over(data: st.DataObject):
    host, samples = Host(), st.integers(1, 5)
    for seed in range(data.draw(st.integers(1, 14))):
        act = data.draw(st.sampled_from(ACTS))
        if act in ("submit", "private"):
            host.submit(data.draw(samples), seed, berthed=act == "submit")
        elif act == "reserve":
            host.reserve(data.draw(st.integers(1, 8)), seed, alone=data.draw(st.booleans()))
        elif act == "fill":
            host.fill()
        elif act == "drop" and host.waiting:
            host.waiting.pop(data.draw(st.integers(0, len(host.waiting) - 1)))
        elif act in ("launch", "skip"):
            skip = data.draw(st.integers(0, len(host.waiting))) if act == "skip" else 0
            host.launch(data.draw(st.integers(1, 8)), skip=skip)
        if data.draw(st.booleans()):
            host.land()
        host.check()


def test_a_slice_of_all_that_came_stays():
    host = Host()
    for seed in range(3):
        host.submit(2, seed)
    buffer = host.launch(8)
    host.check()
    assert host.stayed == 1 and buffer is not None and buffer.berth is not None
    assert np.shares_memory(buffer.array, buffer.berth.array)


def test_slices_in_a_row_stay_although_requests_are_cut():
    """Of three samples in berths of eight, cut where a slice is full."""
    host = Host()
    for seed in range(8):
        host.submit(3, seed)
    for _ in range(3):
        host.launch(8)
        host.check()
    assert (host.stayed, host.copied, host.waiting) == (3, 0, [])


def test_who_came_while_a_slice_was_decided_stays_behind_and_is_copied_before_the_next():
    host = Host()
    for seed in range(2):
        host.submit(1, seed)
    host.submit(1, 2)
    host.launch(2)
    assert host.stayed == 0  # its bucket's other fields would lie in the third's place
    host = Host()
    for seed in range(3):
        host.submit(1, seed)
    late = host.submit(1, 3)
    host.launch(3)
    assert host.stayed == 1 and host.waiting[0][1] is late
    host.submit(4, 4)
    host.launch(8)
    host.check()
    assert (host.stayed, host.copied) == (2, 0)


def test_a_berth_is_left_once():
    host = Host()
    for seed in range(4):
        host.submit(1, seed)
    host.launch(3)
    host.launch(1)
    host.check()
    assert (host.stayed, host.copied) == (1, 1)


@pytest.mark.parametrize(("before", "stays"), [(AROUND_SAMPLES, 1), (AROUND_SAMPLES + 1, 0)])
def test_a_slice_stays_where_what_is_before_fits(before: int, stays: int):
    host = Host()
    host.submit(before, 0, berthed=False)
    host.submit(2, 1)
    host.launch(8)
    host.check()
    assert host.stayed == stays


def test_who_was_passed_over_is_not_written_over():
    """By what is before those that came later, nor by what is behind those that came sooner."""
    host = Host()
    for seed, berthed in enumerate((True, False, True)):
        host.submit(1, seed, berthed=berthed)
    host.launch(2, skip=1)
    host.check()
    assert host.stayed == 0
    host = Host()
    for seed, berthed in enumerate((True, False, True)):
        host.submit(2, seed, berthed=berthed)
    host.launch(4)
    host.check()
    assert host.stayed == 0


def test_a_slice_does_not_stay_beyond_its_berth():
    host = Host()
    for seed, (samples, berthed) in enumerate([(7, True), (1, True), (7, False)]):
        host.submit(samples, seed, berthed=berthed)
    host.launch(8, skip=1)
    host.check()
    assert host.stayed == 0


def test_a_gap_ends_what_stays():
    host = Host()
    for seed, samples in enumerate((1, 1, 2)):
        host.submit(samples, seed)
    host.waiting.pop(1)
    host.launch(3)
    host.check()
    assert host.stayed == 0


def test_who_is_refused_leaves_no_gap():
    host, wrong = Host(), generate(FIXED, 2, seed=0)
    wrong.values[-1] = -1
    first = host.submit(2, 1)
    for bad in (wrong, dataclasses.replace(generate(FIXED, 2, seed=0), dense=wrong.dense * np.nan)):
        with pytest.raises(InputError):
            host.preparer.prepare(bad, find_room=host.berths.room)
    assert host.submit(2, 2).place == first.place + len(first.rows)


@pytest.mark.parametrize("many_copy", [False, True])
def test_what_needs_no_copy_gets_no_berth(many_copy: bool, monkeypatch: pytest.MonkeyPatch):
    """Unless it is large, fills most of a slice, and several threads would copy it."""
    monkeypatch.setattr(intake.copy_threads, "copy", lambda: print if many_copy else None)
    batch = generate(FIXED, 2, seed=0)
    ids = len(batch.values)
    monkeypatch.setattr(intake, "LARGE_IDS", ids)
    small = generate(FIXED, 1, seed=0)
    for one in (batch, small):
        assert is_to_berth(one, slice_ids=2 * ids)
    assert is_to_berth(batch.frozen(), slice_ids=2 * ids - 1) == many_copy
    assert not is_to_berth(batch.frozen(), slice_ids=2 * ids)
    assert not is_to_berth(small.frozen(), slice_ids=ids)
    assert not is_to_berth(batch.dense, slice_ids=ids)


def test_what_lies_in_a_berth_already_stays_there():
    host, batch = Host(), generate(FIXED, 5, seed=0)
    length = host.staging.shape(LARGEST).length
    berth = Berth(np.zeros(length + 2 * berths_module.AROUND, np.int32))
    room = berth.room(len(batch.values))
    room.array[:] = batch.values
    prepared = host.preparer.prepare_in_place(batch.dense, batch.weights, berth)
    assert not prepared.is_checked
    host.waiting.append((batch, prepared))
    buffer = host.launch(5)
    assert buffer is not None and buffer.berth is berth
    host.check()


def test_samples_without_ids_are_looked_at_where_they_lie():
    """No device does."""
    preparer, batch = (
        Preparer(NO_SPARSE, Layout.of(NO_SPARSE), max_ids=8),
        generate(NO_SPARSE, 2, seed=0),
    )
    berth = Berth(np.zeros(2 * berths_module.AROUND, np.int32))
    assert preparer.prepare_in_place(batch.dense, None, berth).is_checked
    batch.dense[1, 0] = np.nan
    with pytest.raises(InputError, match="dense feature 0, sample 1: nan"):
        preparer.prepare_in_place(batch.dense, None, berth)


def test_who_finds_room_is_copied_there():
    host, batch = Host(), generate(FIXED, 2, seed=0)
    for given_as in (batch, batch.frozen()):
        found = host.preparer.prepare(given_as, checks_later=True, find_room=host.berths.room)
        assert found.berth is not None and np.shares_memory(found.rows, found.berth.array)
        np.testing.assert_array_equal(found.rows, batch.values)


def test_what_never_fits_gets_no_berth():
    host = Host()
    preparer = Preparer(FIXED, Layout.of(FIXED), max_ids=99 * PER_SAMPLE)
    large = preparer.prepare(
        generate(FIXED, LARGEST.samples + 1, seed=0), find_room=host.berths.room
    )
    assert large.berth is None
    assert host.submit(LARGEST.samples, 1).berth is not None


def test_an_array_is_used_again_when_nobody_has_its_berth():
    """Not while a request waits in it, nor while a slice of it flies."""
    host = Host()
    host.berths.reserve(1)
    first = host.submit(8, 0)
    array = first.rows.base
    kept = host.submit(8, 1)
    host.launch(8)
    assert kept.rows.base is not array
    del first
    gc.collect()
    assert host.submit(8, 2).rows.base is not array
    host.land()
    assert host.submit(8, 3).rows.base is array


def test_a_large_request_gets_no_array_of_its_own():
    """It may be one of many that wait: memory for all would be the engine's for good."""
    host = Host()
    assert host.berths.room(PER_SAMPLE, only_free=True) is None
    host.berths.reserve(1)
    host.reserve(LARGEST.samples, 0)
    host.reserve(1, 1)
    assert len(host.reserved) == 1
    host.fill()
    host.launch(LARGEST.samples)
    host.check()
    assert (host.stayed, host.copied) == (1, 0)


def test_of_a_request_that_has_a_berth_for_itself_nothing_is_copied_again(
    monkeypatch: pytest.MonkeyPatch,
):
    host = Host()
    host.berths.reserve(1)
    host.reserve(LARGEST.samples - 1, 0, alone=True)
    host.fill()
    for module in (free_copies, held_copies):
        monkeypatch.setattr(
            module, "join", lambda *joins: [len(a) and pytest.fail() for a in joins[:1]]
        )
    buffer = host.launch(LARGEST.samples)
    host.check()
    assert buffer is not None and buffer.berth is not None


@pytest.mark.parametrize(("samples", "launched"), [(4, 4), (8, 4)])
def test_dense_features_that_lie_elsewhere_than_their_slice_wants_them_are_not_written_over(
    samples: int, launched: int
):
    """In a smaller slice, whose buffer has them in another place, also where that is a part."""
    host = Host()
    host.berths.reserve(1)
    host.reserve(samples, 0, alone=True)
    host.fill()
    buffer = host.launch(launched)
    host.check()
    assert buffer is not None and buffer.berth is None


def test_nobody_else_has_room_in_a_berth_with_dense_features():
    host = Host()
    berths = []
    for alone in (True, False, True):
        room = host.berths.room(PER_SAMPLE, alone=alone)
        assert room is not None
        room.keep()
        berths.append(room.berth)
    assert len({*map(id, berths)}) == 3


def test_bags_that_are_not_fixed_are_seen_where_all_is_copied_at_once():
    """As many ids as fixed bags have, in other bags."""
    host, batch = Host(), generate(FIXED, 6, seed=0)
    lengths = np.diff(batch.offsets)
    lengths[0], lengths[1] = lengths[0] + 1, lengths[1] - 1
    other = dataclasses.replace(batch, offsets=np.concatenate([[0], np.cumsum(lengths)]))
    found = host.preparer.prepare(other, checks_later=True, find_room=host.berths.room)
    assert found.is_checked and found.berth is None and found.slot_offsets is not None


@pytest.mark.parametrize("name", ["dense", "values"])
@pytest.mark.parametrize("alone", [True, False])
def test_arrays_that_cannot_be_copied_at_once_are_copied_one_by_one(name: str, alone: bool):
    """Then the dense features are not in the berth."""
    host, batch = Host(), generate(FIXED, 6, seed=0)
    twice = np.repeat(getattr(batch, name), 2, axis=0)
    in_pieces = dataclasses.replace(batch, **{name: twice[::2]})
    find_room = partial(host.berths.room, alone=alone)
    found = host.preparer.prepare(in_pieces, checks_later=True, find_room=find_room)
    assert not found.is_checked and found.berth is not None
    host.waiting.append((batch, found))
    host.launch(LARGEST.samples)
    host.check()
    assert host.stayed
