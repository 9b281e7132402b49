"""The gather kernel: its per-thread code run on the host, its lowering, and the GPU."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_simt import HostSimt, Memory
from host_warp import HostWarp
from pallas_kernels import reference
from pallas_kernels.embedding import gather_into, pooled_gather
from pallas_kernels.gather_bags import bag_plan, gather_bags
from pallas_kernels.gather_rows import Addresses, zero_right
from pallas_kernels.gather_shape import WARP, GatherConfig, GatherShape, RowShape, choose_config
from pallas_kernels.gather_streams import gather_streams, stream_spans
from pallas_kernels.slots import Slot, width
from pallas_kernels.tables import LIMITS, QuantisedTable, quantise_rows

WARPGROUP = 128
# One block of one warpgroup and a short ring: the smallest launch in which everything happens.
STREAMS = GatherConfig(blocks=1, warpgroups=1, schedule="streams", ring_rows=3, ids_ahead=2)
TURNS = dataclasses.replace(STREAMS, ring_rows=6, rows_per_turn=2, ids_ahead=3)
BAGS = GatherConfig(blocks=1, warpgroups=1, schedule="bags")
TINY = [STREAMS, BAGS]
CONFIGS = [
    GatherConfig(),
    GatherConfig(ring_rows=6, ids_ahead=4),
    GatherConfig(warpgroups=2, ring_rows=32),
    GatherConfig(slots_per_unit=1),
    GatherConfig(rows_per_turn=4),
    GatherConfig(schedule="bags"),
    GatherConfig(schedule="bags", warpgroups=5, rows_at_once=8, ids_per_stream=4),
]
# |sum of bf16 roundings of the output| and float32 accumulation; see the docs of each dtype.
RELATIVE_ERROR = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}


def make_slots(*parts: tuple[int, int, bool]) -> tuple[Slot, ...]:
    """Slots from (group, dim, mean)."""
    columns = itertools.accumulate([0, *(dim for _, dim, _ in parts)])
    return tuple(
        Slot(group=group, dim=dim, column=column, mean=mean)
        for (group, dim, mean), column in zip(parts, columns, strict=False)
    )


def exact_rows(group: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of a table in float64."""
    if isinstance(group, QuantisedTable):
        return exact_rows(group.values, rows) * exact_rows(group.scales, rows)[:, None]
    return np.asarray(group)[rows].astype(np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of a gather, on the host."""

    groups: list[Any]
    rows: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None
    slots: tuple[Slot, ...]

    @property
    def samples(self) -> int:
        return (len(self.offsets) - 1) // len(self.slots)

    def expected(self) -> np.ndarray:
        """float64, bag by bag."""
        out = np.zeros((self.samples, width(self.slots)))
        for bag in range(len(self.offsets) - 1):
            sample, index = divmod(bag, len(self.slots))
            slot = self.slots[index]
            ids = slice(self.offsets[bag], self.offsets[bag + 1])
            vectors = exact_rows(self.groups[slot.group], self.rows[ids])
            if self.weights is not None:
                vectors = vectors * self.weights[ids, None].astype(np.float64)
            count = max(len(vectors), 1) if slot.mean else 1
            out[sample, slot.column : slot.column + slot.dim] = vectors.sum(0) / count
        return out


def make_case(
    slots: tuple[Slot, ...],
    dtypes: list[str],
    *,
    samples: int,
    longest: int,
    table_rows: int = 50,
    weighted: bool = False,
    seed: int = 0,
) -> Case:
    """Random bags of 0 to `longest` ids; padding ids that must never be read lie behind them."""
    rng = np.random.default_rng(seed)
    dims = {slot.group: slot.dim for slot in slots}
    groups = [
        make_table(rng.standard_normal((table_rows, dims[g]), np.float32), dtype)
        for g, dtype in enumerate(dtypes)
    ]
    lengths = rng.integers(0, longest + 1, samples * len(slots))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = rng.integers(0, table_rows, offsets[-1]).astype(np.int32)
    weights = rng.uniform(0.5, 1.5, len(rows) + 5).astype(np.float32) if weighted else None
    padded = np.concatenate([rows, np.full(5, 2**30, np.int32)])
    return Case(groups=groups, rows=padded, offsets=offsets, weights=weights, slots=slots)


def make_table(values: np.ndarray, dtype: str) -> Any:
    """`values` in `dtype`; scales of quantised rows differ widely."""
    if dtype not in LIMITS:
        return values.astype(jnp.dtype(dtype))
    sizes = 2.0 ** (np.arange(len(values), dtype=np.float32) % 5)
    return jax.tree.map(np.asarray, quantise_rows(jnp.asarray(values * sizes[:, None]), dtype))


MIXED = make_slots((0, 128, False), (0, 128, True), (1, 4, False), (2, 100, True), (1, 4, False))
MIXED_DTYPES = ["bfloat16", "float16", "float32"]
# Quantised groups among others, of 16, 8 and 4 bytes per lane; a group is left and entered again.
QUANTISED = make_slots(
    *[(0, 128, False), (1, 8, True), (2, 16, True), (3, 100, False), (4, 36, True), (0, 128, True)]
)
QUANTISED_DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float8_e4m3fn", "int8"]
MIXES = {"floats": (MIXED, MIXED_DTYPES), "quantised": (QUANTISED, QUANTISED_DTYPES)}
ALL_DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


def make_mix(mix: str, **options: Any) -> Case:
    slots, dtypes = MIXES[mix]
    return make_case(slots, dtypes, **options)


def row_shapes(case: Case) -> tuple[RowShape, ...]:
    values = [g.values if isinstance(g, QuantisedTable) else g for g in case.groups]
    return tuple(RowShape(dim=v.shape[1], dtype=str(v.dtype)) for v in values)


def run_on_host(
    case: Case,
    config: GatherConfig,
    out_dtype: str,
    *,
    left: int = 0,
    right: int = 0,
    claims: bool = False,
) -> np.ndarray:
    """Every thread of the launch, one after the other; the output starts poisoned."""
    memory = Memory()
    shape = GatherShape(
        samples=case.samples,
        slots=case.slots,
        rows=row_shapes(case),
        out_dtype=out_dtype,
        weighted=case.weights is not None,
        config=config,
        left=left,
        right=right,
    )
    out = np.full((case.samples, shape.width), np.nan, jnp.dtype(out_dtype))
    streamed = config.schedule == "streams"
    spans = stream_spans(shape)[0] if streamed else None
    bags = None if streamed else bag_plan(shape)
    means = np.array([slot.mean for slot in case.slots], np.int32)
    quantised = [g if isinstance(g, QuantisedTable) else None for g in case.groups]
    at = Addresses(
        groups=tuple(
            memory.place(g.values if q else g) for g, q in zip(case.groups, quantised, strict=True)
        ),
        scales=tuple(memory.place(q.scales) if q else None for q in quantised),
        ids=memory.place(case.rows),
        offsets=memory.place(case.offsets),
        weights=None if case.weights is None else memory.place(case.weights),
        spans=None if spans is None else memory.place(spans),
        means=memory.place(means),
        bag_spans=bags and memory.place(bags.spans),
        bag_slots=bags and memory.place(bags.slots),
        out=memory.place(out),
        ring=0,
        factor_ring=1 << 20,
        partial=0,
        counters=memory.place(np.zeros(64, np.int32)) if claims else None,
    )
    if streamed:
        of_warp: dict[tuple[int, int], list[int]] = {}
        for block, thread in itertools.product(range(config.blocks), range(config.threads)):
            claimed = of_warp.setdefault((block, thread // WARP), [])
            gather_streams(HostSimt(memory, claimed), shape, at, thread=thread, block=block)
            zero_right(HostSimt(memory), shape, at, thread=thread, block=block)
        return out
    lanes = np.arange(WARPGROUP)
    for block, warpgroup in itertools.product(range(config.blocks), range(config.warpgroups)):
        warps = HostWarp(memory, shared_bytes=2**14, lanes=WARPGROUP)
        place = {"thread": lanes + warpgroup * WARPGROUP, "block": np.full(WARPGROUP, block)}
        gather_bags(warps, shape, per_lane(at), **place)
        zero_right(warps, shape, per_lane(at), **place)
    return out


def per_lane(at: Addresses) -> Addresses:
    """The same addresses for every lane of a warpgroup."""

    def spread(address: int | None) -> np.ndarray | None:
        return None if address is None else np.full(WARPGROUP, address)

    return Addresses(**jax.tree.map(spread, vars(at), is_leaf=lambda leaf: leaf is None))


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    difference = out.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("config", [TURNS, *TINY], ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_threads_pool_jagged_bags_of_mixed_tables(
    out_dtype: str, weighted: bool, mix: str, config: GatherConfig
) -> None:
    case = make_mix(mix, samples=3, longest=4, weighted=weighted)
    out = run_on_host(case, config, out_dtype)
    assert relative_error(out, case.expected()) < RELATIVE_ERROR[out_dtype]


@pytest.mark.parametrize("config", TINY, ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("dim", [4, 8, 12, 36, 64, 252, 256])
def test_every_dim_is_covered_by_lanes(dim: int, dtype: str, config: GatherConfig) -> None:
    case = make_case(make_slots((0, dim, False)), [dtype], samples=2, longest=5)
    assert relative_error(run_on_host(case, config, "float32"), case.expected()) < 1e-6


@pytest.mark.parametrize("config", [TURNS, *TINY], ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("longest", [0, 1, 2, 3, 4, 17])
def test_bags_shorter_and_longer_than_what_is_in_flight(longest: int, config: GatherConfig) -> None:
    slots = make_slots((0, 8, False), (0, 8, True), (0, 8, False))
    case = make_case(slots, ["float32"], samples=7, longest=longest)
    assert relative_error(run_on_host(case, config, "float32"), case.expected()) < 1e-6


def expecting(case: Case, ids: Sequence[float]) -> Case:
    """The case with slots that are laid out for so many ids, in turn."""
    slots = tuple(
        dataclasses.replace(slot, expected_ids=expected)
        for slot, expected in zip(case.slots, itertools.cycle(ids))
    )
    return dataclasses.replace(case, slots=slots)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("longest", [1, 9, 70])
@pytest.mark.parametrize("expected", [(0, 1, 2), (3, 5), (20, 50), (400,), (1, 100, 5, 30, 400)])
def test_bags_are_right_whatever_their_lengths_were_expected_to_be(
    expected: tuple[float, ...], longest: int, mix: str
) -> None:
    case = expecting(make_mix(mix, samples=3, longest=longest, weighted=True), expected)
    for warpgroups in (1, 8):  # few warps: enough bags for all; many: bags shared among warps
        config = dataclasses.replace(BAGS, warpgroups=warpgroups)
        assert relative_error(run_on_host(case, config, "float32"), case.expected()) < 1e-6


def shape_of(case: Case, config: GatherConfig) -> GatherShape:
    return GatherShape(
        samples=case.samples,
        slots=case.slots,
        rows=row_shapes(case),
        out_dtype="float32",
        weighted=case.weights is not None,
        config=config,
    )


@pytest.mark.parametrize("samples", [1, 7, 300, 20_000])
def test_bag_plan_has_every_slot_in_one_span(samples: int) -> None:
    slots = make_slots(*[(index % 3, 4 * (index % 3 + 1), False) for index in range(100)])
    case = make_case(slots, ["float32"] * 3, samples=1, longest=1)
    case = expecting(case, [1, 5, 2.5, 60, 1, 1, 200])
    plan = bag_plan(dataclasses.replace(shape_of(case, BAGS), samples=samples))
    spanned = [i for first, count in plan.spans for i in range(first, first + count)]
    assert sorted(spanned) == list(range(100)) == sorted(plan.slots[:, 0].tolist())
    for cls in plan.classes:
        own = plan.spans[cls.first_span : cls.first_span + cls.spans]
        for first, count in own:
            groups = {case.slots[slot].group for slot in plan.slots[first : first + count, 0]}
            assert groups == {cls.group}


@pytest.mark.parametrize(
    ("samples", "dims", "schedule", "rows_at_once"),
    [
        (1, (128, 128), "bags", 4),
        (8192, (128, 128), "streams", 4),
        (8192, (128, 4), "bags", 8),
        (8192, (4, 4), "bags", 4),
    ],
)
def test_schedule_follows_rows_and_load(
    samples: int, dims: tuple[int, int], schedule: str, rows_at_once: int
) -> None:
    slots = make_slots(*[(group, dim, False) for group, dim in enumerate(dims)])
    slots = tuple(dataclasses.replace(slot, expected_ids=100) for slot in slots)
    config = choose_config(samples, slots, tuple(RowShape(dim=d, dtype="bfloat16") for d in dims))
    assert (config.schedule, config.rows_at_once) == (schedule, rows_at_once)


def test_long_bags_are_shared_where_there_are_few() -> None:
    case = expecting(
        make_case(make_slots((0, 128, False)), ["bfloat16"], samples=1, longest=1), [100]
    )
    shape = shape_of(case, GatherConfig(schedule="bags"))
    (few,) = bag_plan(shape).classes
    (many,) = bag_plan(dataclasses.replace(shape, samples=8192)).classes
    assert (few.split, few.warps) == (2, 4)
    assert (many.split, many.warps) == (2, 1)


@pytest.mark.parametrize(("ids_per_stream", "split"), [(1, 8), (4, 2), (16, 1)])
def test_a_bag_has_as_many_streams_as_its_ids_are_worth(ids_per_stream: int, split: int) -> None:
    case = make_case(make_slots((0, 8, False)), ["bfloat16"], samples=1, longest=1)
    config = GatherConfig(schedule="bags", blocks=1, ids_per_stream=ids_per_stream)
    shape = dataclasses.replace(shape_of(expecting(case, [5]), config), samples=100_000)
    (cls,) = bag_plan(shape).classes
    assert cls.split == split


@pytest.mark.parametrize("slots_per_unit", [1, 2, 3, 5, None])
def test_units_cover_every_bag_once(slots_per_unit: int | None) -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=2, longest=3)
    config = dataclasses.replace(STREAMS, slots_per_unit=slots_per_unit)
    assert relative_error(run_on_host(case, config, "float32"), case.expected()) < 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("samples", [1, 3, 7])
@pytest.mark.parametrize("config", [TURNS, *TINY], ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
def test_claimed_units_give_the_bits_of_units_in_turn(
    config: GatherConfig, samples: int, mix: str
) -> None:
    case = expecting(make_mix(mix, samples=samples, longest=4, weighted=True), (1, 3, 2))
    config = dataclasses.replace(config, shares_bags=False, units_per_stream=4)
    claimed = run_on_host(case, config, "float32", claims=True)
    np.testing.assert_array_equal(claimed, run_on_host(case, config, "float32"))
    assert relative_error(claimed, case.expected()) < 1e-6


@pytest.mark.parametrize("config", TINY, ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("left", [4, 8, 12])
def test_columns_on_the_left_are_left_alone(left: int, config: GatherConfig) -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=3, longest=4)
    out = run_on_host(case, config, "bfloat16", left=left)
    assert np.isnan(out[:, :left].astype(np.float32)).all()
    assert relative_error(out[:, left:], case.expected()) < RELATIVE_ERROR["bfloat16"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("config", TINY, ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("right", [4, 60])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_columns_on_the_right_are_zero(out_dtype: str, right: int, config: GatherConfig) -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=11, longest=4)
    out = run_on_host(case, config, out_dtype, left=4, right=right)
    assert not out[:, -right:].any()
    assert relative_error(out[:, 4:-right], case.expected()) < RELATIVE_ERROR[out_dtype]


@pytest.mark.parametrize("config", TINY, ids=lambda c: f"{c.schedule}{c.rows_per_turn}")
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_byte_is_dequantised(dtype: str, config: GatherConfig) -> None:
    """All 256 of int8, all but the two NaNs of e4m3; subnormals and -128 among them."""
    everything = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    finite = everything[np.isfinite(everything.astype(np.float32))]
    values = np.resize(finite, (64, 4))
    table = QuantisedTable(values=values, scales=np.full(64, 0.75, np.float32))
    rows, offsets = np.arange(64, dtype=np.int32), np.arange(65, dtype=np.int32)
    slots = make_slots((0, 4, False))
    case = Case(groups=[table], rows=rows, offsets=offsets, weights=None, slots=slots)
    out = run_on_host(case, config, "float32")
    np.testing.assert_array_equal(out, values.astype(np.float32) * np.float32(0.75))


@pytest.mark.parametrize("mix", MIXES)
def test_reference_agrees_with_the_bag_by_bag_sum(mix: str) -> None:
    case = make_mix(mix, samples=5, longest=6, weighted=True)
    out = reference.pooled_gather(
        jax.tree.map(jnp.asarray, case.groups), jnp.asarray(case.rows), jnp.asarray(case.offsets),
        jnp.asarray(case.weights), slots=case.slots, out_dtype=jnp.float32,
    )  # fmt: skip
    assert relative_error(np.asarray(out), case.expected()) < 1e-6


def test_reference_puts_the_left_columns_first() -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=5, longest=6)
    left = jnp.arange(15.0).reshape(5, 3)
    out = reference.pooled_gather(
        [jnp.asarray(g) for g in case.groups], jnp.asarray(case.rows), jnp.asarray(case.offsets),
        None, slots=case.slots, out_dtype=jnp.float32, left=left,
    )  # fmt: skip
    np.testing.assert_array_equal(out[:, :3], left)
    assert relative_error(np.asarray(out[:, 3:]), case.expected()) < 1e-6


def test_reference_puts_zeros_on_the_right() -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=5, longest=6)
    out = reference.pooled_gather(
        [jnp.asarray(g) for g in case.groups], jnp.asarray(case.rows), jnp.asarray(case.offsets),
        None, slots=case.slots, out_dtype=jnp.float32, right=7,
    )  # fmt: skip
    assert not np.asarray(out[:, -7:]).any()
    assert relative_error(np.asarray(out[:, :-7]), case.expected()) < 1e-6


def shapes_of(case: Case) -> tuple[list[jax.ShapeDtypeStruct], ...]:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        (case.groups, case.rows, case.offsets, case.weights),
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_lowers_to_cuda(config: GatherConfig, mix: str, weighted: bool) -> None:
    case = make_mix(mix, samples=9, longest=3, weighted=weighted)
    gather = functools.partial(
        pooled_gather, slots=case.slots, out_dtype=jnp.bfloat16, config=config
    )
    lowered = jax.jit(gather).trace(*shapes_of(case)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring_rows": 1}, "ring_rows is 1, below 2"),
        ({"blocks": 0}, "blocks is 0, below 1"),
        ({"warpgroups": 8, "ring_rows": 16}, "a ring of 327680 bytes is more than 232448"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatherConfig(**change)


def test_operands_that_do_not_fit_are_refused() -> None:
    groups = [jnp.zeros((5, 6), jnp.float32)]
    slots = make_slots((0, 6, False))
    ids, offsets = jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"group 0 is float32\[rows, 6\]"):
        pooled_gather(groups, ids, offsets, None, slots=slots, out_dtype=jnp.float32)
    with pytest.raises(ValueError, match="slot 0 is"):
        pooled_gather([jnp.zeros((5, 8))], ids, offsets, None, slots=slots, out_dtype=jnp.float32)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (np.zeros((5, 8), np.int8), r"group 0 is int8\[rows, 8\]: not"),
        (
            QuantisedTable(values=np.zeros((5, 8), np.float32), scales=np.zeros(5, np.float32)),
            r"group 0 is quantised float32\[rows, 8\]: not",
        ),
        (
            QuantisedTable(values=np.zeros((5, 8), np.int8), scales=np.zeros(4, np.float32)),
            r"group 0: scales are float32\[4\], not float32\[5\]",
        ),
        (
            QuantisedTable(values=np.zeros((5, 8), np.int8), scales=np.zeros(5, np.float16)),
            r"group 0: scales are float16\[5\], not float32\[5\]",
        ),
    ],
)
def test_tables_without_their_scales_are_refused(group: Any, message: str) -> None:
    groups = [jax.tree.map(jnp.asarray, group)]
    ids, offsets = jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        pooled_gather(
            *(groups, ids, offsets, None),
            slots=make_slots((0, 8, False)),
            out_dtype=jnp.float32,
        )


def test_weights_and_scales_need_a_ring_each() -> None:
    """A ring that is as large as it may be with one of them does not fit with both."""
    largest = GatherConfig(warpgroups=4, ring_rows=22)
    assert largest.ring_bytes(1) <= 227 * 1024 < largest.ring_bytes(2)
    for mix, weighted in itertools.product(MIXES, [False, True]):
        case = make_mix(mix, samples=1, longest=1, weighted=weighted)
        make_shape = functools.partial(
            GatherShape, samples=1, slots=case.slots, rows=row_shapes(case),
            out_dtype="float32", weighted=weighted, config=largest,
        )  # fmt: skip
        if mix == "quantised" and weighted:
            with pytest.raises(ValueError, match="a ring of 270336 bytes is more than 232448"):
                make_shape()
        else:
            assert make_shape().factors == int(mix == "quantised") + int(weighted)


def check_on_gpu(
    case: Case, out_dtype: str, config: GatherConfig | None = None, limit: float | None = None
) -> None:
    gather = jax.jit(
        functools.partial(pooled_gather, slots=case.slots, out_dtype=out_dtype, config=config)
    )
    out = np.asarray(gather(case.groups, case.rows, case.offsets, case.weights))
    expected = case.expected()
    assert np.isfinite(out.astype(np.float32)).all()
    assert relative_error(out, expected) < (limit or RELATIVE_ERROR[out_dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_gpu_mixed_tables(out_dtype: str, weighted: bool, config: GatherConfig, mix: str) -> None:
    case = make_mix(mix, samples=99, longest=40, weighted=weighted)
    check_on_gpu(case, out_dtype, config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
def test_gpu_every_byte_is_dequantised(dtype: str) -> None:
    everything = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    values = np.resize(everything[np.isfinite(everything.astype(np.float32))], (64, 4))
    table = QuantisedTable(values=values, scales=np.full(64, 0.75, np.float32))
    gather = functools.partial(
        pooled_gather, slots=make_slots((0, 4, False)), out_dtype=jnp.float32
    )
    rows, offsets = np.arange(64, dtype=np.int32), np.arange(65, dtype=np.int32)
    out = jax.jit(gather)([table], rows, offsets, None)
    np.testing.assert_array_equal(out, values.astype(np.float32) * np.float32(0.75))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20, 32, 64, 100, 128, 192, 252, 256])
def test_gpu_every_dim(dim: int, dtype: str) -> None:
    slots = make_slots(*[(0, dim, False)] * 19)
    check_on_gpu(make_case(slots, [dtype], samples=257, longest=9, table_rows=10_000), "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1, 7])
def test_gpu_few_samples(samples: int) -> None:
    check_on_gpu(make_case(MIXED, MIXED_DTYPES, samples=samples, longest=5), "float32")


@pytest.mark.gpu
def test_gpu_all_bags_empty() -> None:
    check_on_gpu(make_case(MIXED, MIXED_DTYPES, samples=500, longest=0), "float32")


@pytest.mark.gpu
def test_gpu_all_ids_the_same() -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=300, longest=9)
    check_on_gpu(dataclasses.replace(case, rows=np.full_like(case.rows, 49)), "float32")


@pytest.mark.gpu
def test_gpu_skewed_ids() -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=300, longest=9, table_rows=5000)
    skewed = np.random.default_rng(1).zipf(1.2, len(case.rows)) % 5000
    check_on_gpu(dataclasses.replace(case, rows=skewed.astype(np.int32)), "float32")


@pytest.mark.gpu
def test_gpu_bag_of_ten_thousand() -> None:
    case = make_case(make_slots((0, 128, False)), ["bfloat16"], samples=3, longest=3)
    rng = np.random.default_rng(2)
    offsets = np.array([0, 2, 10_002, 10_003], np.int32)
    rows = rng.integers(0, 50, 10_003).astype(np.int32)
    # One stream adds the rows in sequence: the rounding errors of 10,000 additions.
    check_on_gpu(dataclasses.replace(case, rows=rows, offsets=offsets), "float32", limit=5e-6)


@pytest.mark.gpu
def test_gpu_last_row_of_a_table_of_more_than_2_to_the_31_elements() -> None:
    """17 M rows x 128: the last row lies behind 2^31 elements and 2^32 bytes."""
    rows, dim = 17_000_000, 128
    table = jax.jit(
        lambda: (jnp.arange(rows, dtype=jnp.int32)[:, None] % 251 + jnp.zeros((1, dim), jnp.int32))
        .astype(jnp.bfloat16)
    )()  # fmt: skip
    ids = np.array([rows - 1, 0, rows - 2, 2**31 // dim], np.int32)
    offsets = np.arange(len(ids) + 1, dtype=np.int32)
    slots = make_slots((0, dim, False))
    out = pooled_gather(
        [table], jnp.asarray(ids), jnp.asarray(offsets), None, slots=slots, out_dtype=jnp.float32
    )
    np.testing.assert_array_equal(np.asarray(out), np.repeat(ids[:, None] % 251, dim, 1))


@pytest.mark.gpu
def test_gpu_same_bits_twice() -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=200, longest=30)
    gather = jax.jit(functools.partial(pooled_gather, slots=case.slots, out_dtype=jnp.float32))
    first = np.asarray(gather(case.groups, case.rows, case.offsets, None))
    again = np.asarray(gather(case.groups, case.rows, case.offsets, None))
    np.testing.assert_array_equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("left", [3, 4, 128])
def test_gpu_columns_on_the_left(left: int) -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=200, longest=9)
    columns = jnp.arange(200.0 * left).reshape(200, left)
    gather = functools.partial(pooled_gather, slots=case.slots, out_dtype=jnp.float32)
    out = jax.jit(gather)(case.groups, case.rows, case.offsets, None, left=columns)
    np.testing.assert_array_equal(out[:, :left], columns)
    assert relative_error(np.asarray(out[:, left:]), case.expected()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("right", [3, 4, 24])
def test_gpu_columns_on_the_right(right: int, config: GatherConfig | None) -> None:
    case = make_case(MIXED, MIXED_DTYPES, samples=200, longest=9)
    gather = functools.partial(
        pooled_gather, slots=case.slots, out_dtype=jnp.float32, right=right, config=config
    )
    out = np.asarray(jax.jit(gather)(case.groups, case.rows, case.offsets, None))
    assert not out[:, -right:].any()
    assert relative_error(out[:, :-right], case.expected()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("columns", [(0, 0), (4, 8), (3, 4)])
def test_gpu_some_samples_land_in_an_array(
    columns: tuple[int, int], config: GatherConfig | None
) -> None:
    """In place where columns allow it; the rest of the array stays."""
    case = make_case(MIXED, MIXED_DTYPES, samples=200, longest=9)
    left, right = columns
    shape = (300, left + width(case.slots) + right)
    vectors = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    options = {"slots": case.slots, "left": left, "span": (20, 100), "config": config}
    gather = functools.partial(gather_into, **options)
    operands = (jnp.int32(130), case.groups, case.rows, case.offsets, None)
    landed = np.array(jax.jit(gather)(vectors, *operands))
    own = landed[150:250, left : left + width(case.slots)]
    assert relative_error(own, case.expected()[20:120]) < 1e-6
    own[:] = vectors[150:250, left : left + width(case.slots)]
    assert not landed[150:250, shape[1] - right :].any()
    landed[150:250, shape[1] - right :] = vectors[150:250, shape[1] - right :]
    np.testing.assert_array_equal(landed, vectors)


@pytest.mark.gpu
@pytest.mark.parametrize("expected", [(0, 1, 2), (20, 50), (1, 100, 5, 30, 400)])
@pytest.mark.parametrize("samples", [3, 3000])
def test_gpu_bags_of_other_lengths_than_expected(samples: int, expected: tuple[float, ...]) -> None:
    case = expecting(make_mix("quantised", samples=samples, longest=60, weighted=True), expected)
    for rows_at_once in (4, 8):
        config = GatherConfig(schedule="bags", warpgroups=4, rows_at_once=rows_at_once)
        check_on_gpu(case, "float32", config, limit=2e-6)
