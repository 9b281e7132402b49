"""Serial batching on the segments of an engine: the same executables, batched another way."""

from dataclasses import replace

from recflow_jax.engine.engine import Engine
from recflow_jax.engine.planning import plans_of
from scheduling import Collecting


class SerialServer(Engine):
    """An engine that collects (`from_segments(segments, batching=...)`), and can be told anew how,
    with nothing compiled again.
    """

    def collect(self, collecting: Collecting) -> None:
        """From now on in this way; answers what is inside first. What an open engine asks of Python
        stays: garbage is not collected anew.
        """
        self._end_threads()
        options = replace(self.options, batching=collecting)
        self._start(self._segments, options, plans_of(self._segments, options, None), None, None)
