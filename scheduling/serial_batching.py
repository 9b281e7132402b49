"""Serial batching, to compare with: collect a batch, embed it, run its segments, then the next.

The same pipeline behind a gate. A batch is let in when the one before is launched to its end, so no
slice ever finds another batch's segment to ride beside.
"""

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from scheduling.pipeline import (
    Action,
    Arrive,
    Cancel,
    Event,
    Expire,
    Launch,
    Pipeline,
    PipelineConfig,
    StepDone,
)
from scheduling.planner import Plans
from scheduling.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Collecting:
    """How serial batching collects: until the oldest request has waited `wait_ms` or `max_samples`
    have come (None: as many as a batch holds).

    in_flight: batches on the device at once. One more than the one that runs is launched behind it,
    so that the device need not wait for the host. Raises ValueError that names the field.
    """

    wait_ms: float
    max_samples: int | None = None
    in_flight: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.wait_ms < math.inf:
            raise ValueError(f"collecting: wait_ms is {self.wait_ms!r}, not 0 or more")
        for name in ("max_samples", "in_flight"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"collecting: {name} is {value!r}, not a whole number above 0")

    def __str__(self) -> str:
        limit = "" if self.max_samples is None else f" or {self.max_samples:,}"
        return f"{self.wait_ms:g} ms{limit}, {self.in_flight} in flight"


class SerialBatching:
    """Lets a batch in when fewer than `in_flight` run and it is full or its oldest has waited.

    A batch takes whole requests in the order of arrival, of at most `max_samples` in all; their
    priorities count inside it alone. None: what surely fits one batch, whatever the padding of its
    slices. What does not fit one after all (a larger request, more ids than the slices have room
    for) runs as several, as in the pipeline.
    plans: of a single cut; None runs slices and segments apart.
    """

    def __init__(
        self, config: PipelineConfig, collecting: Collecting, plans: Plans | None = None
    ) -> None:
        unsure = config.slice_buckets[0].samples - 1
        surely = max(config.largest_batch - unsure, config.largest_slice.samples)
        # Batches are what is counted: all steps of one that is let in are launched at once.
        self._pipeline = Pipeline(replace(config, max_steps_in_flight=sys.maxsize), plans)
        self._wait_us = round(1000 * collecting.wait_ms)
        self._max_samples = collecting.max_samples or surely
        self._in_flight = collecting.in_flight
        self._last_steps: deque[int] = deque()
        self._held: OrderedDict[int, Request] = OrderedDict()
        self._held_samples = 0
        self._deadlines: list[tuple[int, int]] = []

    def step(self, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        """As `Pipeline.step`. A request that is not let in yet expires with its deadline, too."""
        actions = self._pipeline.step(now_us, [e for e in events if not isinstance(e, Arrive)])
        for event in events:
            self._apply(event)
        actions += [Expire(request_id=id) for id in self._drop_late(now_us)]
        while self.can_launch and self._is_due(now_us):
            actions += self._launched(self._pipeline.step(now_us, self._let_in()))
        return actions

    @property
    def can_launch(self) -> bool:
        """Whether there is room for one more batch."""
        return len(self._last_steps) < self._in_flight

    @property
    def idle(self) -> bool:
        """Every request has had its end."""
        return self._pipeline.idle and not self._held

    @property
    def is_crowded(self) -> bool:
        """Whether the next batch is full."""
        return self._held_samples >= self._max_samples

    @property
    def next_deadline_us(self) -> int | None:
        """When to ask again, if nothing happens before."""
        due = [self._due_us] if self.can_launch and self._held else []
        return min([*due, *(us for us, _ in self._deadlines[:1])], default=None)

    @property
    def _due_us(self) -> int:
        return self._oldest.arrived_us + self._wait_us

    @property
    def _oldest(self) -> Request:
        return next(iter(self._held.values()))

    def _apply(self, event: Event) -> None:
        match event:
            case Arrive(request=request):
                self._hold(request)
            case Cancel(request_id=request_id):
                self._let_go(request_id)
            case StepDone(step_id=step_id):
                if self._last_steps and self._last_steps[0] == step_id:
                    self._last_steps.popleft()

    def _hold(self, request: Request) -> None:
        self._held[request.id] = request
        self._held_samples += request.samples
        if request.deadline_us is not None:
            heappush(self._deadlines, (request.deadline_us, request.id))

    def _let_go(self, request_id: int) -> Request | None:
        """Out of those held, if it is one of them."""
        request = self._held.pop(request_id, None)
        self._held_samples -= request.samples if request else 0
        return request

    def _drop_late(self, now_us: int) -> list[int]:
        """Also forgets the deadlines of those that are not held any more."""
        late = []
        while self._deadlines and (
            self._deadlines[0][0] <= now_us or self._deadlines[0][1] not in self._held
        ):
            _, request_id = heappop(self._deadlines)
            if self._let_go(request_id):
                late.append(request_id)
        return late

    def _is_due(self, now_us: int) -> bool:
        is_full = self._held_samples >= self._max_samples
        return bool(self._held) and (is_full or self._due_us <= now_us)

    def _let_in(self) -> list[Arrive]:
        batch: list[Arrive] = []
        room = self._max_samples
        while self._held and (not batch or self._oldest.samples <= room):
            request = self._oldest
            self._let_go(request.id)
            batch.append(Arrive(request=request))
            room -= request.samples
        return batch

    def _launched(self, actions: list[Action]) -> list[Action]:
        """Notes the step with which a batch ends."""
        steps = [action.step.id for action in actions if isinstance(action, Launch)]
        self._last_steps.extend(steps[-1:])
        return actions
