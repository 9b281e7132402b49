"""Batches in a row: co-runs give the scores of a forward pass, batch by batch."""

from dataclasses import replace

import numpy as np
import pytest

import small_models as models
from recflow_jax.backend import choose_backend
from recflow_jax.data.workloads import generate
from recflow_jax.measure.ceilings import Ceilings
from recflow_jax.measure.contenders import Lineup
from recflow_jax.measure.overlap import BatchPipeline, bench_overlap
from recflow_jax.measure.timing import TimingOptions

CEILINGS = Ceilings(copy_bytes_per_s=1e10, matmul_flop_per_s=1e11, matmul_dtype="float32")
QUICK = TimingOptions(rounds=2, round_s=0.001, limit_s=0.1)


@pytest.fixture(scope="module")
def lineup() -> Lineup:
    backend = choose_backend("xla")
    riding = replace(backend, ops=replace(backend.ops, corun_configs=("plain",)))
    return Lineup(models.DCN, models.params_of(models.DCN), riding, ["jax"])


SETS = [generate(models.DCN, 16, seed=seed) for seed in range(3)]


def test_a_launch_scores_the_batch_that_the_one_before_brought_in(lineup: Lineup):
    params = models.params_of(models.DCN)
    pipeline = BatchPipeline(lineup, params, SETS)
    assert pipeline.rides == ["in-turn", "plain/one", "plain/all"]
    for ride in pipeline.rides:
        launch = pipeline.contenders()[ride].timed.launch
        launch(0)
        for brought_in, coming in ((0, 2), (2, 1), (1, 1)):
            expected = models.reference_scores(models.DCN, params, SETS[brought_in])
            models.assert_same_scores(models.DCN, np.asarray(launch(coming)), expected)


def test_all_are_timed_side_by_side(lineup: Lineup):
    params = models.params_of(models.DCN)
    (result,) = bench_overlap(lineup, params, {16: SETS}, ceilings=CEILINGS, options=QUICK)
    assert {*result.co_runs} == {"in-turn", "plain/one", "plain/all"}
    assert {*result.contenders} == {"serial", "recflow", "jax"}
    assert result.best_us == min(m.timing.median_us for m in result.co_runs.values())
    assert result.sum_us > result.max_us > 0
    assert result.speedups["jax"] == result.contenders["jax"].timing.median_us / result.best_us


def test_rides_can_be_named(lineup: Lineup):
    params = models.params_of(models.DCN)
    assert BatchPipeline(lineup, params, SETS, ["plain/all"]).rides == ["plain/all"]
    with pytest.raises(ValueError, match="ride 'x' is not one of in-turn, plain/one"):
        BatchPipeline(lineup, params, SETS, ["x"])


def test_where_nothing_can_ride_nothing_is_timed():
    config, sets = models.NO_SPARSE, [generate(models.NO_SPARSE, 16, seed=0)]
    params = models.params_of(config)
    with pytest.raises(ValueError, match="nothing can ride"):
        BatchPipeline(Lineup(config, params, choose_backend("xla"), []), params, sets)
