"""What a soak found: how each request ended, and the server's memory meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recflow_jax.measure.memory import Memory, growth_bytes, is_flat


@dataclass(frozen=True, kw_only=True)
class ServerCounts:
    """What the server says of itself once nothing is inside.

    arrived, ended: requests, at either end. accepted, settled: of the engine; settled are those
    that were answered, cancelled, failed or late.
    """

    arrived: int
    ended: int
    accepted: int
    settled: int

    @property
    def once_each(self) -> bool:
        """Whether every request that came had exactly one end."""
        return self.arrived == self.ended and self.accepted == self.settled


@dataclass(frozen=True, kw_only=True)
class SoakResult:
    """What was sent by kind, how it ended for its client, and the server's memory meanwhile.

    ends: "right", "wrong scores", "cancelled", "told so" for a wrong request that was told what is
    wrong with it, or an error's type.
    """

    seconds: float
    qps: float
    sent: Mapping[str, int]
    ends: Mapping[str, int]
    server: ServerCounts
    memory: Sequence[Memory]

    @property
    def growth_bytes(self) -> Mapping[str, float]:
        """See `memory.growth_bytes`."""
        return growth_bytes(self.memory)

    @property
    def flat(self) -> bool:
        """Whether neither memory has grown after the warm-up, by the rule of `memory`."""
        return is_flat(self.memory)

    @property
    def as_expected(self) -> bool:
        """Whether each request had the end that it should, and just one."""
        return self.server.once_each and not {*self.ends} - {"right", "cancelled", "told so"}

    @property
    def passed(self) -> bool:
        """All of it."""
        return self.flat and self.as_expected
