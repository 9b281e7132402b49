"""When memory counts as flat, and that a process's is seen."""

import os
import sys
from subprocess import PIPE, Popen

import pytest

from recflow_jax.console import Missing
from recflow_jax.measure.memory import Memory, growth_bytes, is_flat, rss_bytes, sampled
from running_server import SOON_S, wait_for

MIB = 2**20


def samples(*rss_mib: float, device_mib: float = 0) -> list[Memory]:
    return [
        Memory(at_s=float(at), rss_bytes=int(mib * MIB), device_bytes=int(device_mib * MIB))
        for at, mib in enumerate(rss_mib)
    ]


def test_the_first_quarter_warms_up() -> None:
    assert is_flat(samples(100, 700, 400, 400, 400, 400, 400, 400))


@pytest.mark.parametrize(("mib", "flat"), [(400, True), (416, True), (417, False)])
def test_little_memory_may_grow_by_mebibytes(mib: float, flat: bool) -> None:
    grown = samples(0, 0, 400, 400, 0, 0, mib, mib)
    assert is_flat(grown) is flat
    assert growth_bytes(grown) == {"rss_bytes": (mib - 400) * MIB, "device_bytes": 0}


@pytest.mark.parametrize(("mib", "flat"), [(10_200, True), (10_201, False)])
def test_much_memory_may_grow_by_a_share(mib: float, flat: bool) -> None:
    assert is_flat(samples(0, 10_000, 0, mib)) is flat


def test_the_device_counts_too() -> None:
    grown = [*samples(1, 1, 1), *samples(1, device_mib=17)]
    assert not is_flat(grown)


GROWS = f"""
print("small", flush=True)
input()
kept = b"x" * {64 * MIB}
print("grown", flush=True)
input()
"""


def test_a_process_is_seen() -> None:
    """One that frees nothing meanwhile, as the threads of this one may."""
    command = [sys.executable, "-c", GROWS]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "small\n"
        before = rss_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "grown\n"
        assert rss_bytes(process.pid) - before > 32 * MIB
        process.communicate("\n")


def test_samples_are_taken_meanwhile() -> None:
    seen: list[Memory] = []
    device = iter(range(10**9))
    with sampled(os.getpid(), lambda: next(device), every_s=0.01, on_sample=seen.append) as taken:
        wait_for(lambda: len(seen) >= 3)
    assert taken == seen and seen[0].rss_bytes > MIB
    assert [memory.device_bytes for memory in seen[:3]] == [0, 1, 2]
    assert 0 < seen[0].at_s < seen[1].at_s < SOON_S


def test_no_such_process_is_missing() -> None:
    with pytest.raises(Missing, match="/proc"):
        rss_bytes(2**30)
