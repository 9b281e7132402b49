"""What a server tells of itself at /metrics."""

import time
from http.client import HTTPConnection

from prometheus_client.parser import text_string_to_metric_families

from recflow_jax.measure.load import LoadError
from recflow_jax.measure.soaked import ServerCounts

EMPTY_WITHIN_S = 60
SETTLED = ("requests_answered", "cancelled", "failed")


class Scraped:
    """All samples of one moment."""

    def __init__(self, http_port: int) -> None:
        connection = HTTPConnection("127.0.0.1", http_port, timeout=EMPTY_WITHIN_S)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        self._samples = [s for f in text_string_to_metric_families(text) for s in f.samples]

    def sum(self, name: str, **labels: str) -> int:
        """Over all samples of that name with these labels."""
        wanted = labels.items()
        return int(
            sum(s.value for s in self._samples if s.name == name and wanted <= s.labels.items())
        )

    @property
    def device_bytes(self) -> int:
        """In use on all devices that tell."""
        return self.sum("recflow_engine_device_bytes")

    @property
    def is_empty(self) -> bool:
        """Whether no request is inside."""
        return not self.sum("recflow_inside") and not self.sum("recflow_engine_queued_samples")

    @property
    def counts(self) -> ServerCounts:
        """Requests that came, and their ends."""
        ended = [self.sum(f"recflow_engine_{name}_total") for name in SETTLED]
        late = self.sum("recflow_engine_rejected_total", reason="deadline")
        return ServerCounts(
            arrived=self.sum("recflow_arrivals_total"),
            ended=self.sum("recflow_requests_total"),
            accepted=self.sum("recflow_engine_requests_accepted_total"),
            settled=sum(ended) + late,
        )


def final_counts(http_port: int) -> ServerCounts:
    """Once nothing is inside any more. Raises LoadError if that does not come."""
    until_s = time.monotonic() + EMPTY_WITHIN_S
    while time.monotonic() < until_s:
        scraped = Scraped(http_port)
        if scraped.is_empty:
            return scraped.counts
        time.sleep(0.1)
    raise LoadError(f"requests are still inside after {EMPTY_WITHIN_S} s")
