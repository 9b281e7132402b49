"""The engine on a virtual clock: the same pipeline, a device of known times, a host of known costs.

As in the engine, callers let requests in one after the other, but begin with none while the
launcher launches; it takes all mail there is, asks the policy and launches step after step; copies
to the device go one after the other, the device runs the steps in their order, and one thread
answers.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from scheduling.costs import StepTimes
from scheduling.host_costs import LARGE_IDS, REST_STEP_US, RESTS, HostCosts
from scheduling.pipeline import Action, Arrive, Event, Launch, StepDone
from scheduling.policy import Policy
from scheduling.request import Part, Request, Step, StepShape


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedRun:
    """What became of the requests, in the order of their arrival; times in microseconds.

    launched_us: when the first samples were launched, nan where the deadline came before.
    answered_us: nan where the deadline was missed, before the launch or by the answer.
    batch_samples, batch_buckets: of each batch, what it held and what it was padded to.
    steps_by_shape: how many steps of each static shape there were.
    device_busy_us, launcher_busy_us: of the time until `end_us`, when the device had done all.
    """

    arrived_us: np.ndarray
    launched_us: np.ndarray
    answered_us: np.ndarray
    samples: np.ndarray
    batch_samples: np.ndarray
    batch_buckets: np.ndarray
    steps_by_shape: Mapping[StepShape, int]
    device_busy_us: float
    launcher_busy_us: float
    end_us: float

    @property
    def latencies_us(self) -> np.ndarray:
        """From arrival to answer."""
        return self.answered_us - self.arrived_us

    @property
    def waits_us(self) -> np.ndarray:
        """From arrival to the launch of the first samples."""
        return self.launched_us - self.arrived_us

    @property
    def steps(self) -> int:
        """How many were launched."""
        return sum(self.steps_by_shape.values())

    @property
    def span_us(self) -> float:
        """From the first arrival to the end of the last step."""
        return self.end_us - float(self.arrived_us[0]) if len(self.arrived_us) else 0.0

    @property
    def device_busy_share(self) -> float:
        """The part of the span in which the device ran steps."""
        return self.device_busy_us / self.span_us if self.span_us else 0.0

    @property
    def launcher_busy_share(self) -> float:
        """The part of the span in which the launcher launched."""
        return self.launcher_busy_us / self.span_us if self.span_us else 0.0


def simulate(
    policy: Policy, requests: Iterable[Request], *, times: StepTimes, host: HostCosts
) -> SimulatedRun:
    """Serves `requests`, which arrive at their `arrived_us`, until all have had their end.

    They are drawn one by one, so they may be a generator. `policy` must be new. Raises ValueError
    for arrivals that do not ascend and an id that comes twice, and what `times` raises.
    """
    engine = _Engine(policy, requests, times, host)
    engine.run()
    return engine.outcome()


@dataclass(slots=True)
class _Served:
    """A request, and what became of it so far."""

    arrived_us: int
    samples: int
    deadline_us: float
    launched_us: float = math.nan
    answered_us: float = math.nan


@dataclass(slots=True)
class _Launched:
    """All steps so far; `flights` are those that the launcher does not know the end of."""

    by_shape: Counter[StepShape] = field(default_factory=Counter)
    flights: deque[tuple[float, int]] = field(default_factory=deque)
    batch_samples: list[int] = field(default_factory=list)
    batch_buckets: list[int] = field(default_factory=list)


class _Engine:
    """Five clocks: the callers', the launcher's, the copies', the device's, and the answers'."""

    def __init__(
        self, policy: Policy, requests: Iterable[Request], times: StepTimes, host: HostCosts
    ) -> None:
        self._policy = policy
        self._requests = iter(requests)
        self._times = times
        self._host = host
        self._called_us = self._entered_us = 0.0
        self._turns_us: list[tuple[float, float]] = []
        self._aside_us = 0.0
        self._is_crowded = False
        self._next: Request | None = None
        self._draw_next()
        self._served: dict[int, _Served] = {}
        self._launched = _Launched()
        self._mailed: list[Event] = []
        self._now_us = 0.0
        self._copied_us = 0.0
        self._device_free_us = 0.0
        self._answering_us = 0.0
        self._device_busy_us = 0.0
        self._launcher_busy_us = 0.0

    def run(self) -> None:
        while (next_us := self._next_mail_us()) < math.inf:
            slept_us = max(next_us - self._now_us, 0)
            self._now_us = started_us = self._now_us + slept_us
            mail, self._mailed = self._mailed + self._mail(), []
            self._turns_us, self._aside_us = [], 0.0
            self._act(self._policy.step(int(started_us), mail))
            self._is_crowded = self._policy.is_crowded
            self._let_in(self._called_us)
            took_us = self._now_us - started_us - self._aside_us
            self._rest(RESTS * took_us - slept_us - self._aside_us)

    def _next_mail_us(self) -> float:
        """When the launcher has something to do: an arrival, a step's end, a deadline."""
        if self._mailed:
            return self._now_us
        flights, deadline_us = self._launched.flights, self._policy.next_deadline_us
        return min(
            math.inf if self._next is None else self._entered_us,
            flights[0][0] if flights else math.inf,
            math.inf if deadline_us is None else deadline_us,
        )

    def _rest(self, longest_us: float) -> None:
        """See REST_STEP_US."""
        end_us, seen = self._now_us + longest_us, 0
        self._mailed += self._mail()
        while self._now_us < end_us and self._has_cause_to_rest(seen):
            seen = len(self._mailed)
            self._now_us = min(self._now_us + REST_STEP_US, end_us)
            self._mailed += self._mail()

    def _has_cause_to_rest(self, seen: int) -> bool:
        new = self._mailed[seen:]
        is_large = any(isinstance(one, Arrive) and one.request.ids >= LARGE_IDS for one in new)
        return not (self._is_crowded or is_large) and (bool(new) or self._is_called())

    def _is_called(self) -> bool:
        """Whether a caller is letting in a request that is not large."""
        is_small = self._next is not None and self._next.ids < LARGE_IDS
        return is_small and self._called_us <= self._now_us

    def _mail(self) -> list[Event]:
        """What came since it was asked before."""
        events: list[Event] = []
        while self._next is not None and self._entered_us <= self._now_us:
            events.append(Arrive(request=self._next))
            self._take_next(self._next)
        flights = self._launched.flights
        while flights and flights[0][0] <= self._now_us:
            events.append(StepDone(step_id=flights.popleft()[1]))
        return events

    def _draw_next(self) -> None:
        """The next request, which is known of when those before it have been let in, too."""
        self._next = next(self._requests, None)
        if self._next is not None:
            self._let_in(max(self._entered_us, self._next.arrived_us + self._host.wake_us))

    def _let_in(self, called_us: float) -> None:
        """Begins with the next request at `called_us`, or when the launcher has launched; with a
        large one at once.
        """
        if self._next is None:
            return
        turns_us = self._turns_us if self._next.ids < LARGE_IDS else []
        for started_us, ended_us in turns_us:
            if started_us <= called_us < ended_us:
                called_us = ended_us
        self._called_us = called_us
        self._entered_us = self._called_us + self._host.submitting_us(self._next)

    def _take_next(self, request: Request) -> None:
        if request.id in self._served:
            raise ValueError(f"request {request.id} arrives twice")
        self._served[request.id] = _Served(
            arrived_us=request.arrived_us,
            samples=request.samples,
            deadline_us=math.inf if request.deadline_us is None else request.deadline_us,
        )
        self._draw_next()
        if self._next is not None and self._next.arrived_us < request.arrived_us:
            raise ValueError(f"request {self._next.id} arrives before request {request.id}")

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Launch):
                self._launch(action.step)

    def _launch(self, step: Step) -> None:
        launching_us = self._host.launching_us(step)
        aside_us = 0.0 if self._is_crowded else self._host.aside_us(step)
        started_us, self._now_us = self._now_us + aside_us, self._now_us + launching_us
        self._turns_us.append((started_us, self._now_us))
        self._aside_us += aside_us
        self._launcher_busy_us += launching_us
        known_us = max(self._end_us(step) + self._host.answer_us, self._answering_us)
        self._launched.flights.append((known_us, step.id))
        self._launched.by_shape[step.shape] += 1
        if step.slice is not None:
            self._note_launch(step.slice.parts)
        if step.segment is not None and step.segment.shape.last:
            self._launched.batch_samples.append(step.segment.samples)
            self._launched.batch_buckets.append(step.segment.shape.batch)
            self._note_answers(step.segment.parts, known_us)

    def _end_us(self, step: Step) -> float:
        """When the device has run the step that was launched now."""
        ready_us = self._now_us
        if step.slice is not None:
            self._copied_us = max(self._copied_us, self._now_us) + self._host.upload_us(step)
            ready_us = self._copied_us
        step_us = self._times.step_us(step)
        self._device_free_us = max(self._device_free_us, ready_us) + step_us
        self._device_busy_us += step_us
        return self._device_free_us

    def _note_launch(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if part.start == 0:
                self._served[part.request_id].launched_us = self._now_us

    def _note_answers(self, parts: Iterable[tuple[int, Part]], known_us: float) -> None:
        complete = [
            served
            for _, part in parts
            if part.stop == (served := self._served[part.request_id]).samples
        ]
        self._answering_us = known_us + len(complete) * self._host.resolve_us
        for served in complete:
            if self._answering_us <= served.deadline_us:
                served.answered_us = self._answering_us

    def outcome(self) -> SimulatedRun:
        served, launched = self._served.values(), self._launched
        return SimulatedRun(
            arrived_us=np.array([one.arrived_us for one in served], np.float64),
            launched_us=np.array([one.launched_us for one in served], np.float64),
            answered_us=np.array([one.answered_us for one in served], np.float64),
            samples=np.array([one.samples for one in served], np.int64),
            batch_samples=np.array(launched.batch_samples, np.int64),
            batch_buckets=np.array(launched.batch_buckets, np.int64),
            steps_by_shape=launched.by_shape,
            device_busy_us=self._device_busy_us,
            launcher_busy_us=self._launcher_busy_us,
            end_us=self._device_free_us,
        )
