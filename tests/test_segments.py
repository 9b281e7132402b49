"""The compiled pieces of a model give the reference forward, wherever slices land."""

import dataclasses
import functools
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

from recflow_jax.backend import choose_backend
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from recflow_jax.engine import stages
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.model import REFERENCE, Params, forward, pool
from scheduling.request import CoRun, SegmentShape, whole_batches
from small_models import (
    BF16,
    CONCAT,
    DCN,
    DEEP_DCN,
    DOT,
    FLOAT32_MODELS,
    FP8,
    FP16,
    INT8,
    NO_SPARSE,
    SMALL,
    assert_same_scores,
    compiled,
    device_batch,
    params_of,
    reference_scores,
)

ONE_SIZE = dataclasses.replace(SMALL, smallest_batch=16, smallest_slice=8)


def run_batch(segments: Segments, batch, cuts, bucket: int) -> np.ndarray:
    """All samples in slices [cuts[i], cuts[i + 1]), through every segment."""
    state = segments.new_state()
    for start, stop in pairwise(cuts):
        fitting = next(b for b in segments.slice_buckets if b.samples >= stop - start)
        samples = segments.preparer.prepare(batch.part(start, stop))
        packed = segments.staging.pack(fitting, start, [samples])
        state = segments.embed(state, packed.array)
    first, *later = SegmentShape.all_of(segments.count, bucket)
    x, _ = segments.start(first, state)
    for shape in later:
        x = segments.run(shape, x)
    return np.asarray(x)[: batch.samples]


@pytest.mark.parametrize("config", [*FLOAT32_MODELS, BF16, FP16, INT8, FP8], ids=lambda c: c.name)
def test_scores_are_the_reference(config: DLRMConfig):
    segments, batch = compiled(config), generate(config, 7, seed=0)
    found = run_batch(segments, batch, (0, 7), 16)
    assert found.dtype == np.float32
    assert_same_scores(config, found, reference_scores(config, params_of(config), batch))


@pytest.mark.parametrize("config", [*FLOAT32_MODELS, BF16, FP16, INT8, FP8], ids=lambda c: c.name)
def test_whole_batches_are_the_reference(config: DLRMConfig):
    segments, batch = compiled(config, ONE_SIZE), generate(config, 7, seed=0)
    (cell,) = whole_batches((8,), segments.slice_buckets)
    segments.compile_all(progress=False, cuts=(), co_runs=[cell])
    samples = segments.preparer.prepare(batch)
    found = segments.run_whole(cell, segments.staging.pack(cell.slice, 0, [samples]).array)
    assert (found.shape, found.dtype) == ((8, config.outputs), np.float32)
    expected = reference_scores(config, params_of(config), batch)
    assert_same_scores(config, np.asarray(found)[:7], expected)


@pytest.mark.parametrize("config", FLOAT32_MODELS, ids=lambda c: c.name)
def test_scores_are_the_same_with_zero_columns_for_the_kernels(config: DLRMConfig):
    """Only where the pooled rows go into the top MLP as they are."""
    hopper = SimpleNamespace(platform="gpu", device_kind="Test", compute_capability="9.0")
    dense = choose_backend("auto", hopper).ops.dense  # float32 layers of which XLA computes
    ops = dataclasses.replace(REFERENCE, dense=dense, dense_columns=64)
    backend = dataclasses.replace(choose_backend("xla"), ops=ops)
    params, batch = params_of(config), generate(config, 7, seed=0)
    segments = Segments(config, params, backend, ONE_SIZE)
    segments.compile_all(progress=False)
    behind = segments.new_state().vectors.shape[1] - config.bottom_width - config.pooled_width
    assert (behind > 0) == (config.interaction == "concat")
    pooled = partial(pool, config=config, layout=segments.layout, ops=ops)
    width = jax.eval_shape(pooled, params.groups, device_batch(config, batch)).shape[1]
    assert width == config.pooled_width + (behind if config.features else 0)
    expected = reference_scores(config, params, batch)
    assert_same_scores(config, run_batch(segments, batch, (0, 7), 16), expected)
    whole = partial(forward, config=config, layout=segments.layout, ops=ops)
    exact = jax.jit(partial(whole, precision=lax.Precision.HIGHEST))
    assert_same_scores(config, np.asarray(exact(params, device_batch(config, batch))), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_any_number_of_segments_gives_the_same_scores(count: int):
    segments = compiled(DCN, dataclasses.replace(ONE_SIZE, segments=count))
    assert segments.count == min(count, 1 + len(DCN.top_mlp))
    batch = generate(DCN, 7, seed=0)
    expected = reference_scores(DCN, params_of(DCN), batch)
    assert_same_scores(DCN, run_batch(segments, batch, (0, 7), 16), expected)


@pytest.mark.parametrize(
    ("config", "count", "chained"),
    [(CONCAT, 1, 0), (DOT, 1, 0), (BF16, 3, 0), (INT8, 1, 0), (CONCAT, 1, 2), (BF16, 3, 2)],
    ids=lambda c: str(c)[:20],
)
def test_a_co_run_is_a_segment_and_a_slice(config: DLRMConfig, count: int, chained: int):
    """Batch 0 runs while batch 1 comes in, beside each of its segments in turn, by every ride."""
    segments = riding(config, dataclasses.replace(SMALL, segments=count), chained)
    bucket = segments.slice_buckets[-1]
    batches = [generate(config, 8, seed=seed) for seed in range(2)]
    samples = [segments.preparer.prepare(batch) for batch in batches]
    packed = [segments.staging.pack(bucket, 4, [s]).array.copy() for s in samples]
    expected = [run_batch(segments, batch, (0, 8), 16) for batch in batches]
    assert [str(ride) for ride in segments.rides] == ["in-turn", "plain/one", "plain/all"]
    for ride in segments.rides:
        for beside in range(count):
            state, other = (segments.embed(segments.new_state(), p) for p in (packed[0], packed[0]))
            x: Any = None
            for shape in SegmentShape.all_of(count, 16):
                cell = CoRun(segment=shape, slice=bucket, config=str(ride))
                if shape.index == beside == 0:
                    x, _, other = segments.start_with(cell, state, other, packed[1])
                elif shape.index == beside:
                    x, other = segments.run_with(cell, x, other, packed[1])
                elif shape.index == 0:
                    x, _ = segments.start(shape, state)
                else:
                    x = segments.run(shape, x)
            np.testing.assert_array_equal(np.asarray(x)[4:12], expected[0])
            assert np.asarray(other.landed).all()
            first, *later = SegmentShape.all_of(count, 16)
            x, _ = segments.start(first, other)
            for shape in later:
                x = segments.run(shape, x)
            np.testing.assert_array_equal(np.asarray(x)[4:12], expected[1])


@pytest.mark.parametrize("count", [1, 3])
def test_scores_land_where_the_host_has_a_place_for_them(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    """Those of each kind of executable, and nothing else."""
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    monkeypatch.setattr(stages, "host_place", lambda: place)
    segments = riding.__wrapped__(CONCAT, dataclasses.replace(SMALL, segments=count))
    (whole,), (bucket,) = whole_batches((8,), segments.slice_buckets), segments.slice_buckets
    segments.compile_all(progress=False, cuts=(), co_runs=[whole])
    samples = segments.preparer.prepare(generate(CONCAT, 8, seed=0))
    packed = segments.staging.pack(bucket, 0, [samples]).array
    state = segments.embed(segments.new_state(), packed)
    assert kind(segments.run_whole(whole, packed)) == "pinned_host"
    assert kind(state.landed) == "device"
    first, *later = SegmentShape.all_of(count, 16)
    x, state = segments.start(first, state)
    kinds = [kind(x)]
    for shape in later:
        x = segments.run(shape, x)
        kinds.append(kind(x))
    assert kinds == ["device"] * (count - 1) + ["pinned_host"]
    assert kind(state.vectors) == "device"
    cell = CoRun(segment=first, slice=bucket, config=str(segments.rides[0]))
    x, state, other = segments.start_with(cell, state, segments.new_state(), packed)
    assert kind(x) == kinds[0]
    assert kind(state.vectors) == kind(other.vectors) == "device"


def kind(x: Any) -> str:
    return x.sharding.memory_kind


@functools.cache
def riding(config: DLRMConfig, options: EngineOptions, chained: int = 0) -> Segments:
    """Segments with all co-runs of the largest sizes, by a kernel that is none; the last `chained`
    layers of each MLP in one launch.
    """
    backend = choose_backend("xla")
    ops = dataclasses.replace(
        backend.ops,
        corun_configs=("plain",),
        chain_from=lambda _, kernels, __: max(0, len(kernels) - chained),
    )
    options = dataclasses.replace(options, smallest_batch=16, smallest_slice=8)
    backend = dataclasses.replace(backend, ops=ops)
    segments = Segments(config, params_of(config), backend, options)
    shapes = SegmentShape.all_of(segments.count, 16)
    (bucket,) = segments.slice_buckets
    cells = [
        CoRun(segment=shape, slice=bucket, config=str(ride))
        for shape in shapes
        for ride in segments.rides
    ]
    segments.compile_all(progress=False, co_runs=cells)
    return segments


@pytest.mark.parametrize("chained", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [1, 3])
def test_layers_with_launches_of_their_own_are_known(count: int, chained: int):
    """As many as are traced: rides count them."""
    launched: list[Any] = []

    def dense(*operands: Any, **options: Any) -> Any:
        launched.append(operands[1].shape)
        return REFERENCE.dense(*operands, **options)

    backend = choose_backend("xla")
    ops = dataclasses.replace(
        backend.ops,
        dense=dense,
        chain_from=lambda _, kernels, __: max(0, len(kernels) - chained),
    )
    options = dataclasses.replace(SMALL, segments=count)
    backend = dataclasses.replace(backend, ops=ops)
    segments = Segments(DEEP_DCN, params_of(DEEP_DCN), backend, options)
    shapes = [job.key for job in segments.stages.segment_jobs(count, 16)]
    assert launched == [own for shape in shapes for own in segments.stages.dense_layers(shape)]
    assert len(launched) == {0: 7, 1: 5, 2: 3, 9: 2}[chained] or count > 1


def test_what_has_no_embeddings_takes_no_riders():
    assert compiled(NO_SPARSE).rides == ()


def test_slices_land_where_they_are_told():
    segments, batch = compiled(CONCAT), generate(CONCAT, 15, seed=0)
    at_once = run_batch(segments, batch, (0, 8, 15), 16)
    in_pieces = run_batch(segments, batch, (0, 1, 3, 8, 15), 16)
    np.testing.assert_array_equal(at_once, in_pieces)
    assert_same_scores(CONCAT, at_once, reference_scores(CONCAT, params_of(CONCAT), batch))


def test_a_state_is_used_up_by_the_next_slice():
    """The buffers are donated, so a slice writes in place."""
    segments, batch = compiled(CONCAT), generate(CONCAT, 1, seed=0)
    state = segments.new_state()
    samples = segments.preparer.prepare(batch)
    packed = segments.staging.pack(segments.slice_buckets[0], 0, [samples])
    later = segments.embed(state, packed.array)
    assert state.vectors.is_deleted() and not later.vectors.is_deleted()
    assert later.vectors.shape == (16, CONCAT.bottom_width + CONCAT.pooled_width)


def test_top_layers_are_shared_out_by_flop():
    """Layers of 100, 100, 100, 1 thousand FLOP: the small one does not get a segment of its own."""
    config = DLRMConfig(
        name="even",
        tables=(),
        features=(),
        dense_width=100,
        top_mlp=(1000, 100, 1000, 1),
    )
    shapes = jax.eval_shape(lambda: params_of(config))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    segments = Segments(
        config, zeros, choose_backend("xla"), dataclasses.replace(SMALL, segments=4)
    )
    layers = [segments.stages.dense_layers(shape) for shape in SegmentShape.all_of(4, 8)]
    # The last layer of all, which gives the scores, is no dense layer of the kernels.
    assert layers == [[], [(100, 1000)], [(1000, 100)], [(100, 1000)]]


def test_float32_runs_in_full_precision():
    """Not only here, where it makes no difference, but on devices that round operands."""
    segments = Segments(DOT, params_of(DOT), choose_backend("xla"), SMALL)
    for job in segments._jobs({segments.count})[-segments.count :]:
        dots = [line for line in str(job.function.trace(*job.arguments).jaxpr).split("\n")]
        dots = [line for line in dots if "precision=" in line]
        assert dots and all("HIGHEST" in line for line in dots), dots


def test_nothing_compiles_before_it_is_asked_for():
    segments = Segments(DOT, params_of(DOT), choose_backend("xla"), SMALL)
    assert not segments._executables


def test_numpy_parameters_are_moved_to_the_device_once():
    host = jax.tree.map(np.asarray, params_of(DOT))
    segments = Segments(DOT, host, choose_backend("xla"), SMALL)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(segments.tables.groups))


def test_largest_sample_is_told_or_what_the_largest_slice_holds():
    backend, params = choose_backend("xla"), params_of(DOT)
    told = dataclasses.replace(SMALL, max_ids_per_sample=700)
    assert Segments(DOT, params, backend, told).max_ids_per_sample == 700
    segments = Segments(DOT, params, backend, SMALL)
    assert segments.max_ids_per_sample == segments.slice_buckets[-1].ids


def _without_bottom(params: Params) -> Params:
    return dataclasses.replace(params, bottom=())


def _of_another_width(params: Params) -> Params:
    kernel = jnp.zeros((4, 8))
    return dataclasses.replace(
        params, bottom=(dataclasses.replace(params.bottom[0], kernel=kernel),)
    )


def _of_another_dtype(params: Params) -> Params:
    return dataclasses.replace(params, groups=(params.groups[0].astype(jnp.float16),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_bottom, r"bottom\[0\].kernel is missing, .* it is \[5, 8\]"),
        (_of_another_width, r"bottom\[0\].kernel is \[4, 8\], .* it is \[5, 8\]"),
        (_of_another_dtype, r"groups\[0\] is float16\[81, 8\], .* it is float32\[81, 8\]"),
    ],
)
def test_parameters_of_another_model_are_named(change, message: str):
    config = dataclasses.replace(DOT, tables=DOT.tables[:2])
    with pytest.raises(ValueError, match=message):
        Segments(config, change(params_of(config)), choose_backend("xla"), SMALL)


def test_float_tables_are_not_taken_for_quantised_ones():
    config = DOT.with_dtypes(tables="int8")
    text = r"int8\[81, 8\] with scales float32\[81\]"
    with pytest.raises(ValueError, match=rf"groups\[0\] is float32\[81, 8\], .* it is {text}"):
        Segments(config, params_of(DOT), choose_backend("xla"), SMALL)
    with pytest.raises(ValueError, match=rf"groups\[0\] is {text}, .* it is float32\[81, 8\]"):
        Segments(DOT, params_of(config), choose_backend("xla"), SMALL)
