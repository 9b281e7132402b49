"""A GPU from its table: the sizes, the plans and what it says when the table lacks something."""

import pytest

import small_models as models
from fake_device import Watched
from hand_tables import row
from recflow_jax.layout import Layout
from recflow_jax.measure.simulated_gpu import Gpu, host_of, sizes_of
from scheduling import (
    Collecting,
    HostCosts,
    ProfileTableError,
    SegmentShape,
    SliceBucket,
    Step,
)
from scheduling.costs import segment_key, slice_key
from scheduling.request import WHOLE
from simulated import BATCHES, CUTS, SLICES, co_runs, gpu, made, parts, singles


def steps_of(one: Gpu, *, serial: bool = False) -> list[Step]:
    """What is launched for 64 samples that come in at once."""
    watched = Watched(one.serial(Collecting(wait_ms=0)) if serial else one.incremental())
    one.run(watched, singles().at_once(64))
    return watched.steps


def test_all_sizes_of_the_table_are_there():
    sizes = sizes_of(made())
    assert (sizes.batch_buckets, sizes.slice_buckets) == (BATCHES, SLICES)
    assert sizes.segments == max(CUTS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "lacks slices"),
        (parts()[:2], "lacks segments"),
        (
            parts(cuts=(2,)),
            r"lacks segment\(segments=1, segment=0, batch=8.* and batch=16|batch=16",
        ),
        (
            [
                r
                for r in parts()
                if r.key != segment_key(SegmentShape(segments=2, index=1, batch=8))
            ],
            r"lacks segment\(segments=2, segment=1, batch=8, scheme=serial\)\. Measure it: "
            "recflow profile --model dot",
        ),
    ],
)
def test_a_table_that_lacks_sizes_says_which(rows, message: str):
    with pytest.raises(ProfileTableError, match=message):
        gpu(rows)


def test_large_sizes_have_the_half_steps_of_an_engine():
    sizes = (512, 1024, 2048)
    slices = [SliceBucket(samples=n, ids=40 * n) for n in sizes]
    shapes = [SegmentShape(segments=1, index=0, batch=n) for n in sizes]
    rows = [row(slice_key(s), s.samples) for s in slices]
    rows += [row(segment_key(s), 2 * s.batch) for s in shapes]
    found = gpu(rows)
    assert found.sizes.batch_buckets == (512, 1024, 1536, 2048)
    assert found.sizes.slice_buckets[2] == SliceBucket(samples=1536, ids=40 * 1536)
    run = found.run(found.incremental(), singles().at_once(1500))
    assert run.device_busy_us == 3 * 1536


def test_co_runs_of_the_table_are_planned_and_take_their_time():
    apart, together = gpu(), gpu([*parts(), *co_runs()])
    steps = steps_of(together)
    pairs = [step for step in steps if step.slice and step.segment]
    assert pairs and {step.co_run for step in pairs} == {"deep"}
    assert {step.co_run for step in steps_of(apart)} == {WHOLE}
    busy_us = {
        one: one.run(one.incremental(), singles().at_once(64)).device_busy_us
        for one in (apart, together)
    }
    # Four slices and four whole batches of 16; but for the first, slices cost nothing in company.
    assert busy_us == {apart: 4 * (180 + 370), together: 180 + 4 * 370}


def test_serial_batching_runs_whole_batches_with_nothing_beside_them():
    steps = steps_of(gpu([*parts(), *co_runs()]), serial=True)
    assert [step.co_run for step in steps] == [WHOLE] * 4
    for step in steps:
        assert step.slice and step.segment
        assert step.slice.batch_id == step.segment.batch_id
        assert step.segment.shape.segments == 1


def test_batches_are_as_small_as_the_p99_of_the_plans():
    bounded = gpu(plan_p99_ms=0.7)
    assert {step.segment.shape.batch for step in steps_of(bounded) if step.segment} == {8}
    assert {step.slice.bucket for step in steps_of(bounded) if step.slice} == {SLICES[0]}
    with pytest.raises(ValueError, match="p99 of 0.1 ms"):
        gpu(plan_p99_ms=0.1)


def test_the_objective_reaches_the_plans():
    assert gpu(objective="latency").plans.objective == "latency"


def test_a_model_says_how_many_bytes_its_slices_have():
    host = host_of(models.CONCAT, HostCosts(launch_us=3))
    assert host.launch_us == 3
    assert host.bytes_per_sample == 4 * (5 + len(Layout.of(models.CONCAT).slots))
    assert (host.bytes_per_id, host_of(models.DOT, HostCosts()).bytes_per_id) == (8, 4)
