"""What steps cost the host."""

from dataclasses import fields, replace

import pytest

from fake_device import request, step
from scheduling import HostCosts, Part, SegmentShape, SliceBucket, host_costs

SIZE = SliceBucket(samples=2, ids=20)
WHOLE = SegmentShape(segments=1, index=0, batch=8)
HOST = HostCosts(
    launch_us=20, sample_us=2, id_us=0.5, byte_us=0.1, bytes_per_sample=100, bytes_per_id=4
)


def test_the_launcher_pays_per_launch_and_for_what_it_packs():
    packing_us = 1 * 2 + 15 * 0.5
    assert HOST.launching_us(step(WHOLE, None)) == 20
    assert HOST.launching_us(step(None, SIZE)) == 20 + packing_us
    assert HOST.launching_us(step(WHOLE, SIZE)) == 20 + 20 + packing_us
    assert HOST.launching_us(step(WHOLE, SIZE, "deep")) == 20 + packing_us
    with_steps = replace(HOST, step_us=9)
    assert with_steps.launching_us(step(WHOLE, SIZE)) == 9 + 20 + 20 + packing_us
    assert with_steps.aside_us(step(WHOLE, SIZE)) == 20 + 20


def test_requests_cost_with_their_first_samples_and_buffers_by_the_byte():
    host = HostCosts(
        request_us=7,
        launch_us=0,
        sample_us=0,
        id_us=0,
        hand_over_us=0.5,
        bytes_per_sample=10,
        bytes_per_id=1,
    )
    first = step(None, SIZE)
    assert first.slice
    assert host.launching_us(first) == 7 + 0.5 * (2 * 10 + 20)
    later = replace(first.slice, parts=(Part(request_id=0, start=1, stop=2),))
    assert host.launching_us(replace(first, slice=later)) == 0.5 * (2 * 10 + 20)


def test_callers_go_on_during_calls_and_while_ids_without_end_are_copied(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(host_costs, "LARGE_IDS", 15)
    assert HOST.aside_us(step(WHOLE, None)) == 20
    assert HOST.aside_us(step(WHOLE, SIZE, "deep")) == 20 + 1 * 2 + 15 * 0.5
    monkeypatch.setattr(host_costs, "LARGE_IDS", 16)
    assert HOST.aside_us(step(WHOLE, SIZE)) == 20 + 20


def test_callers_pay_per_request_and_per_sample(monkeypatch: pytest.MonkeyPatch):
    host = HostCosts(submit_us=5, submit_sample_us=2)
    asked = request(0, samples=3, ids=4)
    assert (host.submitting_us(asked), host.copying_in_us(asked)) == (5 + 3 * 2, 3 * 2)
    monkeypatch.setattr(host_costs, "LARGE_IDS", 12)
    assert (host.submitting_us(asked), host.copying_in_us(asked)) == (5, 3 * 2)


def test_a_slower_host_computes_for_longer():
    fast = HostCosts(**{field.name: at for at, field in enumerate(fields(HostCosts), start=1)})
    slow = fast.slower(2)
    of_threads = ("submit_us", "submit_sample_us", "request_us", "step_us", "sample_us", "id_us")
    doubled = {name: 2 * getattr(fast, name) for name in (*of_threads, "end_us", "resolve_us")}
    assert slow == replace(fast, **doubled)


def test_the_whole_room_of_a_slice_is_copied():
    assert HOST.upload_us(step(WHOLE, None)) == 0
    assert HOST.upload_us(step(WHOLE, SIZE)) == pytest.approx(0.1 * (2 * 100 + 20 * 4))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(value: float):
    with pytest.raises(ValueError, match="launch_us is"):
        HostCosts(launch_us=value)
