"""The co-run kernel: what it multiplies interpreted on the CPU, lowered for CUDA, and on a GPU the
bits of the serial kernels.
"""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import corun
from pallas_kernels.corun import CONFIG, CONFIGS, REGIONS, CorunConfig, dense_with_gather
from pallas_kernels.embedding import pooled_gather
from pallas_kernels.gather_shape import GatherConfig
from pallas_kernels.mlp import MlpConfig, dense
from pallas_kernels.slots import width
from test_embedding import MIXES, Case, make_case, make_mix, make_slots
from test_mlp import RELATIVE_ERROR, float8_operands, operands, relative_error

WITHOUT_HELP = dataclasses.replace(CONFIG, helps=False)
SMALL_TILES = CorunConfig(
    mlp=MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=6, splits=3),
    gather=dataclasses.replace(CONFIG.gather, warpgroups=1),
)
LEFT = 8
TRIED = [*CONFIGS.values(), WITHOUT_HELP, SMALL_TILES]


def beside(case: Case, config: CorunConfig, **options: Any) -> Any:
    """A relu layer beside the gather, of x, kernel, bias, vectors, first row, groups, rows, offsets
    and weights; LEFT columns stay.
    """
    options |= {"slots": case.slots, "left": LEFT, "config": config}
    return functools.partial(dense_with_gather, activation="relu", **options)


def room_for(case: Case, rows: int | None = None) -> tuple[Any, Any]:
    """`rows` rows (None: as many as samples) of ones, with 4 columns behind the pooled ones, and
    the first to be written.
    """
    shape = (rows or case.samples, LEFT + width(case.slots) + 4)
    return jnp.ones(shape, jnp.bfloat16), jnp.int32(0)


def on_device(case: Case) -> tuple[Any, ...]:
    return jax.tree.map(jnp.asarray, (case.groups, case.rows, case.offsets, case.weights))


@pytest.mark.parametrize("helps", [False, True])
def test_interpreted_layer_beside_a_gather_equals_the_reference(
    helps: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The interpreter knows no per-thread code: the gather is left out, its barrier is not."""
    calls: list[int] = []
    monkeypatch.setattr(corun, "gather_claimed", lambda *_, first_role: calls.append(first_role))
    monkeypatch.setattr(corun.jax, "new_ref", lambda array: array)
    monkeypatch.setattr(corun.jax, "freeze", lambda array: array)
    case = make_case(make_slots((0, 8, False)), ["float32"], samples=2, longest=2)
    x, kernel, bias = operands(130, 100, 70)
    config = CorunConfig(
        mlp=MlpConfig(block_m=128, block_n=64, stages=2, blocks=2),
        gather=dataclasses.replace(CONFIG.gather, blocks=2),
        helps=helps,
    )
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out, pooled = beside(case, config)(x, kernel, bias, *room_for(case), *on_device(case))
    assert relative_error(out, x, kernel, bias) < RELATIVE_ERROR["bfloat16"]
    assert pooled.shape == (2, 20)
    assert set(calls) == ({0, 3} if helps else {3})
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("config", TRIED, ids=str)
def test_every_config_lowers_to_cuda(config: CorunConfig, mix: str) -> None:
    case = make_mix(mix, samples=9, longest=3)
    if config.gather.schedule == "streams":
        smaller = dataclasses.replace(config.mlp, stages=3)  # leaves room for scales
        config = dataclasses.replace(config, mlp=smaller)
    arrays = (*operands(99, 200, 130), *room_for(case), *on_device(case))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    lowered = jax.jit(beside(case, config)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_traced_launch_records_its_regions_and_has_room_for_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are at most 3 of 128 x 256, 5 of 128 x 128 per block."""
    specs: list[profiler.ProfilerSpec] = []
    regions: list[str] = []
    initialise, intern = profiler.ProfilerSpec.__init__, profiler.ProfilerSpec.intern_name

    def noted(self: profiler.ProfilerSpec, *args: Any, **options: Any) -> None:
        specs.append(self)
        initialise(self, *args, **options)

    def noted_name(self: profiler.ProfilerSpec, region: str) -> int:
        regions.append(region)
        return intern(self, region)

    monkeypatch.setattr(profiler.ProfilerSpec, "__init__", noted)
    monkeypatch.setattr(profiler.ProfilerSpec, "intern_name", noted_name)
    # The host's part, which writes the file, is lowered for the devices that are there alone.
    monkeypatch.setattr(jax.debug, "callback", lambda *_: None)
    case = make_mix("floats", samples=9, longest=3)
    arrays = (*operands(10_000, 99, 1024), *room_for(case), *on_device(case))
    traced = beside(case, CONFIGS[name], trace_dir=str(tmp_path))
    jax.jit(traced).trace(*arrays).lower(lowering_platforms=("cuda",))
    tiles = {256: 3, 128: 5}[CONFIGS[name].mlp.block_n]
    assert regions == ["Init", *REGIONS]
    assert [(s.dump_path, s.entries_per_warpgroup) for s in specs] == [
        (str(tmp_path), 4 * (tiles + 2) + 4)
    ]


@pytest.mark.parametrize("name", ["deep", "narrow", "bags"])
def test_float8_layers_beside_a_gather_lower_to_cuda(name: str) -> None:
    case = make_mix("floats", samples=9, longest=3)
    arrays = (*float8_operands(99, 200, 130), *room_for(case), *on_device(case))
    run = beside(case, CONFIGS[name], out_scale=0.01)
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_claims_are_counted_in_memory_that_xla_knows_to_change() -> None:
    """A constant that the kernel counts in would still have the counts of the call before."""
    case = make_mix("floats", samples=9, longest=3)
    arrays = (*operands(99, 200, 130), *room_for(case), *on_device(case))
    lowered = jax.jit(beside(case, CONFIG)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("output_operand_alias<output_tuple_indices") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": MlpConfig(blocks=8, stages=2)}, "as many blocks multiply as gather"),
        ({"gather": GatherConfig(warpgroups=2, ring_rows=4)}, "share no bags"),
        ({"multiply_registers": 232}, "616 registers, above 480"),
        ({"gather": dataclasses.replace(CONFIG.gather, ring_rows=8)}, "bytes of SMEM"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_rings_that_do_not_fit_are_refused() -> None:
    case = make_mix("quantised", samples=2, longest=2, weighted=True)
    with pytest.raises(ValueError, match="bytes of SMEM, above"):
        beside(case, CONFIG)(*operands(64, 64, 64), *room_for(case), *on_device(case))
    plain = make_mix("floats", samples=2, longest=2)
    tiny = MlpConfig(block_m=64, block_n=64, warpgroups=1, stages=2)
    deep = dataclasses.replace(CONFIG.gather, warpgroups=1, ring_rows=32)
    with pytest.raises(ValueError, match="helpers' rings of 65536 bytes, above 16384"):
        beside(plain, CorunConfig(mlp=tiny, gather=deep))(
            *operands(9, 64, 64), *room_for(plain), *on_device(plain)
        )


def test_a_batch_without_samples_is_refused() -> None:
    case = make_mix("floats", samples=2, longest=2)
    with pytest.raises(ValueError, match="0 samples to multiply, 2 to gather"):
        beside(case, CONFIG)(*operands(0, 64, 64), *room_for(case), *on_device(case))


def test_columns_that_break_the_alignment_of_stores_are_refused() -> None:
    case = make_mix("floats", samples=2, longest=2)
    vectors = jnp.ones((2, LEFT + width(case.slots) + 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="no gather writes behind 8 columns and before 3"):
        beside(case, CONFIG)(*operands(9, 64, 64), vectors, jnp.int32(0), *on_device(case))


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("m", [70, 4096])
@pytest.mark.parametrize("config", TRIED, ids=str)
def test_gpu_bits_are_those_of_the_serial_kernels(
    config: CorunConfig, m: int, mix: str, weighted: bool
) -> None:
    """Call after call, with other bags each time, of a span of the samples."""
    if config.gather.schedule == "streams":
        config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, stages=3))
    x, kernel, bias = operands(m, 480, 320)
    first = make_mix(mix, samples=700, longest=40, weighted=weighted)
    co_run = jax.jit(beside(first, config, span=(50, 600)))
    layer = jax.jit(functools.partial(dense, activation="relu", config=config.mlp))
    gather = jax.jit(
        functools.partial(
            pooled_gather,
            slots=first.slots,
            out_dtype=jnp.bfloat16,
            left=jnp.ones((700, LEFT), jnp.bfloat16),
            right=4,
            config=config.gather,
        )
    )
    vectors, _ = room_for(first, rows=900)
    for seed in range(3):
        case = make_mix(mix, samples=700, longest=40, weighted=weighted, seed=seed)
        out, found = co_run(x, kernel, bias, vectors, jnp.int32(100), *on_device(case))
        for ours, serial in [
            (out, layer(x, kernel, bias)),
            (found, vectors.at[150:750].set(gather(*on_device(case))[50:650])),
        ]:
            np.testing.assert_array_equal(
                np.asarray(ours, np.float32), np.asarray(serial, np.float32)
            )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_gpu_float8_bits_are_those_of_the_serial_kernels(name: str) -> None:
    case, config = make_mix("floats", samples=700, longest=40), CONFIGS[name]
    layer = {"activation": "relu", "out_scale": 0.01}
    arrays = float8_operands(4096, 480, 320)
    gather = functools.partial(
        pooled_gather, slots=case.slots, out_dtype=jnp.bfloat16, config=config.gather
    )
    vectors, first = room_for(case)
    co_run = jax.jit(beside(case, config, out_scale=0.01))
    out, found = co_run(*arrays, vectors, first, *on_device(case))
    serial = jax.jit(functools.partial(dense, config=config.mlp, **layer))(*arrays)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(serial, np.float32))
    pooled = jax.jit(gather)(*on_device(case))
    np.testing.assert_array_equal(
        np.asarray(found[:, LEFT:-4], np.float32), np.asarray(pooled, np.float32)
    )


@pytest.mark.gpu
def test_gpu_a_traced_launch_has_the_same_bits_and_a_region_per_tile(tmp_path: Path) -> None:
    case = make_mix("floats", samples=700, longest=40)
    arrays = (*operands(4096, 480, 1024), *room_for(case), *on_device(case))
    expected = jax.jit(beside(case, CONFIG))(*arrays)
    found = jax.jit(beside(case, CONFIG, trace_dir=str(tmp_path)))(*arrays)
    for ours, untraced in zip(jax.block_until_ready(found), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(untraced))
    jax.effects_barrier()
    (path,) = tmp_path.iterdir()
    events = json.loads(path.read_text())["traceEvents"]
    begun = Counter(event["name"] for event in events if event["ph"] == "B")
    blocks, tiles = 132, 32 * 4
    assert begun == {
        "Init": 5 * blocks,
        "load": tiles,
        "multiply": 2 * tiles,
        "help": 2 * blocks,
        "gather": 2 * blocks,
    }
