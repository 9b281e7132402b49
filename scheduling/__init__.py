"""Which work runs when: plain Python and numpy, no jax and no clock of its own.

`request` has the types that flow, `buckets` the ladders of static sizes, `pipeline` the incremental
batching, `admission` the bound on work inside, `table` the measured times, `costs` what steps cost
by them, `alternatives` all plans, `planner` the best. `simulator` runs all of it on a virtual
clock, with the host's `host_costs`; `serial_batching` is what to compare with.
"""

from scheduling.admission import Admission
from scheduling.buckets import ladder, smallest_holding
from scheduling.costs import StepTimes, TableTimes
from scheduling.host_costs import HostCosts
from scheduling.pipeline import (
    Action,
    Apply,
    Arrive,
    Cancel,
    Event,
    Expire,
    Launch,
    Pipeline,
    PipelineConfig,
    StepDone,
    Write,
)
from scheduling.planner import Plans, SerialPlans, TablePlans
from scheduling.policy import Policy
from scheduling.request import (
    CoRun,
    Part,
    Request,
    Segment,
    SegmentShape,
    Slice,
    SliceBucket,
    Step,
    StepShape,
)
from scheduling.serial_batching import Collecting, SerialBatching
from scheduling.simulator import SimulatedRun, simulate
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
    "Apply",
    "Arrive",
    "Cancel",
    "CoRun",
    "Collecting",
    "Event",
    "Expire",
    "HostCosts",
    "Launch",
    "MissPolicy",
    "Part",
    "Pipeline",
    "PipelineConfig",
    "Plans",
    "Policy",
    "ProfileKey",
    "ProfileMiss",
    "ProfileRow",
    "ProfileTable",
    "ProfileTableError",
    "Request",
    "Segment",
    "SegmentShape",
    "SerialBatching",
    "SerialPlans",
    "SimulatedRun",
    "Slice",
    "SliceBucket",
    "Step",
    "StepDone",
    "StepShape",
    "StepTimes",
    "TablePlans",
    "TableTimes",
    "Write",
    "ladder",
    "simulate",
    "smallest_holding",
]
