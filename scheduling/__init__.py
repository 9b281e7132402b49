"""Which work runs when: plain Python and numpy, no jax and no clock of its own.

`request` has the types that flow, `buckets` the ladders of static sizes, `pipeline` the incremental
batching, `admission` the bound on work inside, `table` the measured times, `costs` what steps cost
by them, `planner` the best plans.
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
from scheduling.planner import Plans, SerialPlans, TablePlans
from scheduling.request import (
    CoRun,
    Part,
    Request,
    Segment,
    SegmentShape,
    Slice,
    SliceBucket,
    Step,
)
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
    "CoRun",
    "Event",
    "Expire",
    "Launch",
    "MissPolicy",
    "Part",
    "Pipeline",
    "PipelineConfig",
    "Plans",
    "ProfileKey",
    "ProfileMiss",
    "ProfileRow",
    "ProfileTable",
    "ProfileTableError",
    "Request",
    "Segment",
    "SegmentShape",
    "SerialPlans",
    "Slice",
    "SliceBucket",
    "Step",
    "StepDone",
    "TablePlans",
    "ladder",
    "smallest_holding",
]
