"""Which scheme is best for each pair of a segment and a slice, by a profile table."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from scheduling import ProfileTable, SegmentShape, SliceBucket
from scheduling.costs import SERIAL, StepCosts


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A measured pair: `serial_us` one after the other, `co_run_us` in one executable at best, by
    `ride`.
    """

    segments: int
    segment: int
    batch: int
    slice_samples: int
    slice_ids: int
    serial_us: float
    co_run_us: float
    ride: str

    @property
    def is_serial(self) -> bool:
        return self.co_run_us >= self.serial_us

    @property
    def chosen(self) -> str:
        """What the planner takes."""
        return SERIAL if self.is_serial else self.ride

    @property
    def gain(self) -> float:
        """How many times as long as the co-run the serial step takes."""
        return self.serial_us / self.co_run_us


def chosen_schemes(table: ProfileTable) -> list[Scheme]:
    """All pairs that were measured in one executable too, by their sizes."""
    costs = StepCosts(table)
    return [
        scheme
        for shape, size in sorted(costs.pairs, key=lambda pair: (astuple(pair[0]), pair[1].samples))
        if (scheme := _scheme(costs, shape, size))
    ]


def _scheme(costs: StepCosts, shape: SegmentShape, size: SliceBucket) -> Scheme | None:
    co_runs = costs.co_runs(shape, size)
    if not co_runs:
        return None
    ride = min(co_runs, key=lambda name: co_runs[name].us)
    return Scheme(
        segments=shape.segments,
        segment=shape.index,
        batch=shape.batch,
        slice_samples=size.samples,
        slice_ids=size.ids,
        serial_us=costs.serial(shape, size).us,
        co_run_us=co_runs[ride].us,
        ride=ride,
    )


def write_schemes(schemes: Sequence[Scheme], path: Path) -> None:
    """CSV, one line per pair, with what is chosen. Other pairs never share an executable."""
    lines = [asdict(s) | {"gain": f"{s.gain:.3f}", "chosen": s.chosen} for s in schemes]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Scheme.__dataclass_fields__, "gain", "chosen"])
        writer.writeheader()
        writer.writerows(lines)
