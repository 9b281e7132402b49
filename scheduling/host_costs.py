"""What a step costs on the host, by a few rates."""

import math
from dataclasses import dataclass, fields, replace

from scheduling.request import Request, Slice, SliceBucket, Step

REST_STEP_US, RESTS = 100, 2
"""Python runs one thread at a time. A launcher leaves the interpreter to the callers for twice as
long as it launched, less what it had slept before or left to them meanwhile, as long as one of them
makes a request or something comes in each step of this time. Else each request would be launched
alone, at a cost that holds the callers up, so that their requests come one by one. A device that is
the bottleneck does not wait for that: then the launcher sleeps for longer than it launches."""

SWITCH_US = 200.0
"""After so long Python takes the interpreter from a thread that computes, while an engine is open:
its threads need several turns for each launch."""

LARGE_IDS = 2**18
"""So many ids are copied for so long that the interpreter is left to others: a request of them and
the launcher do not wait for each other, a launcher that packs them lets callers go on, and one that
rests goes on when such a request is there."""

COMPUTED = (
    *("submit_us", "submit_sample_us", "request_us", "step_us", "sample_us", "id_us"),
    *("end_us", "resolve_us"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """What the engine's host side takes, in microseconds. Raises ValueError for what is none.

    wake_us: from a request's arrival until a callers' thread that sleeps begins with it.
    submit_us, submit_sample_us: the callers' thread, for each request and each of its samples. One
        request after the other: its arrival is known when it has been let in.
    request_us: the launcher's thread, for each request, with its first samples.
    step_us: the launcher's thread, for each step: for its mail and the policy.
    launch_us: the call of each slice and each segment; of both if they co-run. It leaves the
        interpreter to others.
    sample_us, id_us: the launcher's thread, for each sample and each id that it packs.
    hand_over_us: the launcher's thread, for each byte of a slice's buffer: `bytes_per_sample` and
        `bytes_per_id` for all that its bucket has room for.
    byte_us: the copy of these bytes. It keeps the step from starting, not the launcher.
    answer_us: from a step's end on the device until the completion thread is woken.
    end_us, resolve_us: the completion thread, for each step, before the launcher knows of its end,
        and for each request that it answers.
    switch_us: how long a thread that computes keeps the interpreter from those that ask for it.

    The defaults are orders of magnitude of a server with a PCIe GPU (12 GB/s from pageable memory)
    whose callers are no bottleneck.
    """

    wake_us: float = 0.0
    submit_us: float = 0.0
    submit_sample_us: float = 0.0
    request_us: float = 0.0
    step_us: float = 0.0
    launch_us: float = 20.0
    sample_us: float = 0.05
    id_us: float = 0.0005
    hand_over_us: float = 0.0
    byte_us: float = 1 / 12_000
    answer_us: float = 30.0
    end_us: float = 0.0
    resolve_us: float = 0.0
    switch_us: float = SWITCH_US
    bytes_per_sample: int = 0
    bytes_per_id: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"host costs: {field.name} is {value}, not 0 or more")

    def slower(self, factor: float) -> "HostCosts":
        """With all that the engine's own code computes so many times as long; calls and copies take
        what they take.
        """
        return replace(self, **{name: factor * getattr(self, name) for name in COMPUTED})

    def launching_us(self, step: Step) -> float:
        """How long the launcher's thread is busy with a step."""
        packing_us = self._packing_us(step.slice) if step.slice else 0.0
        return self.step_us + packing_us + self._calling_us(step)

    def aside_us(self, step: Step) -> float:
        """How long, of that, the interpreter is left to others, and callers go on where it is not
        crowded: while it calls executables, and packs what is large.
        """
        piece = step.slice
        is_large = piece is not None and piece.ids >= LARGE_IDS
        return self._calling_us(step) + (self._copying_us(piece) if piece and is_large else 0.0)

    def upload_us(self, step: Step) -> float:
        """How long a step's slice is on its way to the device."""
        return self.byte_us * self._bytes(step.slice.bucket) if step.slice else 0.0

    def submitting_us(self, request: Request) -> float:
        """How long the callers' thread computes for a request."""
        is_large = request.ids >= LARGE_IDS
        return self.submit_us + (0.0 if is_large else self.copying_in_us(request))

    def copying_in_us(self, request: Request) -> float:
        """How long it copies the samples; of a large one, it leaves the interpreter to others."""
        return request.samples * self.submit_sample_us

    def _calling_us(self, step: Step) -> float:
        apart = (step.slice is not None) + (step.segment is not None)
        return self.launch_us * (1 if step.co_run else apart)

    def _packing_us(self, piece: Slice) -> float:
        new = sum(part.start == 0 for part in piece.parts)
        handed_us = self.hand_over_us * self._bytes(piece.bucket)
        return new * self.request_us + self._copying_us(piece) + handed_us

    def _copying_us(self, piece: Slice) -> float:
        return piece.samples * self.sample_us + piece.ids * self.id_us

    def _bytes(self, room: SliceBucket) -> int:
        return room.samples * self.bytes_per_sample + room.ids * self.bytes_per_id
