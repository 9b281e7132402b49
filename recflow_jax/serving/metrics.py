"""What Prometheus and Triton's clients are told: counts of the server, and of the engine in it."""

import collections
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from recflow_jax.remote.front_end import FrontEndStats
from recflow_jax.serving.engine_metrics import EngineCollector
from recflow_jax.serving.model import ServedModel

NS_PER_S = 1e9
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SAMPLES_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """The counters of one server, and of the model that is `current`."""

    def __init__(self, current: Callable[[], ServedModel | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(current))
        requests = Counter(
            "recflow_requests",
            "Requests by protocol and outcome.",
            ("protocol", "outcome"),
            registry=self._registry,
        )
        arrivals = Counter(
            "recflow_arrivals", "Requests as they come.", ("protocol",), registry=self._registry
        )
        latency = Histogram(
            "recflow_request_seconds",
            "From a request's first byte to its end.",
            ("protocol",),
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._requests, self._arrivals = cache(requests.labels), cache(arrivals.labels)
        self._latency = cache(latency.labels)
        self._samples = Histogram(
            "recflow_request_samples",
            "Samples per request.",
            buckets=SAMPLES_BUCKETS,
            registry=self._registry,
        )
        self._changes = Counter(
            "recflow_model_changes",
            "Loads and unloads that clients asked for.",
            ("outcome",),
            registry=self._registry,
        )
        self.ready = Gauge("recflow_ready", "1 while ready for requests.", registry=self._registry)
        self.inside = Gauge("recflow_inside", "Requests inside now.", registry=self._registry)
        self._seconds = {"ok": 0.0, "fail": 0.0}
        self._counts = {"ok": 0, "fail": 0}
        self._last_ms = 0
        self._inferences: collections.Counter[tuple[str, str]] = collections.Counter()

    def changed(self, outcome: str) -> None:
        """A version was `loaded` or `unloaded`, or its loading `failed`."""
        self._changes.labels(outcome).inc()

    def arrived(self, protocol: str) -> None:
        """A request has come."""
        self._arrivals(protocol).inc()

    def answered(self, model: str, version: str, samples: int) -> None:
        """A request of so many samples has its scores, of this version."""
        self._samples.observe(samples)
        self._inferences[model, version] += samples
        self._last_ms = time.time_ns() // 10**6

    def ended(self, protocol: str, outcome: str, seconds: float) -> None:
        """A request has left the server."""
        self._requests(protocol, outcome).inc()
        self._latency(protocol).observe(seconds)
        kind = "ok" if outcome == "ok" else "fail"
        self._counts[kind] += 1
        self._seconds[kind] += seconds

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def statistics(self, model: ServedModel) -> dict[str, Any]:
        """The same in Triton's terms."""
        stats = model.engine.stats()
        executions = stats.bundles if isinstance(stats, FrontEndStats) else stats.batches
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": self._last_ms,
            "inference_count": self._inferences[model.name, model.version],
            "execution_count": executions,
            "inference_stats": {
                "success": self._duration("ok"),
                "fail": self._duration("fail"),
            },
            "batch_stats": [],
        }

    def _duration(self, kind: str) -> dict[str, int]:
        return {"count": self._counts[kind], "ns": round(self._seconds[kind] * NS_PER_S)}
