"""Who takes which task of a launch: in turns that are fixed ahead, or whoever is free claims one.

Claims cost an atomic addition in GMEM, most of a microsecond, so that a worker asks for a task
(`after`) well before it needs to know which (`task`).
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pallas_kernels.simt import Value

COUNTER_BYTES = 4


@runtime_checkable
class Shares(Protocol):
    """One warp's share of the tasks 0, 1, 2, ...; those beyond the last are nobody's."""

    def first(self) -> Value: ...
    def after(self, task: Value) -> Value: ...
    def task(self, asked: Value) -> Value: ...


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Every `workers`-th task from `worker`."""

    worker: Value
    workers: int

    def first(self) -> Value:
        return self.worker

    def after(self, task: Value) -> Value:
        return task + self.workers

    def task(self, asked: Value) -> Value:
        return asked


@dataclass(frozen=True, kw_only=True)
class Claims:
    """The next task that nobody has claimed, by the counter at an address in GMEM, which starts at
    zero. All lanes of a warp claim together.
    """

    simt: Any
    counter: Value
    lane: Value

    def first(self) -> Value:
        return self._claim()

    def after(self, task: Value) -> Value:
        del task
        return self._claim()

    def _claim(self) -> Value:
        return self.simt.count_up(self.counter, self.simt.equal(self.lane, 0))

    def task(self, asked: Value) -> Value:
        return self.simt.of_first_lane(asked)
