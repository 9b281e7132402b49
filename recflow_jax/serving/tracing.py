"""OpenTelemetry spans of requests, where its API is installed and a provider is configured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:
    trace = None

PARENT = ("traceparent", "tracestate")


class Span:
    """What is told of one request; this one tells nobody."""

    def tell(self, **attributes: Any) -> None:
        """Adds attributes, under `recflow.`."""

    def event(self, name: str) -> None:
        """Notes the moment."""


class _Recorded(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def tell(self, **attributes: Any) -> None:
        self._span.set_attributes({f"recflow.{name}": value for name, value in attributes.items()})

    def event(self, name: str) -> None:
        self._span.add_event(name)


_NOBODYS = Span()


@contextmanager
def span(name: str, headers: Mapping[str, str]) -> Iterator[Span]:
    """A server's span meanwhile, child of the one that the client's headers name."""
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        yield _NOBODYS
        return
    with trace.get_tracer("recflow_jax.serving").start_as_current_span(
        name,
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    ) as recorded:
        yield _Recorded(recorded)
