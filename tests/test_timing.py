"""Timing: every round ends with one wait, contenders take turns, the first call is left out."""

import time
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.mosaic.gpu import profiler

from recflow_jax.measure.timing import (
    Timed,
    Timing,
    TimingOptions,
    device_us,
    kernels_us,
    launch_us,
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


def _never(call: int) -> None:
    raise AssertionError(f"call {call} was launched")


def test_a_cpu_has_no_kernels_to_time() -> None:
    assert device_us(None, [()]) is None
    assert kernels_us(Timed(launch=_never)) is None


class Cupti:
    """Each launch is two kernels, of 2 us and of 0.5 us; they are seen between start and end."""

    def __init__(self, kernels: int = 2) -> None:
        self.kernels = kernels
        self.seen: list[tuple[str, float]] | None = None

    def launch(self, call: int) -> int:
        if self.seen is not None:
            self.seen += [("long", 2e-3), ("short", 5e-4)][: self.kernels]
        return call

    def _cupti_init(self) -> None:
        self.seen = []

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        assert finalize and self.seen is not None
        return self.seen


@pytest.mark.parametrize(("kernels", "us"), [(2, 2.5), (1, 2.0), (0, None)])
def test_kernels_are_timed_call_by_call_without_the_first(
    monkeypatch: pytest.MonkeyPatch, kernels: int, us: float | None
) -> None:
    cupti = Cupti(kernels)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", SimpleNamespace(_mosaic_gpu_ext=cupti))
    assert kernels_us(Timed(launch=cupti.launch)) == (us and pytest.approx(us))


def test_without_cupti_no_kernels_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", None)
    assert kernels_us(Timed(launch=_never)) is None


def test_a_launch_is_timed_without_what_it_launches() -> None:
    waited: list[int] = []

    def wait(call: int) -> None:
        waited.append(call)
        time.sleep(0.002)

    timed = Timed(launch=lambda call: call, wait=wait)
    assert launch_us(timed, rounds=5) < 1000
    assert waited == [0, 1, 2, 3, 4]
    assert launch_us(timed, rounds=2, calls=3) < 1000
    assert waited[5:] == [2, 5]
