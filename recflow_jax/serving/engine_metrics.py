"""The own counters of an engine, or a front end, for Prometheus: read when they are asked for."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from recflow_jax.engine.stats import STEP_BOUNDS_US, EngineStats
from recflow_jax.remote.front_end import FrontEndStats
from recflow_jax.serving.calls import US_PER_S
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.served import ServedHere

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
    "updates": "Updates of rows that have landed.",
    "rows_updated": "Rows of those.",
}
GAUGES = {
    "queued_samples": "Samples accepted and not yet answered.",
    "sample_padding": "The part of all rows of batches that was padding.",
    "id_padding": "The part of all ids of slices that was padding.",
}


FRONT_END_COUNTERS = {
    "requests_accepted": "Requests that the front end let in.",
    "samples_accepted": "Samples of those.",
    "requests_answered": "Requests with an answer.",
    "samples_answered": "Samples of those.",
    "cancelled": "Requests that were given up.",
    "failed": "Requests that ended with an error.",
    "bundles": "Bundles of requests passed on to the engine.",
}


class EngineCollector(Collector):
    """Reports the engine of the model that is current, if there is one, under name and version."""

    def __init__(self, current: Callable[[], ServedModel | None]) -> None:
        self._current = current

    def describe(self) -> list[Metric]:
        """Nothing: registering asks no engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, at one moment."""
        model = self._current()
        if model is None:
            return iter(())
        labels = {"model": model.name, "version": model.version}
        if isinstance(model.engine, ServedHere):
            return _EngineReport("recflow_engine", labels).families(model.engine)
        return _FrontEndReport("recflow_front_end", labels).families(model.engine.stats())


class _Report:
    """Metrics whose names begin and whose labels are alike."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._labels = labels

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
        family = kind(f"{self._prefix}_{name}", text, labels=labels)
        for value, number in values.items():
            own = [value] if label else []
            family.add_metric([*self._labels.values(), *own], number)
        return family


class _FrontEndReport(_Report):
    """What one front end tells."""

    def families(self, stats: FrontEndStats) -> Iterator[Metric]:
        for name, text in FRONT_END_COUNTERS.items():
            yield self._counter(name, text, "", {"": getattr(stats, name)})
        queued = {"": stats.queued_samples}
        yield self._gauge("queued_samples", GAUGES["queued_samples"], "", queued)


class _EngineReport(_Report):
    """What one engine tells."""

    def families(self, engine: ServedHere) -> Iterator[Metric]:
        stats = engine.stats()
        for name, text in COUNTERS.items():
            yield self._counter(name, text, "", {"": getattr(stats, name)})
        yield self._counter("rejected", "Requests refused or too late.", "reason", stats.rejected)
        text = "Steps that ran a segment and a slice in one executable."
        yield self._counter("co_runs", text, "config", stats.co_runs)
        text = "Batches by how many segments they were cut into."
        cuts = {str(segments): count for segments, count in stats.batch_segments.items()}
        yield self._counter("batch_segments", text, "segments", cuts)
        yield from self._histograms(engine, stats)
        for name, text in GAUGES.items():
            yield self._gauge(name, text, "", {"": getattr(stats, name)})
        plan = {stats.profile or "none": 1}
        yield self._gauge("plan", "The profile table in use.", "profile", plan)
        yield self._gauge("in_use", "1 for the version that is served.", "", {"": 1})
        yield self._gauge("device_bytes", "Memory in use by device.", "device", _device_bytes())

    def _histograms(self, engine: ServedHere, stats: EngineStats) -> Iterator[Metric]:
        options, config = engine.options, engine.config
        batches = {size: stats.batch_buckets.get(size, 0) for size in options.batch_buckets}
        samples = stats.mean_batch * stats.batches
        yield self._histogram("batch_samples", "Samples by batch.", batches, samples)
        sizes = [bucket.samples for bucket in options.slice_buckets(config)]
        slices = {size: stats.slice_buckets.get(size, 0) for size in sizes}
        samples = stats.mean_slice * stats.slices
        yield self._histogram("slice_samples", "Samples by slice.", slices, samples)
        times_s = {bound / US_PER_S: stats.step_times.get(bound, 0) for bound in STEP_BOUNDS_US}
        text = "A step's time from launch to end, behind whatever was in flight."
        yield self._histogram("step_seconds", text, times_s, stats.steps_us / US_PER_S)

    def _histogram(self, name: str, text: str, counts: Mapping[Any, int], total: float) -> Metric:
        """counts: by ascending upper bound, each of its own bucket alone; `total` over all."""
        family = HistogramMetricFamily(f"{self._prefix}_{name}", text, labels=[*self._labels])
        every = {**counts, math.inf: counts.get(math.inf, 0)}
        below = zip(map(floatToGoString, every), itertools.accumulate(every.values()), strict=True)
        family.add_metric([*self._labels.values()], list(below), total)
        return family


def _device_bytes() -> dict[str, int]:
    """Of the devices that tell; where there is an engine, JAX is there."""
    import jax

    told = {str(device.id): device.memory_stats() for device in jax.local_devices()}
    return {name: stats["bytes_in_use"] for name, stats in told.items() if stats}
