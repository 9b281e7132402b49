"""The bound on accepted work holds exactly, under threads too."""

import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from scheduling.admission import Admission


def test_work_enters_whole_or_not_at_all():
    admission = Admission(10)
    assert admission.try_enter(7) and not admission.try_enter(4) and admission.try_enter(3)
    assert admission.samples == admission.max_samples == 10
    admission.leave(7)
    assert admission.samples == 3 and not admission.try_enter(8) and admission.try_enter(7)


def test_more_cannot_leave_than_is_inside():
    admission = Admission(10)
    assert admission.try_enter(3)
    with pytest.raises(ValueError, match="4 samples leave, only 3 are inside"):
        admission.leave(4)
    assert admission.samples == 3


@pytest.mark.parametrize("move", [Admission.try_enter, Admission.leave])
def test_a_negative_count_is_refused(move):
    with pytest.raises(ValueError, match="-1 samples"):
        move(Admission(10), -1)


def test_a_bound_that_admits_nothing_is_refused():
    with pytest.raises(ValueError, match="max_samples is 0"):
        Admission(0)


class InterruptedInt(int):
    """A number that lets another thread run in the middle of its arithmetic."""

    def __add__(self, n: int) -> "InterruptedInt":
        time.sleep(0)
        return InterruptedInt(int(self) + n)

    def __sub__(self, n: int) -> "InterruptedInt":
        time.sleep(0)
        return InterruptedInt(int(self) - n)


def test_the_count_is_exact_under_threads():
    admission = Admission(20)
    admission._samples = InterruptedInt(0)

    def come_and_go(seed: int) -> int:
        random, most = Random(seed), 0
        for _ in range(200):
            n = random.randint(1, 9)
            if admission.try_enter(n):
                most = max(most, admission.samples)
                admission.leave(n)
        return most

    with ThreadPoolExecutor(8) as threads:
        most = max(threads.map(come_and_go, range(8)))
    assert most <= 20 and admission.samples == 0
