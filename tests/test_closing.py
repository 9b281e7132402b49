"""The end of a block closes what it was opened with."""

import pytest

from recflow_jax.engine.closing import Closing


class Door(Closing):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_it_is_closed_once_and_errors_pass():
    with Door() as door:
        assert door.closed == 0
    with pytest.raises(KeyError), door:
        raise KeyError
    assert door.closed == 2


def test_whoever_does_not_say_how_is_told():
    with pytest.raises(NotImplementedError), Closing():
        pass
