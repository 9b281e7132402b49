"""Plans measured on a small model, beside what a table says of it."""

from pathlib import Path

import pytest

import small_models as models
from recflow_jax.commands.bench_plans import bench_plans
from recflow_jax.commands.profile import ProfileResult, profile
from recflow_jax.measure.mixes import described, random_mixes
from scheduling import SegmentShape, SliceBucket, StepShape, TablePlans

CONFIG, OPTIONS = models.DOT, models.SMALL


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    return profile(CONFIG, out=tmp_path_factory.mktemp("profiles"), quick=True, options=OPTIONS)


def test_mixes_are_of_all_sizes(profiled: ProfileResult) -> None:
    slices = OPTIONS.slice_buckets(CONFIG)
    plans = TablePlans(profiled.table, OPTIONS.batch_buckets, slices)
    mixes = random_mixes(plans, 300, seed=0)
    assert {mix.batch for mix in mixes} == {*plans.batch_buckets}
    assert all(1 <= mix.waiting <= 2 * mix.batch for mix in mixes)
    assert mixes == random_mixes(plans, 300, seed=0) != random_mixes(plans, 300, seed=1)


def test_plans_are_measured_beside_their_promise_and_their_rivals(
    profiled: ProfileResult, tmp_path: Path
) -> None:
    result = bench_plans(
        CONFIG,
        profile=profiled.path,
        mixes=6,
        contests=2,
        options=OPTIONS,
        out=tmp_path / "plans.json",
    )
    assert len(result["mixes"]) == 6 and len(result["contests"]) == 2
    assert all(
        mix["predicted_us"] > 0 and mix["timing"]["median_us"] > 0 for mix in result["mixes"]
    )
    assert 0 <= result["error_median"] <= result["error_p90"]
    assert 0 <= result["device_error_median"] <= result["device_error_p90"]
    assert all(mix["device_us"] <= mix["timing"]["median_us"] for mix in result["mixes"])
    for contest in result["contests"]:
        assert contest["best_us"] <= contest["plan_us"]
    assert result["regret_max"] >= result["regret_median"] >= 0
    assert (tmp_path / "plans.json").exists()


def test_a_plan_is_told_step_by_step() -> None:
    first, second = SegmentShape.all_of(2, 8)
    size = SliceBucket(samples=4, ids=40)
    plan = (
        StepShape(segment=first, slice=size, co_run="deep/one"),
        StepShape(segment=second, slice=size),
        StepShape(segment=None, slice=size),
    )
    assert described(plan) == "1/2+4 by deep/one, 2/2+4, 4 alone"
