"""The engine's own counters for Prometheus, read when they are asked for."""

from collections.abc import Iterator, Mapping

import jax
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from recflow_jax.engine.engine import Engine

COUNTERS = {
    "requests_accepted": "Requests that the engine let in.",
    "samples_accepted": "Samples of those.",
    "requests_answered": "Requests with an answer.",
    "samples_answered": "Samples of those.",
    "cancelled": "Requests that were given up.",
    "failed": "Requests that the device failed.",
    "batches": "Batches launched.",
    "slices": "Slices of embedding work launched.",
    "steps": "Launches to the device.",
}
GAUGES = {
    "queued_samples": "Samples accepted and not yet answered.",
    "mean_batch": "Samples per batch, since the start.",
    "mean_slice": "Samples per slice, since the start.",
    "sample_padding": "The part of all rows of batches that was padding.",
    "id_padding": "The part of all ids of slices that was padding.",
}


class EngineCollector(Collector):
    """Reports one engine under a model's name and version."""

    def __init__(self, engine: Engine, *, model: str, version: str) -> None:
        self._engine = engine
        self._labels = {"model": model, "version": version}

    def describe(self) -> list[Metric]:
        """Nothing: registering asks no engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, at one moment."""
        stats = self._engine.stats()
        for name, text in COUNTERS.items():
            yield self._counter(name, text, "", {"": getattr(stats, name)})
        yield self._counter("rejected", "Requests refused or too late.", "reason", stats.rejected)
        sizes = {str(size): count for size, count in stats.batch_buckets.items()}
        yield self._counter("batches_of", "Batches by padded size.", "bucket", sizes)
        for name, text in GAUGES.items():
            yield self._gauge(name, text, "", {"": getattr(stats, name)})
        plan = {stats.profile or "none": 1}
        yield self._gauge("plan", "The profile table in use.", "profile", plan)
        yield self._gauge("device_bytes", "Memory in use by device.", "device", _device_bytes())

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        return self._filled(CounterMetricFamily, name, text, label, values)

    def _gauge(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        return self._filled(GaugeMetricFamily, name, text, label, values)

    def _filled(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        labels = [*self._labels, *([label] if label else [])]
        family = kind(f"recflow_engine_{name}", text, labels=labels)
        for value, number in values.items():
            own = [value] if label else []
            family.add_metric([*self._labels.values(), *own], number)
        return family


def _device_bytes() -> dict[str, int]:
    """Of the devices that tell."""
    told = {str(device.id): device.memory_stats() for device in jax.local_devices()}
    return {name: stats["bytes_in_use"] for name, stats in told.items() if stats}
