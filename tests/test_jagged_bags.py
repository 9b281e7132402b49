"""Bags of any length: the compiled pass and numpy's give the same rows, and refuse the same."""

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine import jagged_bags
from recflow_jax.engine.jagged_bags import JaggedBags, one_pass
from recflow_jax.engine.prepared import Preparer
from recflow_jax.layout import Layout
from small_models import CONCAT

LAYOUT = Layout.of(CONCAT)
FEATURES = len(CONCAT.features)
LAST_ROWS = np.array(CONCAT.feature_rows) - 1
LONGEST = [f.longest_bag for f in CONCAT.features]


@pytest.fixture(params=["numpy", 1, 2, 3])
def bags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[JaggedBags]:
    """By numpy, or compiled for so many threads."""
    if request.param == "numpy":
        yield JaggedBags(CONCAT, LAYOUT, compiles=False)
        return
    pytest.importorskip("numba", reason="numba is an extra")
    compiled = one_pass(request.param)
    if compiled is None:
        pytest.skip("numba has no layer here for several threads")
    monkeypatch.setattr(jagged_bags, "one_pass", lambda *_, **__: compiled)
    yield JaggedBags(CONCAT, LAYOUT, compiles=True)


def drawn(samples: int) -> tuple[np.ndarray, np.ndarray]:
    batch = generate(CONCAT, samples, seed=samples)
    return batch.values.astype(np.int32), batch.offsets.astype(np.int64)


@pytest.mark.parametrize("samples", [0, 1, 2, 40])
def test_ids_become_rows_of_groups(bags: JaggedBags, samples: int) -> None:
    values, offsets = drawn(samples)
    feature = np.arange(len(offsets) - 1) % FEATURES
    bases = np.repeat(np.array(LAYOUT.feature_bases)[feature], np.diff(offsets))
    values.setflags(write=False)
    np.testing.assert_array_equal(bags.rows(values, offsets), values + bases)


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1, None], ids=str)
def test_ids_outside_their_tables_are_refused(
    bags: JaggedBags, samples: int, place: int, wrong: int | None
) -> None:
    """The first one, the last one; the first id behind the table, too."""
    values, offsets = drawn(samples)
    feature = np.flatnonzero(np.diff(offsets))[place] % FEATURES
    values[place] = LAST_ROWS[feature]
    assert bags.rows(values, offsets) is not None
    values[place] = LAST_ROWS[feature] + 1 if wrong is None else wrong
    assert bags.rows(values, offsets) is None


def falling(offsets: np.ndarray) -> None:
    offsets[-3] = offsets[-2] + 1


def from_below(offsets: np.ndarray) -> None:
    offsets[len(offsets) // 2] = -1


def far_behind(offsets: np.ndarray) -> None:
    offsets[len(offsets) // 2] = 2**40


def not_from_the_start(offsets: np.ndarray) -> None:
    offsets[0] = 1


def not_to_the_end(offsets: np.ndarray) -> None:
    offsets[-1] -= 1


@pytest.mark.parametrize(
    "spoil", [falling, from_below, far_behind, not_from_the_start, not_to_the_end]
)
@pytest.mark.parametrize("samples", [3, 40])
def test_offsets_that_are_none_are_refused(
    bags: JaggedBags, samples: int, spoil: Callable[[np.ndarray], None]
) -> None:
    values, offsets = drawn(samples)
    spoil(offsets)
    assert bags.rows(values, offsets) is None


def test_a_bag_that_is_too_long_is_refused(bags: JaggedBags) -> None:
    feature, longest = next((place, most) for place, most in enumerate(LONGEST) if most)
    lengths = np.zeros(2 * FEATURES, np.int64)
    for excess in (0, 1):
        lengths[FEATURES + feature] = longest + excess
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = bags.rows(np.zeros(offsets[-1], np.int32), offsets)
        assert (rows is None) == bool(excess)


@pytest.mark.parametrize("dtype", ["int64", "uint32"])
def test_ids_of_other_types_go_the_other_way(dtype: str) -> None:
    values, offsets = drawn(5)
    compiled = JaggedBags(CONCAT, LAYOUT, compiles=True)
    plain = JaggedBags(CONCAT, LAYOUT, compiles=False)
    expected = plain.rows(values, offsets)
    np.testing.assert_array_equal(compiled.rows(values.astype(dtype), offsets), expected)


def test_large_requests_leave_the_interpreter_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small keeps it: waiting to get it back would take longer."""
    asked: list[str] = []

    def compiled(_: int, *, frees: bool = False) -> Callable[..., bool]:
        return lambda *_: bool(asked.append("free" if frees else "held")) or True

    monkeypatch.setattr(jagged_bags, "one_pass", compiled)
    monkeypatch.setattr(jagged_bags, "LARGE_IDS", 100)
    bags = JaggedBags(CONCAT, LAYOUT, compiles=True)
    for samples in (1, 40):
        bags.rows(*drawn(samples))
    assert asked == ["held", "free"]


def test_without_numba_there_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        assert one_pass(1) is None
    one_pass.cache_clear()


@pytest.mark.parametrize(("name", "compiles"), [("w3", True), ("recflex-b", True), ("rm2", False)])
def test_samples_of_many_ids_are_worth_compiling(
    name: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not those of fixed bags, which are looked at elsewhere."""
    asked: list[int] = []
    monkeypatch.setattr(jagged_bags, "one_pass", lambda count, **_: asked.append(count))
    for config in (CONCAT, DLRMConfig.shipped(name)):
        Preparer(config, Layout.of(config), max_ids=100_000)
    assert bool(asked) == compiles


def test_where_numba_has_one_thread_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no layer is asked for."""
    numba = pytest.importorskip("numba", reason="numba is an extra")

    def no_layer() -> str:
        raise ValueError("threading layer is not initialised")

    one_pass.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("numba.config.NUMBA_NUM_THREADS", 1)
        patch.setattr(numba, "threading_layer", no_layer)
        assert one_pass(4, frees=True) is not None
    one_pass.cache_clear()
