"""Serial batching on the segments of an engine: the same executables, batched another way."""

from concurrent.futures import Future
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.closing import Closing
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.segments import Segments
from scheduling import Collecting


class SerialServer(Closing):
    """An engine that collects, and can be told anew how, with nothing compiled again."""

    def __init__(self, segments: Segments, collecting: Collecting) -> None:
        self._segments = segments
        self._engine = Engine.from_segments(segments, batching=collecting)

    def collect(self, collecting: Collecting) -> None:
        """From now on in this way; answers what is inside first."""
        self._engine.close()
        self._engine = Engine.from_segments(self._segments, batching=collecting)

    def submit(self, request: JaggedBatch) -> "Future[Any]":
        """Queues a request."""
        return self._engine.submit(request)

    def close(self) -> None:
        """Answers what is inside first."""
        self._engine.close()
