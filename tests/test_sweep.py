"""Which steps a profile measures: what may pay, by what the parts take on the device."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hand_tables import row, table
from recflow_jax.measure.profiler import Profiler
from recflow_jax.measure.sweep import LEAST_US, Sweep
from scheduling import ProfileTable, SegmentShape, SliceBucket
from scheduling.costs import CO_RUN, segment_key, slice_key, step_key

SMALL, LIGHT, HEAVY = (SliceBucket(samples=n, ids=10 * n) for n in (8, 16, 32))
BATCHES = (8, 32)
LARGEST = SegmentShape(segments=1, index=0, batch=32)


class Sizes(Profiler):
    """Knows sizes, and times nothing."""

    def __init__(self) -> None:
        sizes = SimpleNamespace(
            slice_buckets=(SMALL, LIGHT, HEAVY),
            batch_buckets=BATCHES,
            cuts=(1,),
            rides=("in-turn", "wide", "deep"),
        )
        self.segments = cast(Any, sizes)


def sweep(*, quick: bool = False) -> Sweep:
    return Sweep(Sizes(), quick=quick)


def parts(light_us: float, light_launch_us: float = 60) -> ProfileTable:
    """Segments of 100 us; a slice of light_us between one of 5 and one of 80; deep rides best."""
    rides = {"in-turn": 150, "wide": 140, "deep": 130}
    return table(
        [
            *(row(segment_key(SegmentShape(segments=1, index=0, batch=b)), 100) for b in BATCHES),
            row(slice_key(SMALL), 5, 60),
            row(slice_key(LIGHT), light_us, light_launch_us),
            row(slice_key(HEAVY), 80, 60),
            *(
                row(step_key(LARGEST, HEAVY, scheme=CO_RUN, config=ride), us)
                for ride, us in rides.items()
            ),
        ]
    )


def tried(found: Sweep, measured: ProfileTable) -> dict[tuple[int, int], list[str]]:
    """The rides that are tried, by samples of batch and slice."""
    return {
        (job.first.batch or 0, job.first.slice_samples or 0): [run.config for run in job.co_runs]
        for job in found.steps(measured)
    }


@pytest.mark.parametrize("launch_us", [60, 200])
def test_a_kernel_is_tried_for_what_is_work_on_the_device(launch_us: float):
    light = tried(sweep(), parts(5 + LEAST_US - 1, launch_us))
    assert light[32, 16] == ["in-turn"]
    assert light[32, 32] == light[8, 32] == ["in-turn", "deep"]
    assert tried(sweep(), parts(5 + LEAST_US, launch_us))[32, 16] == ["in-turn", "deep"]


def test_a_quick_one_tries_the_largest_batch_alone():
    assert {batch for batch, _ in tried(sweep(quick=True), parts(50))} == {32}
    assert {batch for batch, _ in tried(sweep(), parts(50))} == {*BATCHES}


def test_parts_of_next_to_nothing_are_left_out():
    assert (32, 16) not in tried(sweep(), parts(1, 1))
