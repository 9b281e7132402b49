"""Every way to run a batch and gather what waits: what a plan was chosen from."""

from collections.abc import Iterator, Sequence

from scheduling.costs import StepCosts
from scheduling.request import SegmentShape, SliceBucket, StepShape


class Alternatives:
    """All sequences of steps that a profile table has times for.

    Beside each segment any slice that what waits may fill, or none, by any scheme that was
    measured; what is left then goes in the largest slices, with nothing beside them.
    """

    def __init__(
        self, costs: StepCosts, slices: Sequence[SliceBucket], cuts: Sequence[int]
    ) -> None:
        self._costs = costs
        self._slices = slices
        self._cuts = cuts

    def of(self, batch: int, waiting: int) -> Iterator[tuple[StepShape, ...]]:
        """Those of a batch of one bucket and `waiting` samples."""
        for cut in self._cuts:
            yield from self._from(SegmentShape(segments=cut, index=0, batch=batch), waiting)

    def _from(self, shape: SegmentShape | None, waiting: int) -> Iterator[tuple[StepShape, ...]]:
        if shape is None:
            yield alone(self._slices, waiting)
            return
        for step in self._first_steps(shape, waiting):
            left = left_after(step, waiting)
            yield from ((step, *rest) for rest in self._from(shape.next, left))

    def _first_steps(self, shape: SegmentShape, waiting: int) -> Iterator[StepShape]:
        yield StepShape(segment=shape, slice=None)
        if waiting:
            largest = fitting(self._slices, waiting)
            for size in self._slices[: self._slices.index(largest) + 1]:
                for scheme in (None, *self._costs.co_runs(shape, size)):
                    yield StepShape(segment=shape, slice=size, co_run=scheme)


def fitting(slices: Sequence[SliceBucket], waiting: int) -> SliceBucket:
    """The bucket of a slice of what waits: the smallest that holds it, or the largest there is."""
    return next((size for size in slices if size.samples >= waiting), slices[-1])


def alone(slices: Sequence[SliceBucket], waiting: int) -> tuple[StepShape, ...]:
    """Slices of all that waits, with nothing beside them."""
    steps: tuple[StepShape, ...] = ()
    while waiting > 0:
        steps += (StepShape(segment=None, slice=fitting(slices, waiting)),)
        waiting = left_after(steps[-1], waiting)
    return steps


def left_after(step: StepShape, waiting: int) -> int:
    """How many samples wait behind a step."""
    return max(waiting - step.slice.samples, 0) if step.slice else waiting
