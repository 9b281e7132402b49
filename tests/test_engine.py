"""An engine on real models: right answers whatever arrives, and nothing compiled on the way."""

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine import intake, staging, stays
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.messages import Inbox
from recflow_jax.engine.stays import Stay
from recflow_jax.measure.host import by_name
from small_models import (
    BF16,
    CONCAT,
    DCN,
    DOT,
    FIXED,
    FLOAT32_MODELS,
    FP16,
    NO_DENSE,
    SMALL,
    assert_same_scores,
    compiled,
    params_of,
    reference_scores,
)

SOON_S = 60
COMPILE_EVENTS = ("jaxpr_trace", "jaxpr_to_mlir", "backend_compile")


def engine_of(config: DLRMConfig) -> Engine:
    return Engine.from_segments(compiled(config))


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Every trace, lowering and compilation that JAX does meanwhile, in any thread."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if any(name in event for name in COMPILE_EVENTS):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def cut_at_random(total: int, seed: int) -> list[tuple[int, int]]:
    """Requests of many sizes, empty ones too, that make up `total` samples."""
    rng = random.Random(seed)
    cuts, start = [], 0
    while start < total:
        stop = min(start + rng.choice([0, 1, 1, 2, 3, 7, 19, 40]), total)
        cuts.append((start, stop))
        start = stop
    return cuts


def ask_from_threads(engine: Engine, batch: JaggedBatch, seed: int, threads: int) -> np.ndarray:
    """All scores, asked for in random pieces at random times by several threads."""
    scores = np.full((batch.samples, engine.config.outputs), np.nan, np.float32)
    cuts = cut_at_random(batch.samples, seed)

    def client(own: list[tuple[int, int]], rng: random.Random) -> None:
        rng.shuffle(own)
        answers = []
        for start, stop in own:
            time.sleep(rng.choice([0, 0, 0.001]))
            answers.append(engine.submit(batch.part(start, stop), priority=rng.randrange(3)))
        for (start, stop), answer in zip(own, answers, strict=True):
            scores[start:stop] = answer.result(timeout=SOON_S)

    clients = [
        threading.Thread(target=client, args=(cuts[i::threads], random.Random(seed + i)))
        for i in range(threads)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return scores


@pytest.mark.parametrize("config", [*FLOAT32_MODELS, FIXED, BF16, FP16], ids=lambda c: c.name)
def test_answers_are_the_reference_whatever_the_arrivals(config: DLRMConfig):
    """And nothing is traced or compiled after the start."""
    batch = generate(config, 150, seed=0)
    expected = reference_scores(config, params_of(config), batch)
    with engine_of(config) as engine, count_compilations() as compilations:
        for seed in range(3):
            found = ask_from_threads(engine, batch, seed, threads=3)
            assert_same_scores(config, found, expected)
    assert compilations == []


def test_counting_sees_compilations():
    with count_compilations() as compilations:
        jax.jit(lambda x: x + len(compilations))(np.zeros(3))
    assert len(compilations) >= 3


def test_the_same_batch_gives_the_same_bits():
    """Alone on an idle engine, the samples of a request make the same batch each time."""
    batch = generate(DCN, 13, seed=0)
    with engine_of(DCN) as one, engine_of(DCN) as other:
        first = one.predict(batch)
        for engine in (one, other):
            np.testing.assert_array_equal(engine.predict(batch), first)


def test_more_samples_than_the_queue_holds():
    batch = generate(CONCAT, 70, seed=0)
    few = dataclasses.replace(SMALL, max_queued_samples=20)
    with Engine(CONCAT, params_of(CONCAT), options=few) as engine:
        found = engine.predict(batch)
        assert engine.stats().requests_accepted == 7
    assert_same_scores(CONCAT, found, reference_scores(CONCAT, params_of(CONCAT), batch))


def test_features_by_name():
    """Every form that a feature may be given in; the same samples as a JaggedBatch."""
    dense = np.ones((2, 5))
    sparse = {
        "user": [4, 5],
        "history": [[1, 2, 3], []],
        "item": (np.array([7, 8, 9]), np.array([0, 1, 3])),
    }
    batch = JaggedBatch.from_features(DOT, dense, sparse)
    expected = reference_scores(DOT, params_of(DOT), batch)
    with engine_of(DOT) as engine:
        assert_same_scores(DOT, engine.predict(dense, sparse), expected)
        assert_same_scores(DOT, engine.submit(dense, sparse).result(), expected)
        assert_same_scores(DOT, engine.predict(batch), expected)


def test_fixed_bags_by_name():
    batch = generate(FIXED, 9, seed=0)
    with engine_of(FIXED) as engine:
        found = engine.submit(batch.dense, by_name(FIXED, batch)).result(timeout=SOON_S)
    assert_same_scores(FIXED, found, reference_scores(FIXED, params_of(FIXED), batch))


@pytest.mark.parametrize("config", FLOAT32_MODELS, ids=lambda c: c.name)
def test_no_samples_give_no_scores(config: DLRMConfig):
    none = generate(config, 0, seed=0)
    with engine_of(config) as engine:
        for found in (engine.predict(none), engine.submit(none).result(timeout=0)):
            assert found.shape == (0, config.outputs) and found.dtype == np.float32


def test_empty_bags_alone():
    n = 3
    batch = JaggedBatch(
        dense=np.zeros((n, 0), np.float32),
        values=np.zeros(0, np.int64),
        offsets=np.zeros(3 * n + 1, np.int64),
    )
    with engine_of(NO_DENSE) as engine:
        found = engine.predict(batch)
    assert_same_scores(NO_DENSE, found, reference_scores(NO_DENSE, params_of(NO_DENSE), batch))


def test_a_sample_that_fills_the_largest_slice():
    """A bag of all ids that there is room for, beside ordinary requests."""
    segments = compiled(DOT)
    most = segments.max_ids_per_sample
    rng = np.random.default_rng(0)
    dense = np.ones((1, 5), np.float32)
    sparse = {"user": [1], "history": [rng.integers(0, 31, most - 2)], "item": [2]}
    large = JaggedBatch.from_features(DOT, dense, sparse)
    small = generate(DOT, 3, seed=0)
    with Engine.from_segments(segments) as engine:
        answers = [engine.submit(b) for b in (small, large, small)]
        for batch, answer in zip((small, large, small), answers, strict=True):
            expected = reference_scores(DOT, params_of(DOT), batch)
            assert_same_scores(DOT, answer.result(timeout=SOON_S), expected)
        sparse["history"] = [rng.integers(0, 31, most - 1)]
        with pytest.raises(InputError, match=f"sample 0 has {most + 1} ids in all"):
            engine.predict(dense, sparse)


def _spoil(name: str, value: float, place: int = 0):
    """`generate`'s samples with one number changed."""

    def spoilt(batch: JaggedBatch) -> JaggedBatch:
        array = np.array(getattr(batch, name))
        array.reshape(-1)[place] = value
        return dataclasses.replace(batch, **{name: array})

    return spoilt


def _without(name: str):
    return lambda batch: dataclasses.replace(batch, **{name: None})


def _as_type(name: str, dtype: type):
    return lambda batch: dataclasses.replace(batch, **{name: getattr(batch, name).astype(dtype)})


def _cut(name: str):
    return lambda batch: dataclasses.replace(batch, **{name: getattr(batch, name)[:-1]})


BAD = {
    "nan": (_spoil("dense", np.nan, 7), "dense feature 2, sample 1: nan"),
    "infinite": (_spoil("dense", -np.inf, 5), "dense feature 0, sample 1: -inf"),
    "id too large": (_spoil("values", 50), "feature 'user', sample 0: id 50 is not in"),
    "id negative": (_spoil("values", -1), "feature 'user', sample 0: id -1 is not in"),
    "offsets fall": (_spoil("offsets", -3, 2), "sample 0: offsets fall from 1 to -3"),
    "offsets start late": (_spoil("offsets", 1), "offsets run from 1"),
    "offsets of another type": (_as_type("offsets", np.int32), "offsets are int32"),
    "offsets too few": (_cut("offsets"), r"offsets are int64\[20\]"),
    "ids of another type": (_as_type("values", np.float32), "ids are float32"),
    "dense of another type": (_as_type("dense", np.float64), "dense features are float64"),
    "dense of another width": (
        lambda b: dataclasses.replace(b, dense=b.dense[:, :-1]),
        r"shape \[4, 4\], not \[n, 5\]",
    ),
    "weights missing": (_without("weights"), "weights are missing"),
    "weights too few": (_cut("weights"), "weights are float32"),
    "weight infinite": (_spoil("weights", np.inf), "feature 'user', sample 0: weight inf"),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_samples_raise_and_harm_nobody(how: str):
    spoil, message = BAD[how]
    good = generate(CONCAT, 4, seed=0)
    with engine_of(CONCAT) as engine:
        before = engine.submit(good)
        for ask in (engine.submit, engine.predict):
            with pytest.raises(InputError, match=message):
                ask(spoil(good))
        after = engine.submit(good)
        expected = reference_scores(CONCAT, params_of(CONCAT), good)
        for answer in (before, after):
            assert_same_scores(CONCAT, answer.result(timeout=SOON_S), expected)
        assert engine.stats().rejected == {"input": 2}


def test_bad_features_by_name_raise():
    with engine_of(DOT) as engine:
        with pytest.raises(InputError, match="feature 'history' is missing"):
            engine.submit(np.zeros((1, 5)), {"user": [1], "item": [1]})
        with pytest.raises(InputError, match="feature 'user' has 2 bags for 1 samples"):
            engine.predict(np.zeros((1, 5)), {"user": [1, 2], "item": [1], "history": [[1]]})
        with pytest.raises(InputError, match="which has its own"):
            engine.submit(generate(DOT, 1, seed=0), {"user": [1]})
        with pytest.raises(TypeError):
            engine.submit(generate(DOT, 1, seed=0), priority="high")  # pyright: ignore
        assert engine.stats().rejected == {"input": 3}


def test_parameters_of_another_model_are_refused_before_anything_is_compiled():
    with count_compilations() as compilations:
        with pytest.raises(ValueError, match="params: .*bottom.* is missing"):
            Engine(DOT, dataclasses.replace(params_of(DOT), bottom=()), options=SMALL)
    assert not any("backend_compile" in event for event in compilations)


def test_what_it_runs_on_is_told():
    with engine_of(DOT) as engine:
        assert (engine.config, engine.options) == (DOT, SMALL)
        assert (engine.backend.name, engine.backend.reason) == ("xla", "asked for")


@pytest.mark.parametrize(("large_ids", "enters"), [(1, []), (2**20, [True])])
def test_only_callers_of_small_requests_take_turns_with_the_launcher(
    large_ids: int, enters: list[bool], monkeypatch: pytest.MonkeyPatch
):
    seen: list[bool] = []
    monkeypatch.setattr(intake, "LARGE_IDS", large_ids)
    monkeypatch.setattr(Inbox, "caller_enters", lambda _: seen.append(True))
    with engine_of(FIXED) as engine:
        engine.submit(generate(FIXED, 3, seed=0)).result(SOON_S)
    assert seen == enters


@pytest.mark.parametrize("large_ids", [1, 2**20])
def test_requests_are_copied_once_whether_they_are_large_or_small(
    large_ids: int, monkeypatch: pytest.MonkeyPatch
):
    """Into slices' buffers, which nobody holds for longer than room is found there."""
    stayed: list[bool] = []

    def stay(*args: Any, **kwargs: Any) -> Stay | None:
        staying = stays.stay(*args, **kwargs)
        stayed.append(staying is not None)
        return staying

    monkeypatch.setattr(intake, "LARGE_IDS", large_ids)
    monkeypatch.setattr(staging, "stay", stay)
    batches = [generate(FIXED, 8, seed=seed) for seed in range(9)]
    with engine_of(FIXED) as engine:
        for batch in batches:
            scores = engine.submit(batch).result(SOON_S)
            assert_same_scores(FIXED, scores, reference_scores(FIXED, params_of(FIXED), batch))
    assert stayed == [True] * len(batches)
