"""OpenTelemetry spans of requests, where its API is installed and a provider is configured."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:
    trace = None


class Span:
    """What is told of one request; this one tells nobody."""

    def tell(self, **attributes: Any) -> None:
        """Adds attributes, under `recflow.`."""

    def event(self, name: str) -> None:
        """Notes the moment."""


class Tracer:
    """Makes spans; this one makes none. headers: the client's that it looks at."""

    headers: tuple[str, ...] = ()
    _nobodys = nullcontext(Span())

    def span(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """A server's span meanwhile, child of the one that the client's headers name."""
        return self._nobodys


def tracer() -> Tracer:
    """What the process has set up by now."""
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return Tracer()
    return _OpenTelemetry(trace.get_tracer("recflow_jax.serving"), trace.SpanKind.SERVER)


class _Recorded(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def tell(self, **attributes: Any) -> None:
        self._span.set_attributes({f"recflow.{name}": value for name, value in attributes.items()})

    def event(self, name: str) -> None:
        self._span.add_event(name)


class _OpenTelemetry(Tracer):
    headers = ("traceparent", "tracestate")

    def __init__(self, made: Any, kind: Any) -> None:
        self._tracer = made
        self._kind = kind

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name, context=propagate.extract(headers), kind=self._kind
        ) as recorded:
            yield _Recorded(recorded)
