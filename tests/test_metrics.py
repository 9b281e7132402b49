"""What Prometheus is told: counted to the last request, and all that the dashboard asks for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_clients import tensors
from fake_server import FakeServer, starting
from running_server import SOON_S

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    """Three requests answered (of one sample, 12 in all), one failed, one not taken."""
    with starting("http") as start:
        fake = start()
        for samples in (1, 3, 8):
            assert fake.outcome(*range(samples)).status == 200
        fake.device.break_next("run")
        assert fake.outcome(1).status == 500
        outside = tensors(1) | {"values": np.array([1000])}
        assert fake.asker.ask(outside).result(SOON_S).status == 400
        yield fake


@pytest.fixture(scope="module")
def told(fake: FakeServer) -> dict[str, float]:
    """Every sample of /metrics, its labels in the order of their names."""
    text = httpx.get(fake.server.http + "/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {
        s.name + "".join(f" {v}" for _, v in sorted(s.labels.items())): s.value for s in samples
    }


def test_requests_are_counted_by_outcome(told: dict[str, float]) -> None:
    assert told["recflow_arrivals_total http"] == 5
    assert told["recflow_requests_total ok http"] == 3
    assert told["recflow_requests_total device http"] == 1
    assert told["recflow_requests_total input http"] == 1
    assert told["recflow_request_seconds_count http"] == 5
    assert told["recflow_request_samples_sum"] == 12
    assert told["recflow_ready"] == 1 and told["recflow_inside"] == 0


def test_the_engine_is_counted(told: dict[str, float]) -> None:
    """Batches of 1, 3 and 8 samples, and the failed one, in buckets of 2, 4 and 8."""
    assert told["recflow_engine_samples_answered_total fake 1"] == 12
    assert told["recflow_engine_rejected_total fake input 1"] == 1
    assert told["recflow_engine_failed_total fake 1"] == 1
    assert told["recflow_engine_queued_samples fake 1"] == 0
    batches = [told[f"recflow_engine_batch_samples_bucket {le} fake 1"] for le in ("2.0", "4.0")]
    assert batches[0] >= 2 and batches[1] - batches[0] >= 1
    assert told["recflow_engine_batch_samples_sum fake 1"] == 13
    assert told["recflow_engine_slice_samples_sum fake 1"] == 13
    slices = told["recflow_engine_slices_total fake 1"]
    assert told["recflow_engine_slice_samples_bucket +Inf fake 1"] == slices
    steps = told["recflow_engine_steps_total fake 1"]
    assert told["recflow_engine_step_seconds_bucket +Inf fake 1"] == steps
    assert told["recflow_engine_step_seconds_sum fake 1"] > 0


def test_the_dashboard_asks_for_what_there_is(fake: FakeServer) -> None:
    text = httpx.get(fake.server.http + "/metrics").text
    there = {
        name + end
        for name in re.findall(r"# TYPE (\S+)", text)
        for end in ("", "_bucket", "_sum", "_count")
    }
    asked = set(re.findall(r"\brecflow_\w+", DASHBOARD.read_text()))
    assert len(asked) > 15 and asked <= there


def test_the_dashboard_is_one() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert all(panel["targets"] and panel["title"] for panel in board["panels"])
