"""`recflow bench`: checked answers, counted work, results as JSON, and clear errors."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import pytest
from rich.table import Table

import small_models as models
from pallas_kernels import reference
from recflow_jax.backend import Backend, choose_backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.commands import bench
from recflow_jax.commands.bench import (
    bench_kernels,
    bench_model,
    engine_options,
    unfinished_file,
)
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.layout import Layout
from recflow_jax.measure import contenders, contest, foretold
from recflow_jax.measure.agreement import WrongAnswers, check_answers, reference_scores
from recflow_jax.measure.callers import Here
from recflow_jax.measure.ceilings import Ceilings, Floor, Work, work_of
from recflow_jax.measure.contenders import Lineup
from recflow_jax.measure.corun import CorunResult
from recflow_jax.measure.foretold import Foreteller
from recflow_jax.measure.interactions import (
    bench_interaction,
    bench_pooled_dot,
    interaction_work,
)
from recflow_jax.measure.kernels import WrongKernel, bench_gather
from recflow_jax.measure.load import LoadResult
from recflow_jax.measure.offline import input_sets
from recflow_jax.measure.online import OnlineOptions
from recflow_jax.measure.report import corun_table, show
from recflow_jax.measure.requests import request_pool
from recflow_jax.measure.sustained import Sustained
from recflow_jax.measure.timing import TimingOptions
from recflow_jax.measure.tuning import TRIED_LIMITS
from recflow_jax.model import Ops
from scheduling import HostCosts
from timed_segments import TimedSegments

FAST = TimingOptions(rounds=2, round_s=0.0005, limit_s=0.2)
PAIR = DLRMConfig(
    name="pair",
    tables=(
        TableConfig(name="a", rows=40, dim=8),
        TableConfig(name="b", rows=30, dim=12, dtype="bfloat16"),
    ),
    features=(
        FeatureConfig(name="a", table="a", bag=BagConfig(mean=2)),
        FeatureConfig(name="b", table="b"),
    ),
    dense_width=3,
    bottom_mlp=(4,),
    top_mlp=(8, 1),
)


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, the saturation is the only load that is offered to see which keeps a p99."""

    def tried(
        offer: Callable[[float], LoadResult], most: float, p99_ms: float, *, least: float
    ) -> Sustained:
        return Sustained(qps=most, load=offer(most))

    monkeypatch.setattr(contest, "sustained", tried)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of all modes, as its JSON file holds it."""
    folder = tmp_path_factory.mktemp("bench")
    returned = bench_model(
        PAIR,
        against=("jax", "jax-per-table"),
        batches=(8, 4),
        modes=("offline", "numpy", "online"),
        ids="zipf(1.05)",
        seed=3,
        backend="xla",
        online=OnlineOptions(loads=(0.3,), request_samples=2, seconds=0.2),
        timing=FAST,
        out=folder / "made" / "bench.json",
        figure=folder / "bench.png",
    )
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((folder / "made" / "bench.json").read_text())
    assert stored == json.loads(json.dumps(returned))
    return stored


def test_the_report_says_what_it_holds_for(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    assert report["device"] == "cpu" and report["backend"]["name"] == "xla"
    assert {"jax", "numpy", "recflow-jax"} <= set(report["versions"])
    assert report["model"] == {
        "name": "pair",
        "fingerprint": PAIR.fingerprint,
        "tables": 2,
        "largest_table_rows": 40,
        "rows": 70,
        "table_dtypes": ["bfloat16", "float32"],
        "compute_dtype": "float32",
    }
    assert (report["ids"], report["seed"], report["skipped"]) == ("zipf(1.05)", 3, {})
    assert report["command"] and report["created"].startswith("20")


def test_offline_has_times_errors_ratios_and_floors(report: dict[str, Any]) -> None:
    assert [result["batch"] for result in report["offline"]] == [4, 8]
    for result in report["offline"]:
        times = {n: c["timing"]["median_us"] for n, c in result["contenders"].items()}
        assert list(times) == ["recflow", "jax", "jax-per-table"]
        assert result["ratios"]["jax"] == pytest.approx(times["jax"] / times["recflow"])
        assert all(c["error"] <= 1e-4 for c in result["contenders"].values())
        assert result["floor"]["us"] == max(result["floor"]["bytes_us"], result["floor"]["flop_us"])
        assert result["over_dispatch"] == pytest.approx(
            times["recflow"] / result["dispatch"]["median_us"]
        )
    assert report["timing"]["rounds"] == FAST.rounds
    assert report["ceilings"]["copy_bytes_per_s"] > 1e8


def test_numpy_and_online_compare_with_plain_jax(report: dict[str, Any]) -> None:
    for result in report["numpy"]:
        assert set(result["contenders"]) == {"recflow", "read-only", "jax"}
    online = report["online"]
    assert set(online["saturation"]) == {"recflow", "serial", "jax"} == set(online["sustained"])
    (point,) = online["points"]
    assert point["qps"] == pytest.approx(0.3 * min(online["saturation"].values()))
    assert point["collecting"]["in_flight"] in (1, 2) and online["host"] is None
    for load in point["contenders"].values():
        assert 0 < load["p50_ms"] <= load["p95_ms"] <= load["p99_ms"] and load["failed"] == 0


def test_a_profile_table_foretells_online_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a host that is as slow as the engine when it was saturated beside the load."""
    saturated, slow_at = _noted_saturations(monkeypatch), list[float]()
    saturating_at = Foreteller.saturating_at

    def noted(teller: Foreteller, qps: float, requests: Sequence[JaggedBatch]) -> Foreteller:
        slow_at.append(qps)
        return saturating_at(teller, qps, requests)

    monkeypatch.setattr(Foreteller, "saturating_at", noted)
    monkeypatch.setattr(foretold, "measured_rates", lambda *_, **__: HostCosts(submit_us=20))
    online = _with_a_table(tmp_path, seconds=0.1, repeats=3)
    # Three rounds of all contenders, serial batching twice; then the engine beside each load.
    assert len(saturated) == 3 * 4 + 3 and slow_at == [median(saturated[-3:])]
    assert online["host"]["submit_us"] >= 20
    (point,) = online["points"]
    for name in ("recflow", "serial"):
        told, measured = point["foretold"][name], point["contenders"][name]
        assert told["p50_ratio"] == pytest.approx(told["p50_ms"] / measured["p50_ms"])


def _with_a_table(tmp_path: Path, **how: Any) -> dict[str, Any]:
    """An online run of a model that has a profile table, at 400 requests per second."""
    table = tmp_path / "profile.json"
    options = engine_options((4,), choose_backend("xla"))
    TimedSegments(models.FIXED, options).table().save(table)
    online = OnlineOptions(qps=(400.0,), request_samples=2, **how)
    run: dict[str, Any] = {"batches": (4,), "modes": ("online",), "backend": "xla", "timing": FAST}
    return bench_model(models.FIXED, profile=table, online=online, **run)["online"]


def _noted_saturations(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is measured from now on."""
    saturate, found = Here.saturate, list[float]()

    def noted(callers: Here, seconds: float) -> float:
        found.append(saturate(callers, seconds))
        return found[-1]

    monkeypatch.setattr(Here, "saturate", noted)
    return found


@pytest.mark.usefixtures("one_try")
def test_saturation_is_the_median_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _noted_saturations(monkeypatch)
    online = OnlineOptions(qps=(400.0,), request_samples=3, seconds=0.2, repeats=3)
    result = bench_model(models.CONCAT, batches=(4,), modes=("online",), online=online, timing=FAST)
    recflow, jax, two, one = (median(found[i::4]) for i in range(4))
    serial = max(one, two)
    assert result["online"]["saturation"] == {"recflow": recflow, "jax": jax, "serial": serial}


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("against", [(), ("jax",)])
def test_online_can_do_without_plain_jax(against: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    expected, advanced = list[int](), list[None]()

    @contextmanager
    def noted(_: str, total: int) -> Iterator[Callable[[], None]]:
        expected.append(total)
        yield lambda: advanced.append(None)

    monkeypatch.setattr(bench, "progress", noted)
    online = OnlineOptions(qps=(400.0,), request_samples=3, seconds=0.1)
    result = bench_model(
        models.CONCAT, against=against, batches=(4,), modes=("online",), online=online, timing=FAST
    )["online"]
    assert result["saturation"].keys() == {"recflow", "serial", *against}
    assert result["points"][0]["contenders"].keys() == result["sustained"].keys()
    assert result["sustained"].keys() == result["saturation"].keys()
    # No half, quarter and eighth of these batches is tried.
    assert expected == [len(advanced) + TRIED_LIMITS]


@pytest.mark.usefixtures("one_try")
def test_jagged_models_have_all_modes_too(capsys: pytest.CaptureFixture[str]) -> None:
    online = OnlineOptions(qps=(400.0,), request_samples=3, seconds=0.2, serial_in_flight=(1,))
    result = bench_model(
        models.CONCAT, batches=(4,), modes=("numpy", "online"), online=online, timing=FAST
    )
    assert result["online"]["points"][0]["collecting"]["in_flight"] == 1
    assert result["online"]["points"][0]["share"] is None
    printed = capsys.readouterr().out
    assert "p99 ms" in printed and "samples/s" in printed


def test_bfloat16_agrees_within_its_tolerance() -> None:
    result = bench_model(models.BF16, batches=(16,), timing=FAST)
    errors = [c["error"] for c in result["offline"][0]["contenders"].values()]
    assert 0 < max(errors) < 0.1


@pytest.mark.parametrize("kernel", ["gather", "dense"])
def test_kernels_alone(kernel: str, tmp_path: Path) -> None:
    out, figure = tmp_path / "kernel.json", tmp_path / "kernel.png"
    result = bench_kernels(
        PAIR, kernels=[kernel], batches=(4,), timing=FAST, out=out, figure=figure
    )
    assert json.loads(out.read_text())[kernel] == json.loads(json.dumps(result[kernel]))
    assert figure.exists()
    first = result[kernel][0]
    if kernel == "gather":
        assert first["row_bytes"] == 4 * (2 * 32 + 24)
        rate = 1e6 * first["row_bytes"] / first["timings"]["xla"]["median_us"]
        assert first["row_bytes_per_s"]["xla"] == pytest.approx(rate)
    else:
        assert (first["layer"], first["inputs"], first["outputs"]) == ("bottom.0", 3, 4)


@pytest.mark.parametrize("config", [models.DOT, models.DCN])
def test_interactions_alone(config: DLRMConfig, tmp_path: Path) -> None:
    out, figure = tmp_path / "kernel.json", tmp_path / "kernel.png"
    result = bench_kernels(
        config, kernels=["interaction"], batches=(4,), timing=FAST, out=out, figure=figure
    )
    (found,) = result["interaction"]
    assert json.loads(out.read_text())["interaction"][0] == json.loads(json.dumps(found))
    assert figure.exists()
    time = found["timings"]["xla"]["median_us"]
    assert found["share_of_floor"]["xla"] == pytest.approx(found["floor_us"] / time)
    assert (found["interaction"], found["batch"]) == (config.interaction, 4)


def test_bags_and_dots_together(tmp_path: Path) -> None:
    out, figure = tmp_path / "dots.json", tmp_path / "dots.png"
    result = bench_kernels(
        models.DOT, kernels=["pooled-dot"], batches=(4, 8), timing=FAST, out=out, figure=figure
    )
    assert figure.stat().st_size > 0
    assert json.loads(out.read_text())["pooled-dot"] == json.loads(json.dumps(result["pooled-dot"]))
    assert [found["batch"] for found in result["pooled-dot"]] == [4, 8]
    for found in result["pooled-dot"]:
        assert found["floor_us"] > 0
        assert {"apart", "xla"} == found["timings"].keys()


def test_wrong_dots_of_bags_are_not_timed() -> None:
    ops = Ops(pooled_dot=lambda *given, **how: 2 * reference.pooled_dot(*given, **how))
    broken = Backend(name="mosaic", reason="a test", ops=ops)
    params = models.params_of(models.DOT)
    with pytest.raises(WrongKernel, match="mosaic is"):
        bench_pooled_dot(models.DOT, params, broken, (4,), ids="uniform", seed=0)


@pytest.mark.parametrize("config", [models.CONCAT, models.DCN], ids=lambda c: c.name)
def test_models_without_dots_of_bags_have_none_to_time(config: DLRMConfig) -> None:
    with pytest.raises(ValueError, match=f"model '{config.name}' has no bags whose dots"):
        bench_kernels(config, kernels=["pooled-dot"], batches=(4,))


def test_the_floor_of_an_interaction() -> None:
    """Four float32 samples; 4 vectors of dim 8 to 8 + 6 columns, and two layers of rank 4."""
    width = models.DCN.interaction_width
    weights = 2 * 2 * width * 4
    assert interaction_work(models.DOT, 4) == (4 * 4 * (32 + 14), 4 * 6 * 2 * 8)
    assert interaction_work(models.DCN, 4) == (4 * (4 * 2 * width + weights), 2 * 4 * weights)


def test_a_wrong_interaction_is_not_timed() -> None:
    broken = Backend(name="mosaic", reason="a test", ops=Ops(dot=lambda x, **_: 2 * x))
    with pytest.raises(WrongKernel, match="mosaic is"):
        bench_interaction(models.DOT, models.params_of(models.DOT), broken, (4,), seed=0)


def test_unasked_all_kernels_of_the_model_are_measured() -> None:
    result = bench_kernels(PAIR, batches=(4,), timing=FAST)
    assert "gather" in result and "dense" in result and "interaction" not in result


def test_co_runs_need_the_kernels() -> None:
    with pytest.raises(ValueError, match="co-run kernels need back end mosaic: this is xla"):
        bench_kernels(PAIR, kernels=["corun"], batches=(4,), backend="xla")


def test_co_runs_stand_beside_sum_and_longer_part() -> None:
    result = CorunResult(
        layer="top.0", batch=8, inputs=4, outputs=2, slice_samples=4, layer_us=60.0,
        gather_us=40.0, corun_us={"deep": 80.0, "shallow": 75.0}, floor_us=50.0,
    )  # fmt: skip
    assert (result.best, result.best_over_sum, result.max_us) == ("shallow", 0.75, 60.0)
    assert corun_table([result]).row_count == 1


def test_a_model_without_interaction_has_none_to_time() -> None:
    with pytest.raises(ValueError, match="model 'pair' concatenates"):
        bench_kernels(PAIR, kernels=["interaction"], batches=(4,))


def test_a_wrong_gather_is_not_timed() -> None:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * reference.pooled_gather(*args, **kwargs)

    broken = Backend(name="mosaic", reason="a test", ops=Ops(pooled_gather=doubled))
    with pytest.raises(WrongKernel, match="mosaic is 1 of the largest value off"):
        bench_gather(
            PAIR, models.params_of(PAIR), broken, (4,), ids="uniform", seed=0, options=FAST
        )


def test_a_gather_that_writes_zero_columns_is_held_against_one_as_wide() -> None:
    def gather(*args: Any, **kwargs: Any) -> Any:
        return reference.pooled_gather(*args, **kwargs)

    padding = Backend(
        name="mosaic", reason="a test", ops=Ops(pooled_gather=gather, dense_columns=64)
    )
    result = bench_gather(
        PAIR, models.params_of(PAIR), padding, (4,), ids="uniform", seed=0, options=FAST
    )
    assert set(result[0].timings) == {"mosaic", "reference"}


def test_a_contender_with_wrong_scores_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.PlainModel.forward

    def wrong(*args: Any) -> Any:
        return right(*args) + jnp.array([[0.0], [0.0], [1.0], [0.0]])

    monkeypatch.setattr(contenders.PlainModel, "forward", wrong)
    with pytest.raises(WrongAnswers, match=r"jax gives \[.*\] for sample 2"):
        bench_model(PAIR, batches=(4,), timing=FAST)


def test_scores_that_are_no_numbers_are_wrong() -> None:
    scores = np.array([[1.0], [2.0], [4.0]], np.float32)
    with pytest.raises(WrongAnswers, match="recflow gives .*nan.* for sample 1"):
        check_answers(scores, {"recflow": scores * [[1], [np.nan], [1]]}, dtype="float32")


def test_scores_that_are_all_somewhat_off_are_wrong() -> None:
    scores = np.arange(100, dtype=np.float32)[:, None]
    check_answers(scores, {"recflow": scores + 0.05 * scores.std()}, dtype="bfloat16")
    with pytest.raises(WrongAnswers, match="recflow's scores are 0.08 .*, more than 0.067"):
        check_answers(scores, {"recflow": scores + 0.08 * scores.std()}, dtype="bfloat16")


def test_samples_behind_the_reference_are_held_against_the_first_contender() -> None:
    first = np.array([[1.0], [2.0], [4.0]], np.float32)
    other = first + [[0], [0], [1]]
    with pytest.raises(WrongAnswers, match="other gives .* for sample 2"):
        check_answers(first[:2], {"first": first, "other": other}, dtype="bfloat16")


def test_the_reference_is_the_model() -> None:
    config, params = models.BF16, models.params_of(models.BF16)
    batch = input_sets(config, 5, ids="uniform", seed=1)[0]
    exact = dataclasses.replace(config, compute_dtype="float32")
    expected = models.reference_scores(exact, params, batch)
    found = reference_scores(config, params, batch, samples=3)
    np.testing.assert_allclose(found, expected[:3], rtol=1e-5, atol=1e-5)


def test_work_counts_sectors_and_distinct_rows() -> None:
    """Rows of 32 bytes are one sector; of 24 bytes one or two, by where they start."""
    batch = JaggedBatch(
        dense=np.zeros((2, 3), np.float32),
        values=np.array([5, 5, 0, 5, 6, 1], np.int32),
        offsets=np.array([0, 2, 3, 5, 6], np.int64),
    )
    work = work_of(PAIR, Layout.of(PAIR), batch)
    assert work.row_bytes == 4 * 32 + (1 + 2) * 32
    assert work.distinct_row_bytes == 2 * 32 + (1 + 2) * 32
    assert work.input_bytes == 4 * (6 + 5) + 2 * 3 * 4
    assert work.layer_bytes == 4 * (3 * 4 + 4 + (4 + 20) * 8 + 8 + 8 + 1)
    assert work.output_bytes == 2 * 4
    assert work.flop == 2 * 2 * (3 * 4 + 24 * 8 + 8)


def test_a_quantised_row_takes_a_sector_more() -> None:
    """Rows of 8 and of 12 bytes, of which the one at byte 60 lies in two sectors."""
    config = PAIR.with_dtypes(tables="int8")
    batch = JaggedBatch(
        dense=np.zeros((2, 3), np.float32),
        values=np.array([5, 5, 0, 5, 6, 1], np.int32),
        offsets=np.array([0, 2, 3, 5, 6], np.int64),
    )
    work = work_of(config, Layout.of(config), batch)
    assert work.row_bytes == 4 * (32 + 32) + 2 * (32 + 32)
    assert work.distinct_row_bytes == 2 * (32 + 32) + 2 * (32 + 32)


def test_torch_has_no_quantised_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "torch_is_installed", lambda: True)
    config = PAIR.with_dtypes(tables="int8")
    rivals = ("jax", "jax-per-table", "torch")
    lineup = Lineup(config, models.params_of(config), choose_backend("xla"), rivals)
    assert lineup.rivals == ("jax", "jax-per-table")
    reason = "its EmbeddingBag takes no int8 tables with a scale per row"
    assert lineup.skipped == {"torch": reason}


def test_the_floor_is_the_larger_of_bytes_and_flop() -> None:
    ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flop_per_s=1e12, matmul_dtype="float32")
    work = Work(
        row_bytes=600,
        distinct_row_bytes=100,
        input_bytes=200,
        layer_bytes=150,
        output_bytes=50,
        flop=3e6,
    )
    floor = Floor.of(work, ceilings)
    assert (floor.bytes_us, floor.flop_us, floor.us) == pytest.approx((1.0, 3.0, 3.0))


def test_input_sets_outgrow_caches() -> None:
    few = input_sets(PAIR, 4, ids="uniform", seed=1)
    assert len(few) == 32
    assert len({batch.values.tobytes() for batch in few}) == 32


def test_requests_have_mlperf_sizes_or_one() -> None:
    sizes = {request.samples for request in request_pool(PAIR, ids="uniform", seed=0)}
    assert sizes <= {100, 200, 300, 400, 500, 600, 700} and len(sizes) > 1
    fixed = request_pool(PAIR, ids="uniform", seed=0, request_samples=3)
    assert {request.samples for request in fixed} == {3}


def test_a_title_may_be_wider_than_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    title = "Microseconds per batch, " * 4
    show(Table("batch", title=title))
    assert capsys.readouterr().out.splitlines()[0].rstrip() == title.rstrip()


def test_who_cannot_take_part_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "torch_is_installed", lambda: False)
    monkeypatch.setattr(contenders, "MOST_TABLES_APART", 1)
    lineup = Lineup(
        PAIR, models.params_of(PAIR), choose_backend("xla"), ("jax", "jax-per-table", "torch")
    )
    assert lineup.rivals == ("jax",)
    assert lineup.skipped["torch"] == "torch is not installed: pip install 'recflow-jax[torch]'"
    assert "2 tables" in lineup.skipped["jax-per-table"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ("sideways",)}, "mode 'sideways' is not one of offline, overlap, numpy"),
        ({"against": ("abacus",)}, "rival 'abacus' is not one of jax, jax-per-table, torch"),
        ({"batches": ()}, "batches are"),
        ({"batches": (0, 4)}, "batches are"),
        ({"modes": ("numpy",), "against": ("torch",)}, "mode 'numpy' compares with rival 'jax'"),
        (
            {"modes": ("online",), "against": (), "online": OnlineOptions(load_of="jax")},
            "load_of is 'jax', not one of lowest, recflow, serial$",
        ),
        ({"ids": "normal"}, "ids 'normal'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_model(PAIR, timing=FAST, **{"batches": (4,), **arguments})


def test_requests_that_a_front_end_would_refuse_are_refused_at_once() -> None:
    online = OnlineOptions(front_ends=1, request_samples=5)
    with pytest.raises(ValueError, match="up to 5 samples: .* the largest batch, 4"):
        bench_model(PAIR, batches=(4,), modes=("online",), online=online, timing=FAST)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(
        ValueError,
        match="kernel 'softmax' is not one of gather, dense, interaction, pooled-dot, corun",
    ):
        bench_kernels(PAIR, kernels=["softmax"], batches=(4,))


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize(("keeps_up", "times"), [(True, 3), (False, 1)])
def test_a_load_is_offered_again_to_who_keeps_up_and_the_median_counts(
    keeps_up: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadResult, "kept_up", keeps_up)
    online = OnlineOptions(qps=(400.0,), request_samples=3, seconds=0.2, repeats=3)
    result = bench_model(models.CONCAT, batches=(4,), modes=("online",), online=online, timing=FAST)
    (point,) = result["online"]["points"]
    assert set(point["p99s_ms"]) == set(point["contenders"]) == {"recflow", "serial", "jax"}
    for name, load in point["contenders"].items():
        assert len(point["p99s_ms"][name]) == times
        assert load["p99_ms"] == sorted(point["p99s_ms"][name])[times // 2]


@pytest.mark.usefixtures("one_try")
def test_requests_of_the_engine_can_be_made_in_other_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both ways of batching, with a profile table, which foretells none of it."""
    saturated_here = _noted_saturations(monkeypatch)
    online = _with_a_table(tmp_path, seconds=0.5, front_ends=2)
    assert online["front_ends"] == 2 and set(online["saturation"]) == {"recflow", "serial", "jax"}
    assert saturated_here == [online["saturation"]["jax"]]
    (point,) = online["points"]
    for load in point["contenders"].values():
        assert load["requests"] >= 25 and load["failed"] == 0 and load["p50_ms"] > 0
    assert point["waited"] is None and not point["foretold"] and online["host"] is None
    found = " ".join(capsys.readouterr().out.split())
    assert "2 front ends in processes of their own (not jax's)" in found
    assert "zero queue" not in found


@pytest.mark.parametrize(
    "options",
    [
        {"loads": (0.5, 0.0)},
        {"qps": (-1.0,)},
        {"seconds": 0.0},
        {"repeats": 0},
        {"front_ends": -1},
        {"serial_in_flight": ()},
        {"serial_in_flight": (2, 0)},
    ],
)
def test_bad_loads_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"online: {next(iter(options))}"):
        OnlineOptions(**options)


def test_the_command_line_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [os.path.join("bin", "recflow"), "bench", "kernels"])
    result = bench_kernels(PAIR, kernels=["gather"], batches=(4,), timing=FAST)
    assert result["command"] == "recflow bench kernels"


@pytest.mark.usefixtures("one_try")
def test_what_is_measured_so_far_is_there_if_a_run_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beside the results of an earlier one, which stay until it ends."""
    out, online = tmp_path / "o.json", OnlineOptions(qps=(400.0,), request_samples=3, seconds=0.2)
    ways = {"batches": (4,), "modes": ("online",), "online": online, "timing": FAST, "out": out}
    out.write_text("{}")
    with monkeypatch.context() as cut:
        cut.setattr(contest, "sustained", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench_model(models.CONCAT, **ways)
    so_far = json.loads(unfinished_file(out).read_text())
    assert so_far["online"]["saturation"]["recflow"] > 0
    assert len(so_far["online"]["points"]) == 1 and not so_far["online"]["sustained"]
    assert out.read_text() == "{}"
    assert bench_model(models.CONCAT, **ways) == json.loads(out.read_text())
    assert [*tmp_path.iterdir()] == [out]


def _interrupt(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt
