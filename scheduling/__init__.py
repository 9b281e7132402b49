"""Which work runs when: plain Python and numpy, no jax and no clock of its own.

`request` has the types that flow, `buckets` the ladders of static sizes, `pipeline` the incremental
batching, `admission` the bound on work inside, `table` the measured times. `costs` says what a step
costs, `simulator` runs all of it on a virtual clock, `serial_batching` is what to compare with.
"""

from scheduling.admission import Admission
from scheduling.buckets import ladder, smallest_holding
from scheduling.costs import HostCosts, StepTimes, TableTimes, segment_key, slice_key, step_key
from scheduling.pipeline import (
    Action,
    Arrive,
    Cancel,
    Event,
    Expire,
    Launch,
    Pipeline,
    PipelineConfig,
    StepDone,
)
from scheduling.request import Part, Request, Segment, Slice, SliceBucket, Step
from scheduling.serial_batching import SerialBatching
from scheduling.simulator import Policy, SimulatedRun, simulate
from scheduling.table import (
    MissPolicy,
    ProfileKey,
    ProfileMiss,
    ProfileRow,
    ProfileTable,
    ProfileTableError,
)

__all__ = [
    "Action",
    "Admission",
    "Arrive",
    "Cancel",
    "Event",
    "Expire",
    "HostCosts",
    "Launch",
    "MissPolicy",
    "Part",
    "Pipeline",
    "PipelineConfig",
    "Policy",
    "ProfileKey",
    "ProfileMiss",
    "ProfileRow",
    "ProfileTable",
    "ProfileTableError",
    "Request",
    "Segment",
    "SerialBatching",
    "SimulatedRun",
    "Slice",
    "SliceBucket",
    "Step",
    "StepDone",
    "StepTimes",
    "TableTimes",
    "ladder",
    "segment_key",
    "simulate",
    "slice_key",
    "smallest_holding",
    "step_key",
]
