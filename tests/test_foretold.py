"""Foretelling an online run: the same requests, a host as measured, a device of known times."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import host_rates
from recflow_jax.measure.foretold import Foreteller, Foretold, arriving
from recflow_jax.measure.host import HostResult, Stages
from recflow_jax.measure.load import LoadResult, poisson_arrivals_s, run_open_loop
from recflow_jax.measure.timing import Timing
from scheduling import Collecting, HostCosts
from small_models import CONCAT, FIXED
from timed_segments import TimedSegments

TRIES = 3
COPYING_US = 90.0
OPTIONS = EngineOptions(max_batch=32, max_slice=32, smallest_slice=8, segments=2, freeze_heap=False)


def requests_of(samples: int, count: int = 4) -> list[JaggedBatch]:
    return [generate(FIXED, samples, seed=seed) for seed in range(count)]


def test_the_scheduler_sees_the_very_requests():
    pool = [generate(CONCAT, n, seed=n) for n in (2, 5)]
    seen = [*arriving(pool, np.array([0.0, 0.5, 2.0]))]
    assert [request.samples for request in seen] == [2, 5, 2]
    assert [request.arrived_us for request in seen] == [0, 500_000, 2_000_000]
    assert [request.ids for request in seen] == [len(pool[i].values) for i in (0, 1, 0)]
    first_sample = pool[0].offsets[pool[0].features]
    assert seen[0].id_offsets.tolist() == [0, first_sample, len(pool[0].values)]


def test_a_request_alone_takes_what_the_table_and_the_host_say():
    segments = TimedSegments(FIXED, OPTIONS)
    host = HostCosts(launch_us=10, sample_us=0, id_us=0, byte_us=0, answer_us=100)
    teller = Foreteller(segments, segments.table(), host)
    far_apart = np.arange(20) * 1.0
    # A slice of 8 samples, 560 us, and a batch of 8, 1120 us.
    told = teller.foretell(None, requests_of(8), far_apart)
    assert told.p50_ms == pytest.approx(0.01 + 0.56 + 1.12 + 0.1)
    waits = teller.foretell(Collecting(wait_ms=3), requests_of(8), far_apart)
    assert waits.p50_ms == pytest.approx(3 + told.p50_ms)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("collecting", [None, Collecting(wait_ms=2, in_flight=2)])
def test_what_is_foretold_is_about_what_is_measured(collecting: Collecting | None):
    """Steps of milliseconds, so that a busy machine does not hide them; if it was busier while the
    host was measured than afterwards, once more.
    """
    ratios = []
    while not ratios or (not 0.75 < ratios[-1] < 1.3 and len(ratios) < TRIES):
        told, measured = foretold_and_measured(collecting)
        assert told.p50_ratio == pytest.approx(told.p50_ms / measured.p50_ms)
        assert 0.1 < told.device_busy_share <= 1
        ratios.append(told.p50_ratio)
    assert 0.75 < ratios[-1] < 1.3


def foretold_and_measured(collecting: Collecting | None) -> tuple[Foretold, LoadResult]:
    segments, requests = TimedSegments(FIXED, OPTIONS), requests_of(8)
    table = segments.table()
    with Engine.from_segments(segments, profile=table) as engine:
        of = (segments, table, engine, requests)
        teller = Foreteller.calibrated(*of, ids="uniform", seed=0)
    assert min(teller.host.submit_us, teller.host.request_us, teller.host.launch_us) > 0
    due_s = poisson_arrivals_s(150, 200, seed=1)
    with Engine.from_segments(segments, profile=table, batching=collecting) as engine:
        measured = run_open_loop(engine.submit, requests, due_s)
    return Foretold.of(teller.foretell(collecting, requests, due_s), measured), measured


def test_a_host_is_as_much_slower_as_the_engine_was():
    segments, requests = TimedSegments(FIXED, OPTIONS), requests_of(8)
    host = HostCosts(submit_us=4000, launch_us=10)
    teller = Foreteller(segments, segments.table(), host)
    # Of 250 requests per second that callers let in.
    slower = teller.saturating_at(100, requests)
    assert slower.host.submit_us == pytest.approx(4000 * 2.5, rel=0.02)
    assert slower.host == teller.host.slower(slower.host.submit_us / 4000)
    assert teller.saturating_at(300, requests).host.submit_us == pytest.approx(4000, rel=0.01)
    assert teller.saturating_at(10, requests).host.submit_us == pytest.approx(4 * 4000, rel=0.01)


def test_a_host_is_none_the_slower_where_the_device_is():
    segments, requests = TimedSegments(FIXED, OPTIONS), requests_of(8)
    host = HostCosts(submit_us=10, launch_us=10)
    teller = Foreteller(segments, segments.table(), host)
    assert teller.saturating_at(100, requests) is teller


def stages_of(samples: int, sharing: float) -> Stages:
    """What a host takes for each step, request and sample, where so many share a step."""
    return Stages(
        submit_us=5 + 2 * samples,
        pack_us=40 / sharing + 3 + 0.25 * samples,
        launch_us=160 / sharing + 7 + 0.5 * samples,
        resolve_us=90 / sharing + 4 + 0.125 * samples,
    )


def test_what_a_step_costs_is_told_from_how_many_requests_share_it(
    monkeypatch: pytest.MonkeyPatch,
):
    def bench_host(
        _: DLRMConfig, sizes: Sequence[int], *, in_flight: int | None = None, **how: Any
    ) -> list[HostResult]:
        sharing = 25.0 if in_flight is None else in_flight
        return [
            replace(result("frozen", n, stages_of(n, sharing)), mean_batch=n * sharing)
            for n in sizes
        ]

    monkeypatch.setattr(host_rates, "bench_host", bench_host)
    requests = [r.frozen() for r in requests_of(8)]
    segments = TimedSegments(FIXED, OPTIONS)
    rates = host_rates.measured_rates(segments, requests, ids="uniform", seed=0)
    assert (rates.submit_us, rates.submit_sample_us) == pytest.approx((5, 2))
    assert (rates.step_us, rates.request_us, rates.sample_us) == pytest.approx((200, 10, 0.75))
    assert (rates.end_us, rates.resolve_us) == pytest.approx((90, 4 + 8 * 0.125))


def result(given_as: str, samples: int, stages: Stages) -> HostResult:
    return HostResult(
        request_samples=samples,
        given_as=given_as,
        in_flight=1,
        timing=Timing(median_us=1, p10_us=1, p90_us=1, samples=1, calls=1),
        stages=stages,
        mean_batch=1,
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_the_host_is_measured_with_requests_that_are_copied_if_these_are(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    def found(given_as: str, samples: int) -> HostResult:
        submit_us = COPYING_US if given_as == "batch" else 1.0
        stages = Stages(submit_us=submit_us, pack_us=1, launch_us=1, resolve_us=1)
        return result(given_as, samples, stages)

    def bench_host(
        _: DLRMConfig, sizes: Sequence[int], *, ways: Sequence[str], **how: Any
    ) -> list[HostResult]:
        return [found(given_as, n) for n in sizes for given_as in ways]

    monkeypatch.setattr(host_rates, "bench_host", bench_host)
    requests = [r.frozen() if frozen else r for r in requests_of(8)]
    segments = TimedSegments(FIXED, OPTIONS)
    rates = host_rates.measured_rates(segments, requests, ids="uniform", seed=0)
    assert rates.submit_us == (1.0 if frozen else COPYING_US)
