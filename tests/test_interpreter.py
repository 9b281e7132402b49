"""One interpreter for several threads, on a virtual clock."""

from collections.abc import Iterator

import pytest

from scheduling.interpreter import Compute, Interpreter, Sleep, Thread

Seen = list[tuple[str, float]]


def doing(
    python: Interpreter, seen: Seen, name: str, *steps: Compute | Sleep
) -> Iterator[Compute | Sleep]:
    """Says when each step was done."""
    for step in steps:
        yield step
        seen.append((name, python.now_us))


def run(switch_us: float, **threads: tuple[Compute | Sleep, ...]) -> Seen:
    python, seen = Interpreter(switch_us), Seen()
    for name, steps in threads.items():
        python.start(doing(python, seen, name, *steps))
    python.run()
    return seen


def test_one_thread_does_one_step_after_the_other():
    assert run(5, a=(Compute(3), Sleep(10), Compute(0), Sleep(4), Compute(2))) == [
        *[("a", 3), ("a", 10), ("a", 10), ("a", 10), ("a", 12)]
    ]


def test_who_computes_is_let_alone_while_nobody_asks():
    assert run(5, a=(Compute(100),)) == [("a", 100)]


def test_who_asks_waits_for_the_switch_interval():
    # a is cut at 20 + 50, and goes on at 100.
    assert run(50, b=(Sleep(20), Compute(30)), a=(Compute(90),)) == [
        *[("b", 70), ("b", 100), ("a", 120)]
    ]


def test_who_is_done_before_that_is_not_cut():
    assert run(50, b=(Sleep(20), Compute(30)), a=(Compute(60),)) == [
        *[("a", 60), ("b", 60), ("b", 90)]
    ]


def test_the_interval_counts_from_the_asking_over_all_that_is_computed_meanwhile():
    # a is cut at 10 + 50 within its third step.
    a = (Compute(25),) * 3
    assert run(50, b=(Sleep(10), Compute(5)), a=a) == [
        *[("a", 25), ("a", 50), ("b", 60), ("b", 65), ("a", 80)]
    ]


def test_they_get_it_in_the_order_in_which_they_asked():
    # a is cut at 52, b at 52 + 50.
    seen = run(50, b=(Sleep(2), Compute(60)), c=(Sleep(3), Compute(10)), a=(Compute(70),))
    assert seen == [("b", 52), ("c", 102), ("c", 112), ("a", 130), ("b", 140)]


def test_who_sleeps_leaves_it_to_others():
    assert run(50, a=(Sleep(30), Compute(5)), b=(Compute(10),)) == [
        *[("b", 10), ("a", 30), ("a", 35)]
    ]


def woken(at_us: float, *steps: Compute | Sleep) -> Seen:
    """A thread of these steps, woken by another; a third asks at 5."""
    python, seen = Interpreter(50), Seen()
    threads: list[Thread] = []

    def waking() -> Iterator[Compute | Sleep]:
        yield Sleep(at_us)
        python.wake(threads[0])

    python.start(waking())
    python.start(doing(python, seen, "b", Sleep(5)))
    threads.append(python.start(doing(python, seen, "a", *steps)))
    python.run()
    return seen


def test_a_sleep_ends_when_it_is_woken():
    assert woken(10, Sleep(100), Compute(5), Sleep(200)) == [
        *[("b", 5), ("a", 10), ("a", 15), ("a", 200)]
    ]
    assert woken(10, Sleep(), Compute(5)) == [("b", 5), ("a", 10), ("a", 15)]


def test_who_does_not_sleep_is_not_woken():
    assert woken(10, Compute(70), Sleep(100)) == [("b", 55), ("a", 70), ("a", 100)]


def test_who_sleeps_for_good_ends_nothing():
    assert run(50, a=(Sleep(), Compute(5)), b=(Compute(5),)) == [("b", 5)]


def test_what_a_thread_raises_is_raised():
    def raising() -> Iterator[Compute | Sleep]:
        yield Sleep(5)
        raise ValueError("no")

    python = Interpreter(50)
    python.start(raising())
    with pytest.raises(ValueError, match="no"):
        python.run()
