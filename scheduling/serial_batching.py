"""Serial batching, to compare with: collect a batch, embed it, run its segments, then the next.

The same pipeline behind a gate. Nothing arrives while a batch runs, so no slice ever finds another
batch's segment to ride beside.
"""

from collections import OrderedDict
from collections.abc import Sequence

from scheduling.pipeline import Action, Arrive, Cancel, Event, Pipeline, PipelineConfig
from scheduling.request import Request


class SerialBatching:
    """Lets a batch in when the one before has ended and it is full or its oldest waited `wait_us`.

    A batch takes whole requests in the order of arrival, of at most `max_samples` in all. None:
    what surely fits one batch, whatever the padding of its slices. What does not fit one after all
    (a larger request, more ids than the slices have room for) runs as several, as in the pipeline.
    """

    def __init__(
        self, config: PipelineConfig, *, wait_us: int, max_samples: int | None = None
    ) -> None:
        unsure = config.slice_buckets[0].samples - 1
        self._pipeline = Pipeline(config)
        self._wait_us = wait_us
        self._max_samples = max_samples or config.largest_batch - unsure
        self._held: OrderedDict[int, Request] = OrderedDict()
        self._held_samples = 0

    def step(self, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        """As `Pipeline.step`; the deadlines of those who wait count when they are let in."""
        passing = [event for event in events if not self._holds(event)]
        actions = self._pipeline.step(now_us, passing)
        while self._pipeline.idle and self._is_due(now_us):
            actions += self._pipeline.step(now_us, self._let_in())
        return actions

    @property
    def idle(self) -> bool:
        """Every request has had its end."""
        return self._pipeline.idle and not self._held

    @property
    def next_deadline_us(self) -> int | None:
        """When to ask again, if nothing happens before."""
        if self._pipeline.idle and self._held:
            return self._oldest.arrived_us + self._wait_us
        return self._pipeline.next_deadline_us

    @property
    def _oldest(self) -> Request:
        return next(iter(self._held.values()))

    def _holds(self, event: Event) -> bool:
        """Keeps an arrival, and forgets one that is cancelled."""
        if isinstance(event, Arrive):
            self._held[event.request.id] = event.request
            self._held_samples += event.request.samples
        elif isinstance(event, Cancel) and (gone := self._held.pop(event.request_id, None)):
            self._held_samples -= gone.samples
        return isinstance(event, Arrive)

    def _is_due(self, now_us: int) -> bool:
        if not self._held:
            return False
        is_full = self._held_samples >= self._max_samples
        return is_full or self._oldest.arrived_us + self._wait_us <= now_us

    def _let_in(self) -> list[Arrive]:
        batch: list[Arrive] = []
        room = self._max_samples
        while self._held and (not batch or self._oldest.samples <= room):
            _, request = self._held.popitem(last=False)
            batch.append(Arrive(request=request))
            room -= request.samples
        self._held_samples -= sum(arrival.request.samples for arrival in batch)
        return batch
