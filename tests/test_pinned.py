"""Staging memory on a GPU is pinned, in pages of its own, for as long as anybody sees it."""

import gc
import mmap
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from recflow_jax.engine.pinned import host_place, pin, pinned_zeros
from recflow_jax.remote.arena import SLOTS, Arena, BundleShape
from small_models import FIXED

PAGE = 4096


class Client:
    """Takes note of what is pinned. Refuses where there is no more than `room` bytes."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.pinned: dict[int, int] = {}

    def dma_map(self, address: int, size: int) -> None:
        if size > self.room:
            raise jax.errors.JaxRuntimeError("cuMemHostRegister: out of memory")
        self.pinned[address] = size

    def dma_unmap(self, address: int) -> None:
        del self.pinned[address]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, client: object) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(client=client)])


@pytest.mark.parametrize("length", [1, PAGE // 4 - 1, PAGE // 4, 3 * PAGE])
def test_all_of_it_is_pinned_and_nothing_else_is_in_its_pages(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    client = Client()
    on_a_gpu(monkeypatch, client)
    array = pinned_zeros(length)
    ((address, size),) = client.pinned.items()
    assert (array.dtype, array.shape, array.any()) == (np.int32, (length,), False)
    assert address == array.ctypes.data
    assert address % PAGE == size % PAGE == 0
    assert array.nbytes <= size < array.nbytes + PAGE
    memory = array.base
    assert isinstance(memory, np.ndarray)
    assert memory.ctypes.data <= address
    assert address + size <= memory.ctypes.data + memory.nbytes


def test_memory_of_others_is_pinned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    pin(np.frombuffer(mmap.mmap(-1, PAGE), np.uint8))
    on_a_gpu(monkeypatch, client)
    memory = np.frombuffer(mmap.mmap(-1, 2 * PAGE), np.uint8)
    pin(memory)
    assert client.pinned == {memory.ctypes.data: 2 * PAGE}
    view = memory[PAGE:]
    del memory
    gc.collect()
    assert client.pinned
    del view
    gc.collect()
    assert not client.pinned


def test_an_arena_is_pinned_as_long_as_a_berth_of_it_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Client()
    on_a_gpu(monkeypatch, client)
    shape = BundleShape(config=FIXED, samples=4, ids=80, length=100)
    arena, handle = Arena.new(shape)
    os.close(handle)
    assert not client.pinned
    arena.pin()
    assert [*client.pinned.values()] == [SLOTS * shape.slot_bytes]
    berth = arena.berth(1)
    del arena
    gc.collect()
    assert client.pinned
    del berth
    gc.collect()
    assert not client.pinned


def test_it_stays_pinned_until_the_last_view_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    on_a_gpu(monkeypatch, client)
    view = pinned_zeros(8)[2:4].view(np.float32)
    gc.collect()
    assert client.pinned
    del view
    gc.collect()
    assert not client.pinned


@pytest.mark.parametrize("client", [Client(room=0), object()])
def test_memory_that_cannot_be_pinned_is_plain(
    monkeypatch: pytest.MonkeyPatch, client: object
) -> None:
    on_a_gpu(monkeypatch, client)
    assert not pinned_zeros(8).any()


def test_without_a_gpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(client=client)])
    assert len(pinned_zeros(8)) == 8
    assert not client.pinned


def test_results_have_a_place_on_the_host_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert host_place() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    place = host_place()
    assert place is not None and place.memory_kind == "pinned_host"
