"""Incremental batching as a state machine: times and events in, steps to launch out.

At most one batch is *running*: its segments are launched one after another. Behind it one batch
is *filling*: whatever arrives in the meantime is gathered for it, a slice beside each segment. When
the running batch's last segment has been launched, the filling batch takes its place. So nothing
waits for a batch to fill, and the size of the batches follows the load by itself.

A slice beside a segment ends sooner, its batch a step later. Where there are executables of whole
batches, slices therefore ride only while more waits than one batch takes, and where the plans find
that worth it; else what has arrived becomes a whole batch behind the running one.

A small step costs the host as much as a large one. So where it comes late to its mail, and whole
batches are steps, the last one that may be in flight is at least half of the largest, or none.

The caller runs the steps on one in-order stream and reports each as it ends. A slice lands
in its batch's buffer before the batch's first segment starts; two buffers, used in turn, suffice.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter

from scheduling.buckets import smallest_holding
from scheduling.planner import Plans, SerialPlans
from scheduling.request import (
    WHOLE,
    CoRun,
    Part,
    Request,
    Segment,
    SegmentShape,
    Slice,
    SliceBucket,
    Step,
)
from scheduling.waiting import WaitingQueue

LATE_US = 500
"""Mail that has lain for so long shows a host that launches all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """The static shapes there are, and how far launches run ahead of the device.

    `batch_buckets` ascend; `slice_buckets` ascend in samples and in ids (one of the two may stay
    equal from a bucket to the next), so that they have one order. `segments` is how many a batch
    goes through where no plans say otherwise. Raises ValueError for sizes that make no pipeline.
    """

    batch_buckets: tuple[int, ...]
    slice_buckets: tuple[SliceBucket, ...]
    segments: int
    max_steps_in_flight: int = 3

    def __post_init__(self) -> None:
        for name in ("segments", "max_steps_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"pipeline: {name} is {getattr(self, name)}, not at least 1")
        _check_ladder("batch_buckets", [(size, size) for size in self.batch_buckets])
        _check_ladder("slice_buckets", [(size.samples, size.ids) for size in self.slice_buckets])
        if self.largest_slice.samples > self.largest_batch:
            raise ValueError(
                f"pipeline: a slice of {self.largest_slice.samples} samples does not fit "
                f"the largest batch, {self.largest_batch}"
            )

    @property
    def largest_batch(self) -> int:
        return self.batch_buckets[-1]

    @property
    def largest_slice(self) -> SliceBucket:
        return self.slice_buckets[-1]

    def of_batches(self, batch_buckets: tuple[int, ...]) -> "PipelineConfig":
        """These batch sizes instead, and no slice that is larger than all of them."""
        fitting = tuple(s for s in self.slice_buckets if s.samples <= batch_buckets[-1])
        return replace(self, batch_buckets=batch_buckets, slice_buckets=fitting)

    def largest_slice_at(self, row: int, most: int | None = None) -> SliceBucket | None:
        """The largest bucket that, padding included, fits from `row` on into a batch of `most` rows
        (None: the largest).
        """
        room = (most or self.largest_batch) - row
        fitting = bisect_right(self.slice_buckets, room, key=attrgetter("samples"))
        return self.slice_buckets[fitting - 1] if fitting else None

    def smallest_slice_holding(self, samples: int, ids: int) -> SliceBucket:
        holds_samples = bisect_left(self.slice_buckets, samples, key=attrgetter("samples"))
        holds_ids = bisect_left(self.slice_buckets, ids, key=attrgetter("ids"))
        return self.slice_buckets[max(holds_samples, holds_ids)]


def _check_ladder(name: str, sizes: list[tuple[int, int]]) -> None:
    if not sizes or min(sizes[0]) < 1:
        raise ValueError(f"pipeline: {name} starts at {sizes[:1]}, not at a size of at least 1")
    for (a, b), (c, d) in pairwise(sizes):
        if c < a or d < b or (a, b) == (c, d):
            raise ValueError(f"pipeline: {name} does not ascend from {(a, b)} to {(c, d)}")


@dataclass(slots=True, kw_only=True)
class Arrive:
    """A request joins the queue."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Nobody waits for this request any more; what of it is launched runs on."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """The device has finished a step. Steps end in the order of their launch."""

    step_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Rows of tables are to change: no request and no batch may read some before and some after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Enqueue this step on the device now."""

    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """The deadline passed before any of the request was launched: it was dropped, at no cost."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Enqueue the change of the earliest `Write` now: nothing is partly embedded."""


Event = Arrive | Cancel | StepDone | Write
Action = Launch | Expire | Apply


class Pipeline:
    """Decides which step to launch next, from what has arrived and what has ended.

    Requests run by ascending priority, then in the order of arrival; one that is too large for a
    slice or for the rest of a batch is split, and its remainder stays first in its priority, but
    small ones wait for the next batch rather than be split (WHOLE_SHARE in `waiting`). While
    urgent requests use up the device, less urgent ones wait without bound: give them deadlines.
    How batches are cut, and what is launched beside a segment, is up to `plans`. A write waits for
    the requests that are partly gathered and for the filling batch, which takes in no others.
    Not thread-safe; one thread calls `step`.
    """

    def __init__(self, config: PipelineConfig, plans: Plans | None = None) -> None:
        self._config = config
        self._plans = plans or SerialPlans(
            count=config.segments,
            batch_buckets=config.batch_buckets,
            largest_slice=config.largest_slice,
        )
        self._queue = WaitingQueue()
        self._running: _Batch | None = None
        self._filling = _Batch(id=0)
        self._backlog = 0
        self._writes = 0
        self._steps_launched = 0
        self._steps_done = 0

    def step(self, now_us: int, events: Sequence[Event] = ()) -> list[Action]:
        """What to do now that `events` have happened, in order.

        Raises ValueError, with nothing changed, for a request whose id is waiting already or with
        a sample of more ids than the largest slice bucket, and for a step that cannot be the next
        to end.
        """
        self._check(events)
        arrived_us = [event.request.arrived_us for event in events if isinstance(event, Arrive)]
        is_late = now_us - min(arrived_us, default=now_us) >= LATE_US
        for event in events:
            self._apply(event)
        actions: list[Action] = [Expire(request_id=i) for i in self._queue.drop_late(now_us)]
        actions += self._due_writes()
        while self.can_launch and self._has_work() and not (is_late and self._waits_for_more()):
            if self._running is None and not self._is_gathering() and self._filling.rows:
                self._run_filled()
            actions += self._due_writes()
            actions.append(Launch(step=self._next_step()))
        return actions

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight: every request has had its end."""
        return not self._has_work() and not self.steps_in_flight

    @property
    def queued_samples(self) -> int:
        """Samples of which nothing has been launched yet."""
        return self._queue.samples

    @property
    def is_crowded(self) -> bool:
        """Whether more waits than one batch takes: then it is throughput that counts."""
        return self._queue.samples >= self._config.largest_batch

    @property
    def next_deadline_us(self) -> int | None:
        """When the next request expires if none of it is launched before, for the caller's wait."""
        return self._queue.next_deadline_us

    @property
    def can_launch(self) -> bool:
        """Whether one more step may be in flight."""
        return self.steps_in_flight < self._config.max_steps_in_flight

    @property
    def steps_in_flight(self) -> int:
        return self._steps_launched - self._steps_done

    def _has_work(self) -> bool:
        return self._running is not None or self._filling.rows > 0 or self._queue.samples > 0

    def _waits_for_more(self) -> bool:
        """Whether a late host begins a batch when a step has ended, or when there is more of it."""
        if not self._plans.whole or self._is_behind:
            return False
        is_under_way = self._running is not None or self._filling.rows > 0
        return not is_under_way and 2 * self._queue.samples < self._config.largest_batch

    def _due_writes(self) -> list[Action]:
        """All that have come, once nothing is partly embedded."""
        if not self._writes or self._filling.rows or self._queue.has_begun:
            return []
        due, self._writes = self._writes, 0
        return [Apply()] * due

    def _next_step(self) -> Step:
        shape = self._running.next_shape if self._running else None
        piece = self._slice(self._room_beside(shape))
        co_run = self._plans.co_run(shape, piece.bucket) if shape and piece else None
        if piece and shape is None and self._is_whole(piece):
            self._run_filled(segments=1)
            co_run = WHOLE
        segment = self._segment()
        step = Step(id=self._steps_launched, slice=piece, segment=segment, co_run=co_run)
        self._steps_launched += 1
        return step

    def _is_gathering(self) -> bool:
        """Whether a batch with none before it has more to wait for than what it has.

        It takes as many samples as were waiting when its first slice was launched. Later ones ride
        beside its segments: if it took these too, a trickle of arrivals would hold it back.
        """
        if self._filling.rows == 0:
            self._backlog = self._queue.samples
        room = self._room_left()
        if self._writes:
            return room is not None and self._queue.fits(room, begun=True)
        return self._backlog > 0 and room is not None and self._queue.fits(room)

    def _run_filled(self, *, segments: int | None = None) -> None:
        """The filling batch runs, cut into `segments` or as the plans say."""
        batch, self._filling = self._filling, _Batch(id=self._filling.id + 1)
        bucket = smallest_holding(self._config.batch_buckets, batch.rows)
        segments = segments or self._plans.segments(bucket, self._queue.samples)
        batch.next_shape = SegmentShape(segments=segments, index=0, batch=bucket)
        self._running = batch
        self._backlog = 0

    def _is_whole(self, piece: Slice) -> bool:
        """Whether a slice is all of a batch, which has an executable of its own then."""
        if piece.row or self._is_gathering():
            return False
        bucket = smallest_holding(self._config.batch_buckets, piece.samples)
        if self.is_crowded and self._plans.segments(bucket, self._queue.samples) > 1:
            return False
        shape = SegmentShape(segments=1, index=0, batch=bucket)
        batch = CoRun(segment=shape, slice=piece.bucket, config=WHOLE)
        return self._plans.runs_whole(batch, crowded=self.is_crowded)

    @property
    def _is_behind(self) -> bool:
        """Whether launches are not ahead of the device: one that is launched now starts at once."""
        return self.steps_in_flight < max(self._config.max_steps_in_flight - 1, 1)

    def _most_rows(self) -> int:
        """Of a batch that is begun now."""
        config, waiting = self._config, self._queue
        if self.is_crowded or self._is_behind or self._writes:
            return config.largest_batch
        least = min(waiting.first_samples, config.largest_batch)
        most = smallest_holding(
            config.batch_buckets, max(self._plans.batch(waiting.samples), least)
        )
        room = config.largest_slice_at(0, most)
        return most if room and waiting.fits(room) else config.largest_batch

    def _room_beside(self, shape: SegmentShape | None) -> SliceBucket | None:
        """For a slice: in the filling batch and, beside a segment, by the plans."""
        room = self._room_left()
        if shape is None or room is None:
            return room
        if self._plans.whole and not (self.is_crowded and self._plans.rides):
            return None
        planned = self._plans.slice_beside(shape, self._queue.samples)
        return min(room, planned, key=attrgetter("samples", "ids"))

    def _room_left(self) -> SliceBucket | None:
        """For a slice in the filling batch; None where it is so little that a request that takes
        little of a slice would be cut for it: that would wait for two batches, and cost a launch.
        """
        batch = self._filling
        if not batch.rows:
            batch.most = self._most_rows()
        room = self._config.largest_slice_at(batch.rows, batch.most)
        if room is None or not batch.rows:
            return room
        of, only_begun = self._config.largest_slice, self._writes > 0
        return room if self._queue.fits_uncut(room, of=of, begun=only_begun) else None

    def _slice(self, room: SliceBucket | None) -> Slice | None:
        """As much waiting work as there is room for."""
        only_begun = self._writes > 0
        of = self._config.largest_slice
        parts, ids = self._queue.take(room, of=of, begun=only_begun) if room else ((), 0)
        if not parts:
            return None
        row, samples = self._filling.rows, self._filling.append(parts)
        self._backlog -= samples
        return Slice(
            batch_id=self._filling.id,
            row=row,
            parts=parts,
            samples=samples,
            ids=ids,
            bucket=self._config.smallest_slice_holding(samples, ids),
        )

    def _segment(self) -> Segment | None:
        """The running batch's next segment; with its last one the batch stops running."""
        batch = self._running
        if batch is None or batch.next_shape is None:
            return None
        shape, batch.next_shape = batch.next_shape, batch.next_shape.next
        if shape.last:
            self._running = None
        return Segment(
            batch_id=batch.id,
            shape=shape,
            samples=batch.rows,
            parts=tuple(batch.parts) if shape.last else (),
        )

    def _check(self, events: Sequence[Event]) -> None:
        """All events before any is applied, so that a bad one takes no good one with it."""
        arriving: set[int] = set()
        ending = self._steps_done
        for event in events:
            if isinstance(event, Arrive):
                self._check_arrival(event.request, arriving)
                arriving.add(event.request.id)
            elif isinstance(event, StepDone):
                if event.step_id != ending or ending == self._steps_launched:
                    raise ValueError(f"step {event.step_id} cannot end now, {ending} is next")
                ending += 1

    def _check_arrival(self, request: Request, arriving: set[int]) -> None:
        if request.id in self._queue or request.id in arriving:
            raise ValueError(f"request {request.id}: a request with this id is waiting already")
        most = self._config.largest_slice.ids
        if request.ids > most:
            _check_ids_per_sample(request, most)

    def _apply(self, event: Event) -> None:
        match event:
            case Arrive(request=request):
                self._queue.push(request)
            case Cancel(request_id=request_id):
                self._queue.drop(request_id)
            case StepDone():
                self._steps_done += 1
            case Write():
                self._writes += 1


def _check_ids_per_sample(request: Request, most: int) -> None:
    ids = request.id_offsets[1:] - request.id_offsets[:-1]
    sample = ids.argmax()
    if ids[sample] > most:
        raise ValueError(
            f"request {request.id}: sample {sample} has {ids[sample]} ids, "
            f"more than the largest slice holds, {most}"
        )


@dataclass(slots=True, kw_only=True)
class _Batch:
    """Rows gathered so far, of how many at most, the (row, part) they came from, and the segment to
    launch next.
    """

    id: int
    rows: int = 0
    most: int = 0
    parts: list[tuple[int, Part]] = field(default_factory=list)
    next_shape: SegmentShape | None = None

    def append(self, parts: tuple[Part, ...]) -> int:
        """Give each part the next rows; how many rows that were."""
        first = self.rows
        for part in parts:
            self.parts.append((self.rows, part))
            self.rows += part.samples
        return self.rows - first
