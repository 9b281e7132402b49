"""From what a launch wrote down to regions, and from these to shares of the SMs' time."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import small_models as models
from recflow_jax.measure.corun import check_co_runs
from recflow_jax.measure.launch_trace import Region, regions_of, summary
from recflow_jax.measure.timeline import NoKernels


def events(thread: int, start_us: float, *spans: tuple[str, int, int]) -> list[dict[str, Any]]:
    """As Mosaic writes them: a start in microseconds, from there on thousands of clocks."""
    shared = {"pid": 1, "tid": thread}
    return [
        {"name": name, "ph": phase, "ts": start_us + clocks / 1e3} | shared
        for name, begin, end in spans
        for phase, clocks in (("B", begin), ("E", end))
    ]


def test_clocks_are_brought_to_the_launchs_time() -> None:
    """Two blocks of two warpgroups; 4000 clocks are 2 us."""
    trace = [
        *events(1, 100.0, ("Init", 0, 10), ("multiply", 1000, 3000), ("help", 3000, 4000)),
        *events(4, 101.0, ("Init", 0, 10), ("gather", 1000, 2000)),
    ]
    regions, clock_mhz = regions_of({"traceEvents": trace}, warpgroups=2, kernel_us=2.0)
    assert clock_mhz == pytest.approx(2000)
    places = [(region.block, region.warpgroup, region.name) for region in regions]
    assert places == [(0, 0, "multiply"), (0, 0, "help"), (1, 1, "gather")]
    times = [time for region in regions for time in (region.start_us, region.end_us)]
    assert times == pytest.approx([0.5, 1.5, 1.5, 2.0, 1.5, 2.0])


def test_nested_regions_are_kept_apart() -> None:
    outer = [{"name": "gather", "ph": phase, "ts": ts, "tid": 1} for phase, ts in (("B", 0.0),)]
    inner = events(1, 0.0, ("multiply", 1000, 2000))
    outer_end = {"name": "gather", "ph": "E", "ts": 4.0, "tid": 1}
    regions, _ = regions_of(
        {"traceEvents": [*outer, *inner, outer_end]}, warpgroups=1, kernel_us=4.0
    )
    spans = {region.name: (region.start_us, region.end_us) for region in regions}
    assert spans == {"multiply": (1.0, 2.0), "gather": (0.0, 4.0)}


def region(block: int, warpgroup: int, name: str, start_us: float, end_us: float) -> Region:
    return Region(block=block, warpgroup=warpgroup, name=name, start_us=start_us, end_us=end_us)


def test_shares_are_of_all_sms_until_the_last_is_done() -> None:
    """Block 0 multiplies for 4 of 10 us and helps for 2; block 1 gathers during all of them."""
    found = summary(
        [
            region(0, 0, "multiply", 0, 4),
            region(0, 0, "help", 4, 6),
            region(0, 1, "load", 0, 3),
            region(0, 2, "gather", 2, 6),
            region(1, 2, "gather", 0, 10),
        ],
        workers=2,
    )
    shares = found["shares"]
    assert (shares.multiply, shares.gather, shares.both) == pytest.approx((0.2, 0.7, 0.1))
    assert found["tail_us"] == 4
    assert found["warpgroup_us"] == {"load": 3, "multiply": 4, "help": 2, "gather": 14}
    activity = found["activity"]
    assert np.mean(activity.multiply) == pytest.approx(4 / 10 / 4)
    assert np.mean(activity.gather) == pytest.approx(16 / 10 / 4)
    assert activity.gather[-1] == 1 / 4


def test_some_blocks_are_shown_from_the_first_to_the_last() -> None:
    shown = summary([region(i, 0, "multiply", 0, 1) for i in range(132)], workers=1)["shown"]
    assert [one.block for one in shown] == [0, 18, 37, 56, 74, 93, 112, 131]


def test_a_launch_that_wrote_nothing_is_an_error() -> None:
    with pytest.raises(NoKernels, match="no regions"):
        regions_of({"traceEvents": []}, warpgroups=5, kernel_us=1.0)
    with pytest.raises(NoKernels, match="no regions"):
        summary([], workers=4)


@pytest.mark.parametrize(
    "config", [models.NO_SPARSE, dataclasses.replace(models.DCN, compute_dtype="float32")]
)
def test_models_whose_layers_take_no_bags_are_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="co-runs are of 16-bit layers and of features"):
        check_co_runs(config)
