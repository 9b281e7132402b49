"""A server on the engine of another process does what one with its own does, but for changes."""

from collections.abc import Iterator

import httpx
import pytest

from fake_segments import FakeSegments, samples, scores
from recflow_jax.engine.engine import Engine
from recflow_jax.remote.front_end import FrontEnd
from recflow_jax.remote.front_ends import FrontEnds
from request_tensors import as_json, packed
from running_server import RunningServer, serving

MODEL = "/v2/models/fake"


@pytest.fixture(scope="module")
def front_ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEnds]:
    path = tmp_path_factory.mktemp("front ends") / "engine"
    with Engine.from_segments(FakeSegments()) as engine, FrontEnds(engine, path) as front_ends:
        yield front_ends


@pytest.fixture(scope="module")
def server(front_ends: FrontEnds) -> Iterator[RunningServer]:
    with serving(lambda: FrontEnd(front_ends.path), heartbeat_s=0.1) as server:
        yield server


@pytest.fixture
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http) as web:
        yield web


def test_scores_counts_and_statistics(web: httpx.Client, front_ends: FrontEnds) -> None:
    body = as_json(packed(front_ends._engine.config, samples(3, 4)))
    answer = web.post(f"{MODEL}/infer", json=body)
    assert answer.json()["outputs"][0]["data"] == [score for (score,) in scores(3, 4)]
    told = web.get("/metrics").text
    assert 'recflow_front_end_samples_answered_total{model="fake",version="1"}' in told
    assert "recflow_engine" not in told
    stats = web.get(f"{MODEL}/stats").json()["model_stats"][0]
    assert (stats["inference_count"], stats["inference_stats"]["success"]["count"]) == (2, 1)
    assert stats["execution_count"] >= 1


def test_metadata_are_those_of_the_engine(web: httpx.Client, front_ends: FrontEnds) -> None:
    engine = front_ends._engine
    told = web.get(MODEL).json()["properties"]
    assert told["max_samples"] == str(engine.options.max_queued_samples)
    assert told["max_ids_per_sample"] == str(engine.max_ids_per_sample)
    assert told["backend"] == engine.backend.name


def test_rows_are_changed_where_the_engine_is(web: httpx.Client) -> None:
    body = as_json({"ids": samples(1).values, "values": samples(1).dense})
    answer = web.post(f"{MODEL}/versions/1/tables/t/rows", json=body)
    assert answer.status_code == 403 and "not to be changed here" in answer.text


def test_it_ends_when_the_engine_is_gone(server: RunningServer, front_ends: FrontEnds) -> None:
    front_ends.close()
    ending = server.ending()
    assert ending.drained and not ending.stopped
