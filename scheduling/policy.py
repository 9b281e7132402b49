"""What decides which work runs next: incremental batching, or another policy in its place."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from scheduling.pipeline import Action, Event


@runtime_checkable
class Policy(Protocol):
    """`Pipeline`, or another one with its surface. Not thread-safe; one thread calls."""

    def step(self, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        """What to do now that `events` have happened."""
        ...

    @property
    def next_deadline_us(self) -> int | None:
        """When to ask again, if nothing happens before."""
        ...

    @property
    def can_launch(self) -> bool:
        """Whether an arrival could lead to a launch now, before a step has ended."""
        ...

    @property
    def is_crowded(self) -> bool:
        """Whether so much waits that more of it would change no launch."""
        ...

    @property
    def idle(self) -> bool:
        """Every request has had its end."""
        ...
