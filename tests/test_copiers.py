"""Shares are all of the work, once and in order, whoever does them."""

import threading

import pytest

from recflow_jax.engine import copiers
from recflow_jax.engine.copiers import in_shares


@pytest.fixture(params=[0, 1, 4])
def helpers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(copiers.os, "cpu_count", lambda: request.param * copiers.CORES_EACH)
    monkeypatch.setattr(copiers, "SHARE_BYTES", 8)
    return request.param


@pytest.mark.parametrize("length", [0, 1, 2, 30, 31, 1000])
@pytest.mark.parametrize("unit", [1, 7])
def test_shares_are_all_of_it(helpers: int, length: int, unit: int):
    shares = in_shares(lambda start, stop: (start, stop), length, nbytes=4 * length, unit=unit)
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
    assert shares[-1][1] == length
    assert all(start % unit == 0 for start, _ in shares)
    assert len(shares) == max(1, min(helpers + 1, length // 2))


def test_others_work_beside_the_caller(helpers: int):
    meeting = threading.Barrier(helpers + 1)
    threads = in_shares(lambda *_: (meeting.wait(10), threading.get_ident())[1], 100, nbytes=100)
    assert threads[0] == threading.get_ident()
    assert len({*threads}) == helpers + 1


def test_what_little_there_is_is_the_callers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copiers.os, "cpu_count", lambda: 64)
    nbytes = 2 * copiers.SHARE_BYTES
    for given, shares in ((nbytes - 1, 1), (nbytes, 2)):
        assert len(in_shares(lambda *run: run, 100, nbytes=given)) == shares


@pytest.mark.usefixtures("helpers")
def test_what_a_share_raises_is_raised():
    def fail(_: int, stop: int) -> None:
        if stop == 100:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_shares(fail, 100, nbytes=100)


@pytest.mark.usefixtures("helpers")
def test_when_no_thread_starts_any_more_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch):
    pool = copiers.ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(copiers, "_pool", lambda: pool)
    threads = in_shares(lambda *_: threading.get_ident(), 100, nbytes=100)
    assert {*threads} == {threading.get_ident()}
