"""The memory of a server over time, and whether it is flat.

The rule: after the first quarter of the time, which warms up, the median of the last quarter is
above that of the second by no more than 2 % or 16 MiB, whichever is more.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recflow_jax.console import Missing

SHARE, LEAST_BYTES = 0.02, 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at a moment: resident ones of the process, and those of its devices that tell."""

    at_s: float
    rss_bytes: int
    device_bytes: int


def growth_bytes(samples: Sequence[Memory]) -> Mapping[str, float]:
    """From the second quarter of the time to the last one, by kind of memory."""
    return {kind: after - before for kind, (before, after) in _quarters(samples).items()}


def is_flat(samples: Sequence[Memory]) -> bool:
    """Whether neither kind has grown by more than the rule allows."""
    return all(
        after - before <= max(SHARE * before, LEAST_BYTES)
        for before, after in _quarters(samples).values()
    )


def _quarters(samples: Sequence[Memory]) -> dict[str, tuple[float, float]]:
    """The medians of the second and the last quarter, by kind."""
    quarter = len(samples) / 4
    second, last = (samples[int(i * quarter) : int((i + 1) * quarter) or None] for i in (1, 3))
    return {
        kind: (_median(second, kind), _median(last, kind)) for kind in ("rss_bytes", "device_bytes")
    }


def _median(samples: Sequence[Memory], kind: str) -> float:
    return float(np.median([getattr(sample, kind) for sample in samples]))


def rss_bytes(process_id: int) -> int:
    """Resident bytes of a process. Raises Missing where the system has no /proc."""
    status = Path(f"/proc/{process_id}/status")
    if not status.exists():
        raise Missing("the memory of another process is read from /proc, which Linux has")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@contextmanager
def sampled(
    process_id: int,
    device_bytes: Callable[[], int],
    *,
    every_s: float,
    on_sample: Callable[[Memory], None],
) -> Iterator[list[Memory]]:
    """Samples a process meanwhile; what it yields is filled by the end."""
    samples, stop, start_s = [], threading.Event(), time.perf_counter()
    rss_bytes(process_id)  # raises here, not on the thread

    def sample() -> None:
        while not stop.wait(every_s):
            memory = Memory(
                at_s=time.perf_counter() - start_s,
                rss_bytes=rss_bytes(process_id),
                device_bytes=device_bytes(),
            )
            samples.append(memory)
            on_sample(memory)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
