"""What can go wrong with a request, beside samples that the model cannot take (InputError)."""

from scheduling.admission import Admission


class EngineError(RuntimeError):
    """A request that gets no answer; the subclass says why."""


class QueueFull(EngineError):
    """The request was not accepted: too many samples wait. Later there may be room."""


class DeadlineExceeded(EngineError):
    """The request was not, or could not be, answered before its deadline."""


class EngineClosed(EngineError):
    """The engine takes no more requests, or was closed before it came to this one."""


class StepFailed(EngineError):
    """A launch raised or the device failed; `__cause__` is what it said. The engine goes on."""


def queue_full(admission: Admission, samples: int) -> QueueFull:
    """What so many samples are told that do not fit."""
    waiting, most = admission.samples, admission.max_samples
    return QueueFull(f"{waiting} of at most {most} samples wait, {samples} more do not fit")
