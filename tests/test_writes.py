"""Changes of rows in the pipeline: between batches, in order, soon, and before what comes later."""

from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.pipeline import (
    Apply,
    Arrive,
    Event,
    Launch,
    Pipeline,
    PipelineConfig,
    StepDone,
    Write,
)
from test_pipeline import ARRIVALS, BATCHES_OF_32, SMALL, arrive, configs, told, with_whole


def test_an_idle_pipeline_writes_at_once():
    assert told(Pipeline(SMALL).step(0, [Write(), Write()])) == ["apply", "apply"]


def test_what_came_before_may_read_it_too():
    assert told(Pipeline(SMALL).step(0, [arrive(1), Write()]))[:2] == ["apply", "slice 0: r1[0:1]"]


def test_a_write_waits_for_the_filling_batch_and_later_requests_for_the_write():
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=2))
    pipeline.step(0, [arrive(1)])
    pipeline.step(1, [StepDone(step_id=0), arrive(2)])  # rides beside segment 0.1
    actions = pipeline.step(2, [StepDone(step_id=1), Write(), arrive(3)])
    assert told(actions) == ["segment 0.2"]
    actions = pipeline.step(3, [StepDone(step_id=2)])
    assert told(actions) == ["apply", "slice 2: r3[0:1] | segment 1.0"]


def test_a_batch_stops_gathering_for_a_write():
    """Eight samples wait, four are embedded: the batch runs as it is."""
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    events = [arrive(id, samples=4) for id in (1, 2)]
    assert told(pipeline.step(0, events)) == ["slice 0: r1[0:4]"]
    actions = pipeline.step(1, [StepDone(step_id=0), Write()])
    assert told(actions) == ["apply", "slice 1: r2[0:4] | segment 0.0"]


def test_a_request_that_has_begun_is_read_to_its_end_before_more_urgent_ones():
    """Ten samples are more than a batch: the write comes behind the second one's slice."""
    pipeline = Pipeline(replace(SMALL, max_steps_in_flight=1))
    assert told(pipeline.step(0, [arrive(1, samples=10)])) == ["slice 0: r1[0:4]"]
    story = pipeline.step(1, [Write(), arrive(2, priority=-1), StepDone(step_id=0)])
    for id in range(1, 8):
        story += pipeline.step(1 + id, [StepDone(step_id=id)])
    assert told(story)[:6] == [
        "slice 0: r1[4:8]",
        "slice 1: r1[8:10] | segment 0.0",
        "segment 0.1",
        "segment 0.2",
        "apply",
        "slice 2: r2[0:1] | segment 1.0",
    ]


def test_no_empty_batch_runs_where_a_write_waited_for_a_whole_one():
    config = replace(BATCHES_OF_32, max_steps_in_flight=3)
    pipeline = Pipeline(config, with_whole(config))
    pipeline.step(0, [arrive(1, samples=32), arrive(2, samples=32), arrive(3, samples=48)])
    ended = [StepDone(step_id=0), StepDone(step_id=1)]
    assert told(pipeline.step(1, [*ended, Write(), arrive(4, samples=16)])) == [
        "slice 3: r3[32:48] | segment 3.0",
        "apply",
        "slice 4: r4[0:16] | segment 4.0",
    ]


@dataclass
class Versions:
    """What batches and requests have read, and how many writes had come before each request."""

    came: int = 0
    applied: int = 0
    launched: int = 0
    of_request: dict[int, set[int]] = field(default_factory=dict)
    least: dict[int, int] = field(default_factory=dict)
    read: dict[int, set[int]] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        if isinstance(event, Write):
            self.came += 1
        elif isinstance(event, Arrive):
            self.least[event.request.id] = self.came

    def see(self, action: Any) -> None:
        match action:
            case Apply():
                self.applied += 1
            case Launch(step=step):
                self.launched += 1
                assert step.segment is None or step.segment.samples, "an empty batch runs"
                if step.slice:
                    self._see_slice(step.slice)

    def _see_slice(self, piece: Any) -> None:
        versions = self.read.setdefault(piece.batch_id, {self.applied})
        assert versions == {self.applied}, "a batch read rows from before and after a write"
        for part in piece.parts:
            assert self.applied >= self.least[part.request_id], "rows from before its arrival"
            assert self.applied == self.came or part.start, "a write starves"
            assert self.of_request.setdefault(part.request_id, {self.applied}) == {self.applied}


MOMENTS = st.lists(st.lists(ARRIVALS | st.just(Write()) | st.none(), max_size=5), max_size=12)


@settings(max_examples=300, deadline=None)
@given(config=configs(), moments=MOMENTS, whole=st.booleans())
def test_no_batch_is_torn_and_no_write_starves(config: PipelineConfig, moments: Any, whole: bool):
    pipeline = Pipeline(config, with_whole(config) if whole else None)
    versions, done = Versions(), 0
    moments = [*moments, *[[None] * config.max_steps_in_flight] * 200]
    for now_us, drawn in enumerate(moments):
        events: list[Event] = []
        for event in drawn:
            if isinstance(event, dict):
                event = arrive(len(versions.least), **event)
            elif event is None:
                if done == versions.launched:
                    continue
                event, done = StepDone(step_id=done), done + 1
            versions.hear(event)
            events.append(event)
        for action in pipeline.step(now_us, events):
            versions.see(action)
    assert pipeline.idle and versions.applied == versions.came
