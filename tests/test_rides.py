"""Who takes how much of a slice along."""

import pytest

from recflow_jax.rides import Ride

LAYERS = [(10, 10), (100, 50), (100, 100), (100, 25), (100, 24)]


@pytest.mark.parametrize("text", ["in-turn", "deep/one", "long bags/one", "deep/all"])
def test_a_ride_is_read_as_it_is_written(text: str):
    assert str(Ride.parse(text)) == text


@pytest.mark.parametrize("text", ["", "deep", "deep/some", "/all"])
def test_other_texts_are_refused(text: str):
    with pytest.raises(ValueError, match=f"ride is {text!r}, not in-turn, kernel/one or"):
        Ride.parse(text)


@pytest.mark.parametrize(
    ("ride", "shares"),
    [
        ("in-turn", {}),
        ("deep/one", {2: 1000}),
        ("deep/all", {1: 256, 2: 616, 3: 128}),  # by FLOP, of 4 : 2 : 1 those of 32 samples
    ],
)
def test_shares(ride: str, shares: dict[int, int]):
    assert Ride.parse(ride).shares(LAYERS, 1000) == shares


def test_small_slices_ride_with_the_largest_layer_alone():
    assert Ride.parse("deep/all").shares(LAYERS, 31) == {2: 31}


def test_where_no_layer_is_nothing_rides():
    assert Ride.parse("deep/all").shares([], 100) == {}
