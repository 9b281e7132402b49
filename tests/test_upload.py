"""Arrays reach the device, by whichever way there is."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from recflow_jax.engine import upload


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    upload._put.cache_clear()
    yield
    upload._put.cache_clear()


def test_an_array_lands_as_it_is() -> None:
    array = np.arange(1000, dtype=np.int32)
    landed = upload.put(array)
    assert isinstance(landed, jax.Array)
    assert landed.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(landed, array)


def test_it_does_without_what_python_does_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Any) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(jax, "device_put", slow)
    upload.put(np.zeros(3, np.int32))


@pytest.mark.parametrize(
    "library",
    [
        SimpleNamespace(),
        SimpleNamespace(batched_device_put=lambda *_: 1 / 0),
        SimpleNamespace(batched_device_put=lambda *_: jax.numpy.zeros(2)),
    ],
    ids=["missing", "raises", "wrong"],
)
def test_without_the_short_way_it_takes_the_long_one(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "import_module", lambda _: library)
    array = np.arange(5, dtype=np.int32)
    np.testing.assert_array_equal(upload.put(array), array)
