"""Which work runs when: plain Python and numpy, no jax and no clock of its own.

`request` has the types that flow, `buckets` the ladders of static sizes, `pipeline` the incremental
batching, `admission` the bound on work inside, `table` the measured times.
"""

from scheduling.admission import Admission
from scheduling.buckets import ladder, smallest_holding
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
    "Launch",
    "MissPolicy",
    "Part",
    "Pipeline",
    "PipelineConfig",
    "ProfileKey",
    "ProfileMiss",
    "ProfileRow",
    "ProfileTable",
    "ProfileTableError",
    "Request",
    "Segment",
    "Slice",
    "SliceBucket",
    "Step",
    "StepDone",
    "ladder",
    "smallest_holding",
]
