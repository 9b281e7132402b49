"""What a step costs on the host, by a few rates."""

import math
from dataclasses import dataclass, fields

from scheduling.request import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """What the engine's host side takes, in microseconds. Raises ValueError for what is none.

    launch_us: the launcher's thread, for each slice and each segment; for both if they co-run.
    sample_us, id_us: the launcher's thread, for each sample and each id that it packs.
    byte_us: the copy of a slice's buffer, `bytes_per_sample` and `bytes_per_id` for all that its
        bucket has room for. It keeps the step from starting, not the launcher from going on.
    answer_us: from a step's end on the device until the launcher and those who asked know of it.

    The defaults are orders of magnitude of a server with a PCIe GPU (12 GB/s from pageable memory).
    """

    launch_us: float = 20.0
    sample_us: float = 0.05
    id_us: float = 0.0005
    byte_us: float = 1 / 12_000
    answer_us: float = 30.0
    bytes_per_sample: int = 0
    bytes_per_id: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"host costs: {field.name} is {value}, not 0 or more")

    def launching_us(self, step: Step) -> float:
        """How long the launcher's thread is busy with a step."""
        apart = (step.slice is not None) + (step.segment is not None)
        launches_us = self.launch_us * (1 if step.co_run else apart)
        if step.slice is None:
            return launches_us
        return launches_us + step.slice.samples * self.sample_us + step.slice.ids * self.id_us

    def upload_us(self, step: Step) -> float:
        """How long a step's slice is on its way to the device."""
        if step.slice is None:
            return 0.0
        room = step.slice.bucket
        return self.byte_us * (room.samples * self.bytes_per_sample + room.ids * self.bytes_per_id)
