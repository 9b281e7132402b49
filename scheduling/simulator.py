"""The engine on a virtual clock: the same pipeline, a device of known times, a host of known costs.

As in the engine, three threads share one interpreter. Callers let requests in one after the other,
but begin with none while the launcher launches; it takes all mail there is, asks the policy and
launches step after step; a third answers. Copies to the device go one after the other, the device
runs the steps in their order.
"""

import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from scheduling.costs import StepTimes
from scheduling.host_costs import LARGE_IDS, REST_STEP_US, RESTS, HostCosts
from scheduling.interpreter import Compute, Interpreter, Sleep
from scheduling.pipeline import Arrive, Event, Launch, StepDone
from scheduling.policy import Policy
from scheduling.request import Request, Step, StepShape

Doing = Iterator[Compute | Sleep]


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
    def requests_per_s(self) -> float:
        """In the span."""
        return 1e6 * len(self.samples) / self.span_us if self.span_us else 0.0

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


class _Engine:
    """Three threads, copies to the device, and the device."""

    def __init__(
        self, policy: Policy, requests: Iterable[Request], times: StepTimes, host: HostCosts
    ) -> None:
        self._policy = policy
        self._times = times
        self._host = host
        self._served: dict[int, _Served] = {}
        self._mail: list[Event] = []
        self._flights: deque[tuple[float, Step]] = deque()
        self._launches = self._is_called = self._is_crowded = self._expects_mail = False
        self._copied_us = self._device_free_us = 0.0
        self._device_busy_us = self._launcher_busy_us = 0.0
        self._steps_by_shape = Counter[StepShape]()
        self._batch_samples: list[int] = []
        self._batch_buckets: list[int] = []
        self._python = Interpreter(host.switch_us)
        self._launcher = self._python.start(self._launch())
        self._answerer = self._python.start(self._answer())
        self._callers = self._python.start(self._let_in(requests))

    def run(self) -> None:
        self._python.run()

    # --- callers ---

    def _let_in(self, requests: Iterable[Request]) -> Doing:
        """Begins with the next one when the launcher has launched; with a large one at once."""
        before: Request | None = None
        for request in requests:
            self._check(request, before)
            before = request
            if request.arrived_us > self._now_us:
                yield Sleep(request.arrived_us + self._host.wake_us)
            is_large = request.ids >= LARGE_IDS
            self._is_called = not is_large
            while self._launches and not is_large:
                yield Sleep()
            yield Compute(self._host.submitting_us(request))
            if is_large:
                yield Sleep(self._now_us + self._host.copying_in_us(request))
            self._is_called = False
            self._served[request.id] = _Served(
                arrived_us=request.arrived_us,
                samples=request.samples,
                deadline_us=math.inf if request.deadline_us is None else request.deadline_us,
            )
            self._post(Arrive(request=request))

    def _check(self, request: Request, before: Request | None) -> None:
        if request.id in self._served:
            raise ValueError(f"request {request.id} arrives twice")
        if before is not None and request.arrived_us < before.arrived_us:
            raise ValueError(f"request {request.id} arrives before request {before.id}")

    def _post(self, event: Event) -> None:
        self._mail.append(event)
        if self._expects_mail:
            self._python.wake(self._launcher)

    # --- the launcher ---

    def _launch(self) -> Doing:
        while True:
            asked_us = self._now_us
            yield from self._wait_for_mail()
            started_us = self._now_us
            self._launches = True
            mail, self._mail = self._mail, []
            aside_us = 0.0
            for action in self._policy.step(int(started_us), mail):
                if isinstance(action, Launch):
                    aside_us += yield from self._launch_step(action.step)
            self._is_crowded = self._policy.is_crowded
            self._leave_turn()
            took_us = self._now_us - started_us - aside_us
            yield from self._rest(RESTS * took_us - (started_us - asked_us) - aside_us)

    def _wait_for_mail(self) -> Doing:
        """Or for a deadline."""
        if self._mail:
            return
        self._expects_mail = True
        deadline_us = self._policy.next_deadline_us
        yield Sleep(math.inf if deadline_us is None else deadline_us)
        self._expects_mail = False

    def _launch_step(self, step: Step) -> Generator[Compute | Sleep, None, float]:
        """Gives how long callers went on meanwhile."""
        launching_us, aside_us = self._host.launching_us(step), self._host.aside_us(step)
        self._launcher_busy_us += launching_us
        yield Compute(launching_us - aside_us)
        left_us = self._now_us
        if not self._is_crowded:
            self._leave_turn()
        yield Sleep(left_us + aside_us)
        self._launches = True
        self._launched(step)
        return 0.0 if self._is_crowded else self._now_us - left_us

    def _leave_turn(self) -> None:
        self._launches = False
        if self._is_called:
            self._python.wake(self._callers)

    def _launched(self, step: Step) -> None:
        self._steps_by_shape[step.shape] += 1
        self._flights.append((self._ended_us(step) + self._host.answer_us, step))
        self._python.wake(self._answerer)
        for part in step.slice.parts if step.slice else ():
            if part.start == 0:
                self._served[part.request_id].launched_us = self._now_us
        if step.segment is not None and step.segment.shape.last:
            self._batch_samples.append(step.segment.samples)
            self._batch_buckets.append(step.segment.shape.batch)

    def _ended_us(self, step: Step) -> float:
        """When the device has run the step that was launched now."""
        ready_us = self._now_us
        if step.slice is not None:
            self._copied_us = max(self._copied_us, self._now_us) + self._host.upload_us(step)
            ready_us = self._copied_us
        step_us = self._times.step_us(step)
        self._device_free_us = max(self._device_free_us, ready_us) + step_us
        self._device_busy_us += step_us
        return self._device_free_us

    def _rest(self, longest_us: float) -> Doing:
        """See REST_STEP_US."""
        end_us, seen = self._now_us + longest_us, 0
        while self._now_us < end_us and self._has_cause_to_rest(seen):
            seen = len(self._mail)
            yield Sleep(min(self._now_us + REST_STEP_US, end_us))

    def _has_cause_to_rest(self, seen: int) -> bool:
        new = self._mail[seen:]
        is_large = any(isinstance(one, Arrive) and one.request.ids >= LARGE_IDS for one in new)
        return not (self._is_crowded or is_large) and (bool(new) or self._is_called)

    # --- who answers ---

    def _answer(self) -> Doing:
        while True:
            while not self._flights:
                yield Sleep()
            ended_us, step = self._flights.popleft()
            while ended_us > self._now_us:
                yield Sleep(ended_us)
            yield Compute(self._host.end_us)
            self._post(StepDone(step_id=step.id))
            answered = self._answered(step)
            yield Compute(len(answered) * self._host.resolve_us)
            for served in answered:
                if self._now_us <= served.deadline_us:
                    served.answered_us = self._now_us

    def _answered(self, step: Step) -> list[_Served]:
        """Of whom this step makes the last scores."""
        parts = step.segment.parts if step.segment else ()
        served = [(part, self._served[part.request_id]) for _, part in parts]
        return [one for part, one in served if part.stop == one.samples]

    @property
    def _now_us(self) -> float:
        return self._python.now_us

    def outcome(self) -> SimulatedRun:
        served = self._served.values()
        return SimulatedRun(
            arrived_us=np.array([one.arrived_us for one in served], np.float64),
            launched_us=np.array([one.launched_us for one in served], np.float64),
            answered_us=np.array([one.answered_us for one in served], np.float64),
            samples=np.array([one.samples for one in served], np.int64),
            batch_samples=np.array(self._batch_samples, np.int64),
            batch_buckets=np.array(self._batch_buckets, np.int64),
            steps_by_shape=self._steps_by_shape,
            device_busy_us=self._device_busy_us,
            launcher_busy_us=self._launcher_busy_us,
            end_us=self._device_free_us,
        )
