"""Host memory that a GPU reads by itself, while the thread that launched the copy goes on.

From other memory a copy takes that thread's time, and goes through a buffer of the driver's.
`recflow bench host` measures both. JAX is imported where there is something to pin: a front end has
berths, and no use for JAX.
"""

import mmap
import weakref
from typing import Any

import numpy as np


def pinned_zeros(length: int) -> np.ndarray:
    """int32 [length], zero; in plain memory where there is no GPU or the driver pins no more."""
    if _gpu() is None:
        return np.zeros(length, np.int32)
    page = mmap.PAGESIZE  # nothing else may lie in a page that is pinned
    size = -(-4 * length // page) * page
    memory = np.zeros(size + page, np.uint8)
    start = -memory.ctypes.data % page
    _pin(memory, memory.ctypes.data + start, size)
    return memory[start : start + 4 * length].view(np.int32)


def pin(memory: np.ndarray) -> None:
    """Pins uint8 memory in whole pages of its own, until this array and all views of it are gone;
    not where there is no GPU, or the driver pins no more.
    """
    if _gpu() is not None:
        _pin(memory, memory.ctypes.data, memory.nbytes)


def host_place() -> Any:
    """Where results of executables land that the host reads without another copy; None where there
    is no GPU, whose memory the host would have to copy them from.
    """
    gpu = _gpu()
    if gpu is None:
        return None
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(gpu, memory_kind="pinned_host")


def _gpu() -> Any:
    """The first GPU; None where there is none."""
    import jax

    return jax.devices()[0] if jax.default_backend() == "gpu" else None


def _pin(memory: np.ndarray, address: int, size: int) -> None:
    """For as long as there is a view of `memory`."""
    client = _gpu().client
    try:
        client.dma_map(address, size)
    except (AttributeError, RuntimeError):  # an older jaxlib, or a limit of the driver
        return
    weakref.finalize(memory, client.dma_unmap, address).atexit = False
