"""A GPU of round numbers for a small model: slices of 8 and 16 samples, batches of as many."""

from collections.abc import Sequence
from typing import Any

import small_models as models
from fake_device import FREE
from hand_tables import row, table
from recflow_jax.measure.simulated_gpu import Gpu
from recflow_jax.measure.traffic import Traffic
from scheduling import ProfileRow, ProfileTable, SegmentShape, SliceBucket
from scheduling.costs import CO_RUN, segment_key, slice_key, step_key

CONFIG = models.DOT
BATCHES = (8, 16)
SLICES = tuple(SliceBucket(samples=n, ids=40 * n) for n in BATCHES)
CUTS = (1, 2)


def parts(cuts: Sequence[int] = CUTS) -> list[ProfileRow]:
    """A slice of n samples takes 10 n + 20 us, a batch 20 n and, for each segment, 50 us more."""
    shapes = [s for n in cuts for batch in BATCHES for s in SegmentShape.all_of(n, batch)]
    return [
        *(row(slice_key(size), 10 * size.samples + 20) for size in SLICES),
        *(row(segment_key(s), 20 * s.batch / s.segments + 50) for s in shapes),
    ]


def co_runs(cuts: Sequence[int] = CUTS) -> list[ProfileRow]:
    """A slice that rides takes no time of its own."""
    shapes = [s for n in cuts for batch in BATCHES for s in SegmentShape.all_of(n, batch)]
    return [
        row(step_key(s, size, scheme=CO_RUN, config="deep"), 20 * s.batch / s.segments + 50)
        for s in shapes
        for size in SLICES
        if size.samples <= s.batch
    ]


def made(rows: Sequence[ProfileRow] | None = None) -> ProfileTable:
    """A table of CONFIG; None: of all parts."""
    names = {"model": CONFIG.name, "fingerprint": CONFIG.fingerprint, "device": "abacus"}
    return table(parts() if rows is None else rows, **names)


def gpu(rows: Sequence[ProfileRow] | None = None, **options: Any) -> Gpu:
    """With a host that costs nothing."""
    return Gpu.of(made(rows), host=FREE, **options)


def singles(seconds: float = 0.1, seed: int = 0) -> Traffic:
    """Requests of one sample."""
    return Traffic(config=CONFIG, request_samples=1, seconds=seconds, seed=seed)
