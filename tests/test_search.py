"""Bisection against bounds that are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow_jax.measure.search import largest_load


@given(bound=st.floats(0.01, 1), within=st.floats(0.001, 0.1))
def test_it_comes_so_close_and_not_above(bound: float, within: float) -> None:
    found = largest_load(lambda load: load <= 1000 * bound, 1000, within=within)
    assert found <= 1000 * bound <= found + within * max(1000 * bound * (1 + within), 1000 * within)


def test_the_most_is_tried_first() -> None:
    tried: list[float] = []
    assert largest_load(lambda load: not tried.append(load), 10, within=0.01) == 10
    assert tried == [10]


def test_none_that_is_fast() -> None:
    tried: list[float] = []
    assert largest_load(lambda load: bool(tried.append(load)), 10, within=0.01) == 0
    assert len(tried) < 20


def test_none_below_the_least_is_tried() -> None:
    tried: list[float] = []
    assert largest_load(lambda load: bool(tried.append(load)), 1000, within=0.01, least=200) == 0
    assert tried == [1000, 500, 250]


@pytest.mark.parametrize(("within", "most"), [(0.01, 12), (0.1, 7)])
def test_few_are_tried(within: float, most: int) -> None:
    tried: list[float] = []
    largest_load(lambda load: bool(tried.append(load)) or load <= 600, 1000, within=within)
    assert len(tried) <= most
