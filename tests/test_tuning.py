"""The search for the best way to collect."""

from dataclasses import dataclass

import pytest

from recflow_jax.measure.tuning import best_collecting, tries, tuned_where_it_fails
from scheduling import Collecting


@dataclass(frozen=True)
class Served:
    p99_ms: float


def test_waits_then_limits_then_numbers_in_flight_are_tried():
    tried = []

    def serve(collecting: Collecting) -> Served:
        tried.append(collecting)
        limit = collecting.max_samples or 16
        return Served(abs(collecting.wait_ms - 2) + abs(limit - 4) + collecting.in_flight)

    best, served = best_collecting(serve, (2, 4, 8, 16))
    assert best == Collecting(wait_ms=2, max_samples=4, in_flight=1)
    assert served == Served(1)
    assert len(tried) == len({*tried}) == tries() == 8


def test_batches_may_be_one_at_a_time():
    tried = []

    def serve(collecting: Collecting) -> Served:
        tried.append(collecting)
        return Served(-collecting.wait_ms)

    best, _ = best_collecting(serve, (2, 4, 8, 16), (1,))
    assert best == Collecting(wait_ms=5, in_flight=1)
    assert len(tried) == tries((1,)) == 7 and {one.in_flight for one in tried} == {1}


def test_the_best_may_be_the_first():
    best, _ = best_collecting(lambda c: Served(c.wait_ms - c.in_flight), (8, 16))
    assert best == Collecting(wait_ms=0, in_flight=2)


@pytest.mark.parametrize(
    ("enough", "served"),
    [
        (Collecting(wait_ms=0.5, in_flight=2), 2),
        (Collecting(wait_ms=5, max_samples=4, in_flight=2), 6),
        (Collecting(wait_ms=5, in_flight=1), 8),
    ],
    ids=str,
)
def test_none_is_tried_behind_one_that_is_enough(enough: Collecting, served: int):
    """It is taken, though another has a lower p99."""
    tried = []

    def p99_ms(collecting: Collecting) -> float:
        limited = 0 if collecting.max_samples is None else 10 + collecting.max_samples
        return limited + 10 - collecting.wait_ms - collecting.in_flight

    def serve(collecting: Collecting) -> Served:
        tried.append(collecting)
        return Served(p99_ms(collecting))

    best, load = best_collecting(
        serve, (2, 4, 8, 16), is_enough=lambda load: load.p99_ms == p99_ms(enough)
    )
    assert best == tried[-1] == enough and load == Served(p99_ms(enough))
    assert len(tried) == served


def test_what_fails_is_tuned_once_for_that_load():
    """And serves so from then on: here up to 300 per second as it is, up to 600 if tuned."""
    most, tuned = [300.0], list[float]()

    def tune(qps: float) -> float:
        tuned.append(qps)
        most[0] = 600.0
        return qps if qps <= most[0] else 0.0

    offer = tuned_where_it_fails(lambda qps: qps if qps <= most[0] else 0.0, tune, bool)
    assert [offer(qps) for qps in (200, 500, 550, 700, 700)] == [200, 500, 550, 0, 0]
    assert tuned == [500, 700]


def test_how_it_collects_reads_well():
    assert str(Collecting(wait_ms=0.5)) == "0.5 ms, 1 in flight"
    assert str(Collecting(wait_ms=2, max_samples=4096, in_flight=2)) == (
        "2 ms or 4,096, 2 in flight"
    )
