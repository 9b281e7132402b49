"""What the kernels mean, against loops in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import reference
from pallas_kernels.slots import Run, Slot, runs, width

# float32 sums of up to some dozens of float32 products.
FLOAT32_ERROR = 2e-6
GROUP_ROWS = (13, 5, 7)
# Two runs of group 0 around one of group 1, sums beside means, and a third dtype.
SLOTS = (
    Slot(group=0, dim=4, column=0),
    Slot(group=0, dim=4, column=4, mean=True),
    Slot(group=1, dim=12, column=8, mean=True),
    Slot(group=0, dim=4, column=20),
    Slot(group=2, dim=8, column=24),
)


def make_groups(rng: np.random.Generator) -> list[np.ndarray]:
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
    return [
        rng.standard_normal((rows, dim)).astype(dtype)
        for rows, dim, dtype in zip(GROUP_ROWS, (4, 12, 8), dtypes, strict=True)
    ]


def make_rows(rng: np.random.Generator, lengths: list[int]) -> np.ndarray:
    """Random rows for bags of these lengths, one bag per slot and sample in turn."""
    slots = itertools.cycle(SLOTS)
    bags = [
        rng.integers(0, GROUP_ROWS[slot.group], length)
        for length, slot in zip(lengths, slots, strict=False)
    ]
    return np.concatenate([np.zeros(0, np.int64), *bags]).astype(np.int32)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def pool_by_loops(groups, rows, offsets, weights, slots) -> np.ndarray:
    samples = (len(offsets) - 1) // len(slots)
    out = np.zeros((samples, width(slots)))
    for bag, start, stop in zip(itertools.count(), offsets[:-1], offsets[1:], strict=False):
        s, slot = bag // len(slots), slots[bag % len(slots)]
        columns = slice(slot.column, slot.column + slot.dim)
        for i in range(start, stop):
            weight = 1.0 if weights is None else float(weights[i])
            out[s, columns] += weight * groups[slot.group][rows[i]].astype(np.float64)
        if slot.mean and stop > start:
            out[s, columns] /= stop - start
    return out


GATHER = jax.jit(reference.pooled_gather, static_argnames=("slots", "out_dtype"))


def pool(groups, rows, offsets, weights=None, slots=SLOTS, out_dtype="float32") -> np.ndarray:
    return np.asarray(
        GATHER(groups, rows, offsets, weights, slots=slots, out_dtype=jnp.dtype(out_dtype))
    )


def assert_close(actual: np.ndarray, expected: np.ndarray, error: float = FLOAT32_ERROR) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=error, atol=error * scale)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("samples", [1, 7, 19])
def test_pooled_gather(samples: int, weighted: bool):
    rng = np.random.default_rng(samples)
    lengths = rng.poisson(3, samples * len(SLOTS)).tolist()
    groups, rows, offsets = make_groups(rng), make_rows(rng, lengths), offsets_of(lengths)
    weights = rng.standard_normal(len(rows)).astype(np.float32) if weighted else None
    actual = pool(groups, rows, offsets, weights)
    assert actual.shape == (samples, 32)
    assert_close(actual, pool_by_loops(groups, rows, offsets, weights, SLOTS))


@given(st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_pooled_gather_of_any_bags(lengths: list[int]):
    rng = np.random.default_rng(sum(lengths))
    groups, offsets = make_groups(rng), offsets_of(lengths)
    rows = np.full(40, 2**30, np.int32)  # one size for all bags: compiled once
    rows[: offsets[-1]] = make_rows(rng, lengths)
    assert_close(pool(groups, rows, offsets), pool_by_loops(groups, rows, offsets, None, SLOTS))


def test_empty_bags_give_exact_zeros():
    groups = make_groups(np.random.default_rng(0))
    groups[0][0] = np.nan  # row 0 is what a careless gather reads for no row
    lengths = [0] * 2 * len(SLOTS)
    actual = pool(groups, np.zeros(0, np.int32), offsets_of(lengths))
    np.testing.assert_array_equal(actual, np.zeros((2, 32)))


def test_duplicates_count_each_time():
    groups = make_groups(np.random.default_rng(0))
    rows = np.array([4, 4, 4, 4, 4], np.int32)
    actual = pool(groups, rows, offsets_of([3, 2, 0, 0, 0]))
    assert_close(actual[0, :4], 3 * groups[0][4].astype(np.float64))
    np.testing.assert_array_equal(actual[0, 4:8], groups[0][4])


def test_the_last_rows_are_reached():
    groups = make_groups(np.random.default_rng(0))
    last = np.array([GROUP_ROWS[slot.group] - 1 for slot in SLOTS], np.int32)
    actual = pool(groups, last, offsets_of([1] * len(SLOTS)))
    expected = np.concatenate([groups[slot.group][-1].astype(np.float32) for slot in SLOTS])
    np.testing.assert_array_equal(actual[0], expected)


def test_padding_behind_the_last_offset_is_ignored():
    rng = np.random.default_rng(0)
    lengths = rng.poisson(2, 3 * len(SLOTS)).tolist()
    groups, rows, offsets = make_groups(rng), make_rows(rng, lengths), offsets_of(lengths)
    weights = np.ones(len(rows), np.float32)
    padded = np.concatenate([rows, [2**30, -1, 12, 0]]).astype(np.int32)
    nonsense = np.concatenate([weights, [np.nan, np.inf, 5, 5]]).astype(np.float32)
    np.testing.assert_array_equal(
        pool(groups, padded, offsets, nonsense), pool(groups, rows, offsets, weights)
    )


def test_a_mean_divides_by_the_number_of_ids_not_by_their_weights():
    table = [np.array([[1, 2, 3, 4]], np.float32)]
    slots = (Slot(group=0, dim=4, column=0, mean=True),)
    weights = np.array([1, 5], np.float32)
    actual = pool(table, np.zeros(2, np.int32), offsets_of([2]), weights, slots)
    assert actual.tolist() == [[3, 6, 9, 12]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_float32_whatever_the_tables_dtype(dtype: str):
    # 1 + 2^-12 a thousand times: lost entirely in a 16-bit sum, exact in float32.
    table = [np.array([[1] * 4, [2**-12] * 4]).astype(jnp.dtype(dtype))]
    rows = np.array([0] + [1] * 1024, np.int32)
    slots = (Slot(group=0, dim=4, column=0),)
    actual = pool(table, rows, offsets_of([1025]), None, slots)
    assert actual.tolist() == [[1.25] * 4]
    narrow = pool(table, rows, offsets_of([1025]), None, slots, out_dtype=dtype)
    assert (narrow.dtype, narrow.tolist()) == (jnp.dtype(dtype), [[1.25] * 4])


def test_runs():
    assert runs(SLOTS) == (
        Run(group=0, dim=4, first=0, count=2),
        Run(group=1, dim=12, first=2, count=1),
        Run(group=0, dim=4, first=3, count=1),
        Run(group=2, dim=8, first=4, count=1),
    )
    assert runs(()) == ()


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_dense(activation: str):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((7, 19)), rng.standard_normal((19, 5))
    bias = rng.standard_normal(5)
    operands = [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)]
    actual = reference.dense(*operands, activation=activation, precision=lax.Precision.HIGHEST)
    x, kernel, bias = (np.asarray(a, np.float64) for a in operands)
    product = x @ kernel + bias
    assert_close(np.asarray(actual), np.vectorize(ACTIVATIONS[activation])(product))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_accumulates_in_float32_and_answers_in_its_input_s_dtype(dtype: str):
    x = jnp.ones((1, 513), dtype)
    kernel = jnp.full((513, 1), 2**-9, dtype).at[0].set(1)
    actual = reference.dense(x, kernel, jnp.full(1, -1.0), activation="identity")
    # In 16 bits neither 512 additions of 2^-9 to 1 nor the difference of 1 would be exact.
    assert (actual.dtype, actual.tolist()) == (jnp.dtype(dtype), [[1.0]])


def test_a_gather_lands_in_its_rows_and_columns():
    rng = np.random.default_rng(3)
    lengths = rng.poisson(2, 3 * len(SLOTS)).tolist()
    groups, rows, offsets = make_groups(rng), make_rows(rng, lengths), offsets_of(lengths)
    vectors = rng.standard_normal((7, 2 + 32 + 1)).astype(np.float32)
    gather = jax.jit(functools.partial(reference.gather_into, slots=SLOTS, left=2))
    landed = np.array(gather(vectors, np.int32(4), groups, rows, offsets, None))
    np.testing.assert_array_equal(landed[4:, 2:34], pool(groups, rows, offsets))
    assert not landed[4:, 34].any()
    landed[4:, 2:] = vectors[4:, 2:]
    np.testing.assert_array_equal(landed, vectors)


def test_a_span_of_samples_lands_alone():
    rng = np.random.default_rng(4)
    lengths = rng.poisson(2, 5 * len(SLOTS)).tolist()
    groups, rows, offsets = make_groups(rng), make_rows(rng, lengths), offsets_of(lengths)
    vectors = rng.standard_normal((7, 32)).astype(np.float32)
    gather = functools.partial(reference.gather_into, slots=SLOTS, left=0)
    operands = (vectors, np.int32(1), groups, rows, offsets, None)
    landed = jax.jit(functools.partial(gather, span=(2, 2)))(*operands)
    pooled = pool(groups, rows, offsets)[2:4]
    np.testing.assert_array_equal(landed, np.concatenate([vectors[:3], pooled, vectors[5:]]))
    nothing = jax.jit(functools.partial(gather, span=(2, 0)))(*operands)
    np.testing.assert_array_equal(nothing, vectors)
