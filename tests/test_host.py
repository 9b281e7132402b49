"""What requests cost on the host: all stages are seen, on a device that does nothing."""

import json
import threading
from typing import Any

import jax
import numpy as np
import pytest

from recflow_jax.batch import JaggedBatch
from recflow_jax.commands.bench import bench_host
from recflow_jax.config import DLRMConfig
from recflow_jax.console import Missing
from recflow_jax.data.workloads import generate
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import host, instant, report, uploads
from recflow_jax.measure.host import by_name
from recflow_jax.measure.instant import InstantSegments
from recflow_jax.measure.timing import TimingOptions
from small_models import CONCAT, FIXED, NO_DENSE, NO_SPARSE

FAST = TimingOptions(rounds=2, round_s=0.01, max_calls=200)
STAGES = ("submit_us", "pack_us", "launch_us", "resolve_us")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("host") / "made" / "host.json"
    returned = bench_host(FIXED, request_sizes=(1, 40000), timing=FAST, out=out)
    stored = json.loads(out.read_text())
    assert stored == json.loads(json.dumps(returned))
    assert stored["model"]["name"] == "fixed" and stored["cpus"] >= 1
    assert not stored["busy"]
    return stored["host"]


def test_each_size_is_given_in_each_way(results: list[dict[str, Any]]):
    assert [(r["request_samples"], r["given_as"], r["in_flight"]) for r in results] == [
        *((1, how, 1024) for how in ("batch", "frozen", "features")),
        *((40000, how, 4) for how in ("batch", "frozen", "features")),
    ]


def test_only_the_ways_that_are_asked_for_are_measured():
    found = host.bench_host(FIXED, (1,), ids="uniform", seed=0, ways=["frozen"], options=FAST)
    assert [result.given_as for result in found] == ["frozen"]


def test_so_many_requests_are_inside_as_one_says():
    found = host.bench_host(FIXED, (3,), ids="uniform", seed=0, in_flight=1, options=FAST)
    assert {result.in_flight for result in found} == {1}
    assert {result.mean_batch for result in found} == {3}


def test_it_may_be_beside_a_thread_that_computes():
    before = threading.active_count()
    with host.computing():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert bench_host(FIXED, request_sizes=(1,), busy=True, timing=FAST)["busy"]
    assert threading.active_count() == before


def test_all_stages_take_time(results: list[dict[str, Any]]):
    for result in results:
        assert all(result["stages"][stage] > 0 for stage in STAGES)
        assert result["stages"]["sum_us"] == pytest.approx(
            sum(result["stages"][stage] for stage in STAGES)
        )
        per_sample = result["timing"]["median_us"] / result["request_samples"]
        assert result["us_per_sample"] == pytest.approx(per_sample)
        assert 1 <= result["mean_batch"] <= 8192


def test_uploads_are_measured_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert bench_host(FIXED, request_sizes=(1,), timing=FAST)["uploads"] == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(uploads, "pinned_zeros", lambda length: np.zeros(length, np.int32))
    found = uploads.bench_uploads(FIXED, FAST)
    assert [result.samples for result in found] == [8192, 4096, 2048, 1024]
    for result in found:
        assert result.nbytes > 4 * result.samples * sum(FIXED.fixed_bags or ())
        for us in (result.call_us, result.each_us):
            assert us.keys() == {"plain", "pinned"} and min(us.values()) > 0
    report.show(report.uploads_table(found))
    assert "…" not in capsys.readouterr().out


def test_the_table_shows_all_columns(capsys: pytest.CaptureFixture[str]):
    bench_host(NO_SPARSE, request_sizes=(3,), timing=FAST)
    out = capsys.readouterr().out
    assert all(word in out for word in ("us/sample", "submit", "pack", "launch", "resolve", "sum"))
    assert "…" not in out


@pytest.mark.parametrize("sizes", [(), (0, 4)])
def test_bad_sizes_are_named(sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match="requests are of"):
        bench_host(FIXED, request_sizes=sizes)


@pytest.mark.parametrize("config", [CONCAT, FIXED, NO_DENSE], ids=lambda c: c.name)
def test_features_by_name_make_the_batch(config: DLRMConfig):
    batch = generate(config, 5, seed=0)
    made = JaggedBatch.from_features(config, batch.dense, by_name(config, batch))
    np.testing.assert_array_equal(made.values, batch.values)
    np.testing.assert_array_equal(made.offsets, batch.offsets)
    assert (made.weights is None) == (batch.weights is None)


def test_an_instant_device_answers_zeros():
    with Engine.from_segments(InstantSegments(FIXED, EngineOptions(max_batch=8))) as engine:
        found = engine.predict(generate(FIXED, 20, seed=0))
    assert found.tolist() == [[0.0]] * 20


def test_threads_without_clocks_are_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(instant.time, "pthread_getcpuclockid")
    with pytest.raises(Missing, match="clocks of single threads"):
        bench_host(FIXED, request_sizes=(1,), timing=FAST)
