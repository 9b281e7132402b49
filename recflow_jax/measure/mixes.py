"""Whether plans hold what the profile table promises: whole batches with lookups beside them.

A mix is a batch and samples that wait meanwhile, as many as come. Its plan is launched as it
stands, step after step, and timed beside what its steps take by the table: the sum of their times
on the device or, if that is longer, of their launches; and the device's time beside that sum alone.
Some mixes run by every other plan, too, that could be better.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from recflow_jax.measure.profiler import Profiler, on_device
from recflow_jax.measure.timing import Timed, Timing, measure, measure_side_by_side
from scheduling import CoRun, StepShape, TablePlans
from scheduling.alternatives import Alternatives

MARGIN = 1.2  # times the plan's time, by the table, that a plan takes which may yet be the best
MOST_RIVALS = 32

Plan = tuple[StepShape, ...]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A batch of a bucket, and how many samples wait when it starts."""

    batch: int
    waiting: int


@dataclass(frozen=True, kw_only=True)
class MixResult:
    """A mix by its plan. error, device_error: of the prediction, and of its part on the device, as
    parts of what was measured.
    """

    batch: int
    waiting: int
    plan: str
    predicted_us: float
    predicted_device_us: float
    timing: Timing
    device_us: float

    @property
    def error(self) -> float:
        return self.predicted_us / self.timing.median_us - 1

    @property
    def device_error(self) -> float:
        return self.predicted_device_us / self.device_us - 1


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A mix by its plan and by `rivals` others, of which `best` was the fastest (or the plan).

    regret: how much longer than the fastest of all the plan took, as a part of it.
    """

    batch: int
    waiting: int
    plan: str
    best: str
    rivals: int
    plan_us: float
    best_us: float

    @property
    def regret(self) -> float:
        return self.plan_us / self.best_us - 1


def random_mixes(plans: TablePlans, count: int, *, seed: int) -> list[Mix]:
    """Any batch bucket, with from one sample to twice the batch waiting, log-uniformly."""
    rng = np.random.default_rng(seed)
    batches = rng.choice(plans.batch_buckets, count).tolist()
    shares = rng.random(count)
    return [
        Mix(batch=batch, waiting=round((2 * batch) ** share))
        for batch, share in zip(batches, shares, strict=True)
    ]


class MixBench:
    """Times mixes on a device. Raises ProfileMiss for a table without one of the parts."""

    def __init__(self, profiler: Profiler, plans: TablePlans) -> None:
        self._profiler = profiler
        self._plans = plans
        slices = profiler.segments.slice_buckets
        self._alternatives = Alternatives(plans.costs, slices, sorted(profiler.segments.cuts))

    def foretold(
        self, mixes: Sequence[Mix], advance: Callable[[], None] = lambda: None
    ) -> list[MixResult]:
        """Each mix by its plan."""
        self._compile([self._plan(mix) for mix in mixes])
        return [self._measured(mix, advance) for mix in mixes]

    def contests(
        self, mixes: Sequence[Mix], advance: Callable[[], None] = lambda: None
    ) -> list[Contest]:
        """Each mix by its plan and by all others within a fifth of its time by the table, the
        32 best at most.
        """
        contenders = [[self._plan(mix), *self._rivals(mix)] for mix in mixes]
        self._compile([plan for plans in contenders for plan in plans])
        return [
            self._contest(mix, plans, advance) for mix, plans in zip(mixes, contenders, strict=True)
        ]

    def _plan(self, mix: Mix) -> Plan:
        return self._plans.steps(mix.batch, mix.waiting)

    def _rivals(self, mix: Mix) -> list[Plan]:
        plan = self._plan(mix)
        most_us = MARGIN * self._predicted_us(plan)
        others = (other for other in self._alternatives.of(mix.batch, mix.waiting) if other != plan)
        near = (other for other in others if self._predicted_us(other) <= most_us)
        return heapq.nsmallest(MOST_RIVALS, near, key=self._predicted_us)

    def _predicted_us(self, plan: Plan) -> float:
        return self._plans.costs.steps(plan).us

    def _compile(self, plans: Sequence[Plan]) -> None:
        cells = {cell for plan in plans for step in plan if (cell := _cell(step))}
        cuts = {step.segment.segments for plan in plans for step in plan if step.segment}
        self._profiler.segments.compile_all(cuts=sorted(cuts), co_runs=list(cells))

    def _measured(self, mix: Mix, advance: Callable[[], None]) -> MixResult:
        plan = self._plan(mix)
        timed = Timed(launch=partial(self._profiler.launch, plan))
        timing = measure(timed, self._profiler.timing)
        predicted = self._plans.costs.steps(plan)
        advance()
        return MixResult(
            batch=mix.batch,
            waiting=mix.waiting,
            plan=described(plan),
            predicted_us=predicted.us,
            predicted_device_us=predicted.device_us,
            timing=timing,
            device_us=on_device(timing, timed).median_us,
        )

    def _contest(self, mix: Mix, plans: Sequence[Plan], advance: Callable[[], None]) -> Contest:
        timed = {described(p): Timed(launch=partial(self._profiler.launch, p)) for p in plans}
        timings = measure_side_by_side(timed, self._profiler.timing)
        own, best = described(plans[0]), min(timings, key=lambda name: timings[name].median_us)
        advance()
        return Contest(
            batch=mix.batch,
            waiting=mix.waiting,
            plan=own,
            best=best,
            rivals=len(plans) - 1,
            plan_us=timings[own].median_us,
            best_us=timings[best].median_us,
        )


def described(plan: Plan) -> str:
    """Its steps, like `1/3+512 by narrow/one, 2/3, 3/3, 64 alone`."""
    return ", ".join(_described(step) for step in plan)


def _described(step: StepShape) -> str:
    if step.segment is None:
        return f"{step.slice.samples if step.slice else 0} alone"
    segment = f"{step.segment.index + 1}/{step.segment.segments}"
    if step.slice is None:
        return segment
    return f"{segment}+{step.slice.samples}" + (f" by {step.co_run}" if step.co_run else "")


def _cell(step: StepShape) -> CoRun | None:
    """What has to be compiled for a step that is one executable."""
    if step.segment and step.slice and step.co_run:
        return CoRun(segment=step.segment, slice=step.slice, config=step.co_run)
    return None
