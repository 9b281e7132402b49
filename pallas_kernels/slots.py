"""What a pooled gather has to produce: one slot per bag of a sample, in output column order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One pooled vector of a sample: which group of tables it reads and where it lands.

    group: index of the [rows, dim] array. dim: its columns. column: first output column.
    mean: divide by the number of ids. expected_ids: how many a bag holds on average; work is cut
    by it, and any number gives the same answers.
    """

    group: int
    dim: int
    column: int
    mean: bool = False
    expected_ids: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive slots [first, first + count) that read the same group: one stream of ids."""

    group: int
    dim: int
    first: int
    count: int


def width(slots: Sequence[Slot]) -> int:
    """Output columns of all slots."""
    return sum(slot.dim for slot in slots)


def runs(slots: Sequence[Slot]) -> tuple[Run, ...]:
    """The slots as maximal runs of one group each."""
    found: list[Run] = []
    for group, members in groupby(slots, key=lambda slot: slot.group):
        run = list(members)
        first = found[-1].first + found[-1].count if found else 0
        found.append(Run(group=group, dim=run[0].dim, first=first, count=len(run)))
    return tuple(found)


def offsets_of(offsets: Any, slots: int, span: tuple[int, int]) -> Any:
    """Of offsets, int32 [bags + 1], those of a span of samples, (first, how many). They need not
    start at 0.
    """
    first, samples = span
    return offsets[first * slots : (first + samples) * slots + 1]
