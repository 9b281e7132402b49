"""Timing: every round ends with one wait, contenders take turns, the first call is left out."""

import time

import pytest

from recflow_jax.measure.timing import (
    Timed,
    Timing,
    TimingOptions,
    device_us,
    measure,
    measure_side_by_side,
)


class Device:
    """Runs launches in order, each for `us`; notes what it was told."""

    def __init__(self, us: float, log: list[str], name: str = "") -> None:
        self.us = us
        self.log = log
        self.name = name
        self.done_s = 0.0
        self.calls = 0

    def launch(self, _: int) -> "Device":
        self.calls += 1
        first_s = 0.05 if self.calls == 1 else 0.0
        self.done_s = max(self.done_s, time.perf_counter()) + self.us / 1e6 + first_s
        return self

    def wait(self, _: "Device") -> None:
        self.log.append(self.name)
        time.sleep(max(0.0, self.done_s - time.perf_counter()))


def timed(device: Device) -> Timed:
    return Timed(launch=device.launch, wait=device.wait)


def test_times_the_device_not_the_first_call() -> None:
    device = Device(200, [])
    timing = measure(timed(device), TimingOptions(rounds=3, round_s=0.01))
    assert 200 <= timing.median_us < 1000
    assert timing.calls >= 40 and timing.samples == 3
    assert timing.p10_us <= timing.median_us <= timing.p90_us


def test_a_round_waits_once_and_contenders_take_turns() -> None:
    log: list[str] = []
    contenders = {name: timed(Device(100, log, name)) for name in "ab"}
    measure_side_by_side(contenders, TimingOptions(rounds=4, round_s=0.002))
    assert log[-8:] == list("abbaabba")


def test_slow_calls_get_fewer_rounds() -> None:
    options = TimingOptions(rounds=50, round_s=0.001, limit_s=0.05)
    timing = measure(timed(Device(20_000, [])), options)
    assert 2 <= timing.samples < 10 and timing.calls == 1


def test_percentiles() -> None:
    timing = Timing.of([5.0, 1.0, 3.0], calls=2)
    assert (timing.median_us, timing.samples, timing.calls) == (3.0, 3, 2)
    assert timing.p10_us == pytest.approx(1.4) and timing.p90_us == pytest.approx(4.6)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        Timing.of([])
    with pytest.raises(ValueError, match="measures nothing"):
        TimingOptions(rounds=0)


def test_a_cpu_has_no_kernels_to_time() -> None:
    assert device_us(None, [()]) is None
