"""Spans of requests, under those of their clients; none where nobody asked for them."""

from collections.abc import Iterator

import grpc
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fake_clients import INFER, message, tensors
from fake_server import FakeServer, starting
from recflow_jax.serving import tracing
from request_tensors import as_json
from running_server import SOON_S, wait_for

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


@pytest.fixture
def fake(spans: InMemorySpanExporter) -> Iterator[FakeServer]:
    """Started when a provider is set up."""
    with starting("grpc") as start:
        yield start()


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    """The span of the one request, which may end just after its answer."""
    wait_for(lambda: len(spans.get_finished_spans()) == 1)
    return spans.get_finished_spans()[0]


def ask(fake: FakeServer, protocol: str) -> None:
    if protocol == "http":
        url = fake.server.http + INFER
        assert httpx.post(url, json=as_json(tensors(1)), headers=PARENT).status_code == 200
    else:
        fake.asker.infer(message(tensors(1)), metadata=tuple(PARENT.items()), timeout=SOON_S)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_span_tells_of_its_request(
    spans: InMemorySpanExporter, fake: FakeServer, protocol: str
) -> None:
    ask(fake, protocol)
    span = only(spans)
    assert span.name == "infer" and span.kind == trace.SpanKind.SERVER
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT["traceparent"]
    assert span.attributes == {
        "recflow.protocol": protocol,
        "recflow.outcome": "ok",
        "recflow.model": "fake",
        "recflow.version": "1",
    }
    assert [event.name for event in span.events] == ["submitted"]


def test_a_span_tells_of_a_failure(spans: InMemorySpanExporter, fake: FakeServer) -> None:
    fake.device.break_next("run")
    assert fake.outcome(1).status == grpc.StatusCode.INTERNAL
    assert (only(spans).attributes or {})["recflow.outcome"] == "device"


def test_without_a_provider_nothing_is_recorded() -> None:
    with tracing.tracer().span("infer", PARENT) as span:
        assert not trace.get_current_span().is_recording()
        span.tell(outcome="ok")
        span.event("submitted")


def test_without_opentelemetry_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    with tracing.tracer().span("infer", PARENT) as span:
        span.tell(outcome="ok")
