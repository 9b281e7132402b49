"""The command `recflow`: options and exit codes. What it does is in `recflow_jax.commands`.

Commands are imported when they run, so that `--help` and a mistyped option answer at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recflow_jax import console
from recflow_jax.config import ComputeDType, DLRMConfig, TableDType

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed (RECFLOW_DEBUG=1 or --debug shows the traceback)
  2    bad usage, bad input or a file that cannot be read or written
  3    something needed is not on this machine: a GPU, a package, the data
  130  interrupted"""

MOST_ROWS_WRITTEN = 65536  # by one request to a server

app = typer.Typer(
    name="recflow",
    help="DLRM inference in JAX and Pallas: train, profile, serve and compare.",
    epilog=EXIT_CODES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _file(path: Path | None) -> Path | None:
    """Refuses, before hours of measuring, a path that no file can be written to."""
    if path is not None:
        _folder(path.absolute().parent)
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder")
    return path


def _folder(path: Path) -> Path:
    """Refuses a path that is no folder, or cannot be made one."""
    found = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not found.is_dir():
        raise typer.BadParameter(f"{found} is no folder")
    if not os.access(found, os.W_OK):
        raise typer.BadParameter(f"{found} may not be written to")
    return path


Model = Annotated[str, typer.Option(help="A shipped model's name or a TOML file.")]
MaxRows = Annotated[int | None, typer.Option(help="Cut every table to this many rows.", min=1)]
TableOption = Annotated[TableDType | None, typer.Option(help="Instead of the model's.")]
ComputeOption = Annotated[ComputeDType | None, typer.Option(help="Instead of the model's.")]
BackendName = Annotated[
    Literal["auto", "xla", "mosaic"], typer.Option("--backend", help="Which kernels run.")
]
Ids = Annotated[str, typer.Option(help="How ids are drawn: uniform or zipf(a).")]
Data = Annotated[
    Path | None, typer.Option(help="MovieLens-100K's folder.  [default: recbole's copy]")
]
Seed = Annotated[int, typer.Option(help="Of everything drawn.", min=0)]
Out = Annotated[Path | None, typer.Option(help="Results as JSON.", callback=_file)]
Figure = Annotated[Path | None, typer.Option(help="Results as PNG.", callback=_file)]
ProfileTable = Annotated[Path | None, typer.Option(help="Profile table to serve with.")]
MaxBatch = Annotated[int, typer.Option(help="Largest batch.", min=1)]
SegmentsOption = Annotated[
    int | None,
    typer.Option(
        help="Executables of a batch.", min=1, show_default="3 with a profile table, else 1"
    ),
]
Burst = Annotated[
    bool, typer.Option("--burst", help="Four times the rate for 100 ms of each second.")
]


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs `recflow` with these arguments and returns its exit code; errors go to stderr."""
    try:
        code = app(list(arguments) or ["--help"], prog_name="recflow", standalone_mode=False)
        # An interrupted command comes back as its exit code, one that is done as None.
        return _report("interrupted", code) if code else console.OK
    except typer.TyperException as error:
        return _report(error.format_message(), error.exit_code)
    except Exception as error:
        if os.environ.get("RECFLOW_DEBUG"):
            raise
        return _report(console.one_line(error), console.exit_code(error))


def _report(message: str, code: int) -> int:
    print(f"recflow: error: {message}", file=sys.stderr)
    return code


def _example(*lines: str) -> str:
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def _show_version(asked: bool) -> bool:
    if asked:
        print(f"recflow {_version_installed()}")
        raise typer.Exit
    return asked


def _version_installed() -> str:
    try:
        return version("recflow-jax")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


@app.callback()
def _recflow(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    if debug:
        os.environ["RECFLOW_DEBUG"] = "1"


@app.command(epilog=_example("recflow demo", "recflow demo --quick --out /tmp/demo"))
def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for what the demo makes.", callback=_folder)
    ] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Less training, shorter runs.")] = False,
    data: Data = None,
) -> None:
    """Do the main job on real input.

    Trains on MovieLens-100K, profiles this device, serves requests and compares with plain JAX.
    """
    from recflow_jax.commands.demo import demo

    demo(out=out, quick=quick, data=data)


@app.command(epilog=_example("recflow train movielens --out model.safetensors"))
def train(
    workload: Annotated[Literal["movielens"], typer.Argument(help="What to train on.")],
    out: Annotated[Path, typer.Option(help="Where the model goes (safetensors).", callback=_file)],
    data: Data = None,
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.", min=1)] = 2,
    compute_dtype: Annotated[
        ComputeDType, typer.Option(help="To serve in; it is trained in float32.")
    ] = "float32",
    interaction: Annotated[
        Literal["dot", "dcn"],
        typer.Option(help="How vectors meet: pairwise, or in three cross layers."),
    ] = "dot",
    report: Out = None,
) -> None:
    """Train a click model on MovieLens-100K.

    Prints its AUC on the interactions after those it was trained on, and saves it. For another
    compute dtype the trained model is converted, float8 layers are calibrated, and it is tested in
    both.
    """
    from recflow_jax.commands.train import train

    train(
        workload,
        out=out,
        data=data,
        seed=seed,
        epochs=epochs,
        compute_dtype=compute_dtype,
        interaction=interaction,
        report=report,
    )


@app.command(
    epilog=_example(
        "recflow profile --model dlrm-v2 --max-rows-per-table 2000000 --out profiles/",
        "recflow profile --model my.toml --quick",
    )
)
def profile(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    out: Annotated[
        Path, typer.Option(help="Directory of table and heat map.", callback=_folder)
    ] = Path("profiles"),
    backend: BackendName = "auto",
    max_batch: Annotated[int | None, typer.Option(help="Largest batch.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Keep what an earlier run has measured.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, fewer repeats.")] = False,
    seed: Seed = 0,
    ids: Ids = "uniform",
) -> None:
    """Measure this device for one model.

    Writes the profile table, which the engine plans with, and a heat map of it.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    from recflow_jax.commands.profile import profile

    profile(
        config,
        out=out,
        backend=backend,
        max_batch=max_batch,
        resume=resume,
        quick=quick,
        seed=seed,
        ids=ids,
    )


bench = typer.Typer(
    name="bench",
    help="Compare the engine, or its kernels, with plain JAX, torch and the device's limits.",
    epilog=_example(
        "recflow bench model --model dlrm-kaggle --against jax,torch --batch 256,4096",
        "recflow bench kernels --model dlrm-kaggle --batch 4096",
        "recflow bench host --model dlrm-kaggle",
    ),
    rich_markup_mode=None,
)
app.add_typer(bench)

Batches = Annotated[str, typer.Option("--batch", help="Samples per batch.")]
Steady = Annotated[
    bool, typer.Option("--steady", help="Rounds of a second, not 20 ms: clocks under load.")
]


@bench.command(
    "model",
    epilog=_example(
        "recflow bench model --model dlrm-kaggle --against jax,torch --batch 256,4096",
        "recflow bench model --model rm1 --mode online --load 0.5,0.8 --out online.json",
    ),
)
def bench_model(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    against: Annotated[
        str, typer.Option(help="Of jax, jax-per-table, torch; '' for none.")
    ] = "jax",
    batch: Batches = "256,1024,4096",
    ids: Ids = "uniform",
    seed: Seed = 0,
    mode: Annotated[str, typer.Option(help="Of offline, overlap, numpy, online.")] = "offline",
    ride: Annotated[str, typer.Option(help="Overlap: like deep/all.  [default: all]")] = "",
    load: Annotated[str, typer.Option(help="Online: shares of saturation.")] = "0.5,0.8,0.95",
    load_of: Annotated[
        Literal["lowest", "recflow", "serial", "jax"],
        typer.Option(help="Online: whose saturation."),
    ] = "lowest",
    p99: Annotated[
        float, typer.Option(help="Online: in ms; the largest load that keeps it.", min=0.001)
    ] = 10.0,
    burst: Annotated[
        bool, typer.Option("--burst", help="Online: four times the rate for 100 ms of each second.")
    ] = False,
    qps: Annotated[str, typer.Option(help="Online: requests per second, not shares.")] = "",
    request_samples: Annotated[
        int | None, typer.Option(help="Online: of each request.  [default: MLPerf's sizes]", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Online: of each load.", min=0.1)] = 5.0,
    repeat: Annotated[
        int, typer.Option(help="Online: of each load, in turn; the median p99 counts.", min=1)
    ] = 1,
    front_ends: Annotated[
        int, typer.Option(help="Online: in so many processes of their own, not here.", min=0)
    ] = 0,
    serial_in_flight: Annotated[
        str, typer.Option(help="Online: batches of serial batching in flight, the best of these.")
    ] = "2,1",
    steady: Steady = False,
    backend: BackendName = "auto",
    profile: ProfileTable = None,
    out: Out = None,
    figure: Figure = None,
) -> None:
    """Compare the engine with plain JAX and torch.

    All get the same inputs, in one run, side by side with the floor of bytes and FLOP: in mode
    offline these lie on the device, in mode numpy on the host, in mode overlap embeddings run
    beside layers, and in mode online requests arrive. There the engine also runs with serial
    batching, tuned at each load; with a profile table (--batch 8,8192 has the sizes of recflow
    profile) the simulator foretells both. Lists are separated by commas.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    loads, rates = _list("--load", load, float), _list("--qps", qps, float)
    from recflow_jax.commands.bench import bench_model
    from recflow_jax.measure.online import OnlineOptions

    online = OnlineOptions(
        loads=loads,
        qps=rates,
        request_samples=request_samples,
        seconds=seconds,
        burst=burst,
        load_of=load_of,
        p99_ms=p99,
        repeats=repeat,
        front_ends=front_ends,
        serial_in_flight=_list("--serial-in-flight", serial_in_flight, int),
    )
    bench_model(
        config,
        against=_list("--against", against, str),
        batches=_list("--batch", batch, int),
        modes=_list("--mode", mode, str),
        rides=_list("--ride", ride, str),
        ids=ids,
        seed=seed,
        backend=backend,
        profile=profile,
        online=online,
        timing=_timing(steady),
        out=out,
        figure=figure,
    )


@bench.command(
    "kernels",
    epilog=_example(
        "recflow bench kernels --model dlrm-kaggle --batch 4096",
        "recflow bench kernels --kernel gather --model dlrm-v2 --max-rows-per-table 2000000",
    ),
)
def bench_kernels(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    kernel: Annotated[
        str,
        typer.Option(
            help="Of gather, dense, interaction, pooled-dot, corun.  [default: the first four, if "
            "the model has them]"
        ),
    ] = "",
    batch: Batches = "256,1024,4096",
    ids: Ids = "uniform",
    seed: Seed = 0,
    steady: Steady = False,
    backend: BackendName = "auto",
    out: Out = None,
    figure: Figure = None,
) -> None:
    """Compare single kernels with XLA's and with what the device reaches.

    Shapes are the model's. Lists are separated by commas.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    from recflow_jax.commands.bench import bench_kernels

    bench_kernels(
        config,
        kernels=_list("--kernel", kernel, str),
        batches=_list("--batch", batch, int),
        ids=ids,
        seed=seed,
        backend=backend,
        timing=_timing(steady),
        out=out,
        figure=figure,
    )


@app.command(
    epilog=_example(
        "recflow simulate --model dlrm-v2 --max-rows-per-table 2000000 --profile profiles/x.json",
        "recflow simulate --model my.toml --profile profiles/x.json --qps 2e6 --p99 10 --burst",
    )
)
def simulate(
    model: Model,
    profile: Annotated[Path, typer.Option(help="Profile table of this model.")],
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    qps: Annotated[float | None, typer.Option(help="Requests per second.")] = None,
    p99: Annotated[
        float | None, typer.Option(help="In ms, with --qps: how many GPUs hold it?")
    ] = None,
    load: Annotated[
        str, typer.Option(help="Without --qps: shares of saturation.")
    ] = "0.1,0.3,0.5,0.7,0.8,0.9,0.95",
    objective: Annotated[
        Literal["throughput", "latency"], typer.Option(help="What the engine plans for.")
    ] = "throughput",
    plan_p99: Annotated[
        float | None, typer.Option(help="In ms: the engine's p99_ms, which keeps batches small.")
    ] = None,
    serial_wait_ms: Annotated[
        float | None,
        typer.Option(
            help="Serial batching collects so long.  "
            "[default: the best of 0 to 5 ms, of four batch limits, of one or two batches in "
            "flight, at each load]",
            min=0,
        ),
    ] = None,
    request_samples: Annotated[
        int | None, typer.Option(help="Of each request.  [default: MLPerf's sizes]", min=1)
    ] = None,
    burst: Burst = False,
    seconds: Annotated[
        float, typer.Option(help="Of each load (at least 10,000 requests).", min=0.1)
    ] = 5.0,
    seed: Seed = 0,
    launch_us: Annotated[float, typer.Option(help="Host, per launch.", min=0)] = 20,
    sample_ns: Annotated[float, typer.Option(help="Host, per sample packed.", min=0)] = 50,
    id_ns: Annotated[float, typer.Option(help="Host, per id packed.", min=0)] = 0.5,
    upload_gb_s: Annotated[float, typer.Option(help="Copies to the device.", min=1e-3)] = 12,
    answer_us: Annotated[float, typer.Option(help="From step's end to answer.", min=0)] = 30,
    out: Out = None,
    figure: Figure = None,
) -> None:
    """Foretell latency and the number of GPUs from a profile table.

    Runs the engine's scheduler with the plans that it makes from the table, and serial batching
    beside it, on a virtual clock. Says how both do, and which cuts, slices and rides the plans
    used. Needs no GPU: steps take what the table says, the host what the options say, whose
    defaults are orders of magnitude for a server with a PCIe GPU.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    loads = _list("--load", load, float)
    from recflow_jax.commands.simulate import simulate
    from scheduling import HostCosts

    host = HostCosts(
        launch_us=launch_us,
        sample_us=sample_ns / 1000,
        id_us=id_ns / 1000,
        byte_us=1 / (1000 * upload_gb_s),
        answer_us=answer_us,
    )
    simulate(
        config,
        profile=profile,
        qps=qps,
        p99_ms=p99,
        loads=loads,
        objective=objective,
        plan_p99_ms=plan_p99,
        serial_wait_ms=serial_wait_ms,
        request_samples=request_samples,
        burst=burst,
        seconds=seconds,
        seed=seed,
        host=host,
        out=out,
        figure=figure,
    )


@bench.command(
    "host",
    epilog=_example(
        "recflow bench host --model dlrm-kaggle",
        "recflow bench host --model dlrm-v2 --request 1,64,512 --out host.json",
    ),
)
def bench_host(
    model: Model,
    request: Annotated[str, typer.Option(help="Samples per request.")] = "1,64,512",
    ids: Ids = "uniform",
    seed: Seed = 0,
    busy: Annotated[
        bool, typer.Option("--busy", help="Beside a thread of Python that computes without end.")
    ] = False,
    steady: Steady = False,
    out: Out = None,
) -> None:
    """Measure what a request costs on the host.

    The engine runs on a device that is done at once, and has no tables. Microseconds per request
    and per sample, and of processor time in each stage; on a GPU also what the copies of slices
    to it take, from plain and from pinned memory. Lists are separated by commas.
    """
    config = _config(model, None, None, None)
    from recflow_jax.commands.bench import bench_host

    bench_host(
        config,
        request_sizes=_list("--request", request, int),
        ids=ids,
        seed=seed,
        busy=busy,
        timing=_timing(steady) if steady else None,
        out=out,
    )


@bench.command(
    "plans",
    epilog=_example(
        "recflow bench plans --model dlrm-kaggle --profile profiles/x.json --out plans.json",
    ),
)
def bench_plans(
    model: Model,
    profile: Annotated[Path, typer.Option(help="Profile table of this model and device.")],
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    mixes: Annotated[int, typer.Option(help="Batches with samples waiting.", min=1)] = 200,
    contests: Annotated[
        int, typer.Option(help="Of these, how many to measure by other plans too.", min=0)
    ] = 30,
    max_batch: Annotated[int, typer.Option(help="As of the table.", min=1)] = 8192,
    ids: Ids = "uniform",
    seed: Seed = 0,
    backend: BackendName = "auto",
    out: Out = None,
) -> None:
    """Compare plans with what their table promises.

    Random batches with samples waiting are launched by their plans and timed; some of them also by
    every other plan that could be better.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    from recflow_jax.commands.bench_plans import bench_plans
    from recflow_jax.engine.options import EngineOptions

    bench_plans(
        config,
        profile=profile,
        mixes=mixes,
        contests=contests,
        ids=ids,
        seed=seed,
        options=EngineOptions(backend=backend, max_batch=max_batch),
        out=out,
    )


@bench.command(
    "serve",
    epilog=_example(
        "recflow bench serve --model dlrm-kaggle --max-rows-per-table 100000",
        "recflow bench serve --model my.toml --qps 500,1000 --request-samples 64 --out serve.json",
        "recflow bench serve --model my.toml --burst --p99 10 --figure serve.png",
    ),
)
def bench_serve(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    load: Annotated[str, typer.Option(help="Shares of the lowest saturation.")] = "0.2,0.5,0.8",
    qps: Annotated[str, typer.Option(help="Requests per second, not shares.")] = "",
    request_samples: Annotated[
        int | None, typer.Option(help="Of each request.  [default: MLPerf's sizes]", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each load.", min=0.1)] = 5.0,
    burst: Burst = False,
    p99: Annotated[
        float | None, typer.Option(help="In ms: which load keeps it? Tries a few per server.")
    ] = None,
    profile: ProfileTable = None,
    backend: BackendName = "auto",
    max_batch: MaxBatch = 8192,
    segments: SegmentsOption = None,
    ids: Ids = "uniform",
    seed: Seed = 0,
    out: Out = None,
    figure: Figure = None,
) -> None:
    """Compare a server with the engine alone.

    Starts `recflow serve` and sends it, over HTTP and gRPC, and the engine in this process the same
    arrivals, which wait for no answer; then counts the CPU time of HTTP beside a bare ASGI app.
    Both processes hold the model. Lists are separated by commas.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    loads, rates = _list("--load", load, float), _list("--qps", qps, float)
    from recflow_jax.commands.bench_serve import bench_serve
    from recflow_jax.engine.options import EngineOptions
    from recflow_jax.measure.online import OnlineOptions

    bench_serve(
        config,
        engine=EngineOptions(backend=backend, max_batch=max_batch, segments=segments),
        online=OnlineOptions(
            loads=loads, qps=rates, request_samples=request_samples, seconds=seconds, burst=burst
        ),
        p99_ms=p99,
        profile=profile,
        ids=ids,
        seed=seed,
        out=out,
        figure=figure,
    )


@bench.command(
    "loadgen",
    epilog=_example(
        "recflow bench loadgen --model dlrm-v2 --profile profiles/x.json --p99-ms 10,60 --out lg",
        "recflow bench loadgen --model my.toml --scenario server --qps 500 --p99-ms 60 --out lg",
    ),
)
def bench_loadgen(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder of LoadGen's files and loadgen.json.", callback=_folder)
    ],
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    scenario: Annotated[
        Literal["server", "offline", "both"], typer.Option(help="Both: offline first.")
    ] = "both",
    qps: Annotated[str, typer.Option(help="Scenario server: queries per second.")] = "",
    share: Annotated[str, typer.Option(help="Both: of the offline rate.")] = "0.7,0.85",
    p99_ms: Annotated[str, typer.Option(help="Of each server run, or one for all.")] = "60",
    request_samples: Annotated[
        int | None, typer.Option(help="Pairs of each query.  [default: MLPerf's sizes]", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each run, at least.", min=0.1)] = 60,
    profile: ProfileTable = None,
    backend: BackendName = "auto",
    max_batch: MaxBatch = 8192,
    segments: SegmentsOption = None,
    ids: Ids = "uniform",
    seed: Seed = 0,
) -> None:
    """Run MLPerf LoadGen against the engine.

    In this process, in the Server scenario, Offline, or Server at shares of the Offline rate.
    LoadGen keeps the time and judges; answers are checked once before. Lists are separated by
    commas.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    rates, shares = _list("--qps", qps, float), _list("--share", share, float)
    bounds = _list("--p99-ms", p99_ms, float)
    from recflow_jax.commands.bench_loadgen import LoadGenOptions, bench_loadgen
    from recflow_jax.engine.options import EngineOptions

    bench_loadgen(
        config,
        engine=EngineOptions(backend=backend, max_batch=max_batch, segments=segments),
        options=LoadGenOptions(
            scenario=scenario,
            qps=rates,
            shares=shares,
            p99_ms=bounds,
            request_samples=request_samples,
            seconds=seconds,
        ),
        profile=profile,
        ids=ids,
        seed=seed,
        out=out,
    )


@bench.command(
    "front-ends",
    epilog=_example(
        "recflow bench front-ends --model dlrm-v2 --max-rows-per-table 2000000 --processes 1,2,4",
        "recflow bench front-ends --model my.toml --processes 2 --load 0.5,0.9 --out apart.json",
    ),
)
def bench_front_ends(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    processes: Annotated[str, typer.Option(help="Front ends at once.")] = "1,2,4",
    load: Annotated[str, typer.Option(help="Shares of their saturation.")] = "0.5,0.8",
    request_samples: Annotated[
        int | None, typer.Option(help="Of every request.  [default: MLPerf's sizes]", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each measurement.", min=0.1)] = 5,
    profile: ProfileTable = None,
    backend: BackendName = "auto",
    max_batch: MaxBatch = 8192,
    segments: SegmentsOption = None,
    ids: Ids = "uniform",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Measure front ends in processes of their own.

    They check and copy their requests, and pass them on together to the engine of this process,
    through memory that they share. Beside them, requests from this process. Answers are checked
    before anything is timed. Latencies are those of the front end that fares worst. Lists are
    separated by commas.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    counts, loads = _list("--processes", processes, int), _list("--load", load, float)
    from recflow_jax.commands.bench_front_ends import bench_front_ends
    from recflow_jax.engine.options import EngineOptions

    bench_front_ends(
        config,
        engine=EngineOptions(backend=backend, max_batch=max_batch, segments=segments),
        front_ends=counts,
        loads=loads,
        request_samples=request_samples,
        seconds=seconds,
        profile=profile,
        ids=ids,
        seed=seed,
        out=out,
    )


@bench.command(
    "soak",
    epilog=_example(
        "recflow bench soak --model dlrm-kaggle --max-rows-per-table 100000 --minutes 10",
    ),
)
def bench_soak(
    model: Model,
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    minutes: Annotated[float, typer.Option(help="How long.", min=0.01)] = 10,
    qps: Annotated[float, typer.Option(help="Requests per second of all kinds.")] = 100,
    request_samples: Annotated[int, typer.Option(help="Of each request.", min=1)] = 16,
    profile: ProfileTable = None,
    backend: BackendName = "auto",
    max_batch: MaxBatch = 8192,
    segments: SegmentsOption = None,
    ids: Ids = "uniform",
    seed: Seed = 0,
    out: Out = None,
    figure: Figure = None,
) -> None:
    """Load a server for long, among bad clients.

    Starts `recflow serve` and asks it over HTTP and gRPC; of a hundred requests 6 are cancelled, 5
    wrong, and 4 left by their client. Passes if the server's memory is flat after the first
    quarter (to 2 % or 16 MiB), every request had one end, and every answer was right.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    from recflow_jax.commands.bench_soak import bench_soak
    from recflow_jax.engine.options import EngineOptions

    bench_soak(
        config,
        engine=EngineOptions(backend=backend, max_batch=max_batch, segments=segments),
        minutes=minutes,
        qps=qps,
        request_samples=request_samples,
        profile=profile,
        ids=ids,
        seed=seed,
        out=out,
        figure=figure,
    )


@bench.command(
    "traces",
    epilog=_example(
        "recflow bench traces --model dlrm-v2 --max-rows-per-table 2000000 --out traces/",
        "recflow bench traces --model my.toml --batch 4096 --ride deep/all --out traces/",
    ),
)
def bench_traces(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder of two figures and traces.json.", callback=_folder)
    ],
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    batch: Annotated[int, typer.Option(help="Samples per batch.", min=1)] = 8192,
    slice_samples: Annotated[
        int, typer.Option("--slice", help="Samples that ride in the launch.", min=1)
    ] = 4096,
    ride: Annotated[str, typer.Option(help="Like deep/all.  [default: the fastest]")] = "",
    ids: Ids = "uniform",
    seed: Seed = 0,
) -> None:
    """Show what co-running does on this GPU.

    timeline.png: when each kernel runs, of some batches in a row, serially and as co-runs, with the
    HBM traffic that NVIDIA's ncu counts, where it is on PATH. launch.png: what the warpgroups of
    the SMs do inside one launch that has both, the model's largest dense layer and a slice's bags.
    Needs a Hopper GPU.
    """
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype)
    from recflow_jax.commands.bench_traces import bench_traces

    bench_traces(
        config,
        batch=batch,
        slice_samples=slice_samples,
        ride=ride or None,
        ids=ids,
        seed=seed,
        out=out,
    )


@app.command(
    epilog=_example(
        "recflow serve --params demo/movielens.safetensors",
        "recflow serve --model dlrm-kaggle --max-rows-per-table 100000 --random-params",
    )
)
def serve(
    params: Annotated[Path | None, typer.Option(help="The model (safetensors).")] = None,
    model: Annotated[
        str, typer.Option(help="A name or TOML file.  [default: the one inside --params]")
    ] = "",
    max_rows_per_table: MaxRows = None,
    table_dtype: TableOption = None,
    compute_dtype: ComputeOption = None,
    random_params: Annotated[
        bool, typer.Option("--random-params", help="Draw parameters of --model, to try things.")
    ] = False,
    profile: ProfileTable = None,
    backend: BackendName = "auto",
    max_batch: MaxBatch = 8192,
    segments: SegmentsOption = None,
    objective: Annotated[
        Literal["throughput", "latency"], typer.Option(help="What is planned for, by --profile.")
    ] = "throughput",
    p99_ms: Annotated[
        float | None, typer.Option(help="With --profile: batches small enough for it.")
    ] = None,
    max_queued_samples: Annotated[
        int, typer.Option(help="Samples inside, beyond which requests get 429.", min=1)
    ] = 65536,
    name: Annotated[str | None, typer.Option(help="Its name in URLs.  [default: its own]")] = None,
    model_version: Annotated[str, typer.Option(help="Its version in URLs.")] = "1",
    model_control: Annotated[
        Path | None,
        typer.Option(help="Clients may load and unload versions: N.safetensors in this folder."),
    ] = None,
    row_updates: Annotated[
        bool, typer.Option("--row-updates", help="Clients may write rows of tables.")
    ] = False,
    front_ends: Annotated[
        Path | None,
        typer.Option(help="A Unix socket: servers with --engine find this one's engine there."),
    ] = None,
    engine: Annotated[
        Path | None,
        typer.Option(help="Serve the engine of the server whose --front-ends this is."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8001,
    grpc: Annotated[bool, typer.Option(help="Serve gRPC beside HTTP.")] = True,
    max_body_mib: Annotated[int, typer.Option(help="Of one request.", min=1)] = 64,
    max_requests: Annotated[int, typer.Option(help="Inside at once.", min=1)] = 1024,
    max_buffered_mib: Annotated[int, typer.Option(help="Of all requests inside.", min=1)] = 1024,
    timeout_s: Annotated[float, typer.Option(help="Deadline of requests that bring none.")] = 10,
    drain_s: Annotated[float, typer.Option(help="After SIGTERM, for requests inside.")] = 30,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file; with --tls-key.", exists=True, dir_okay=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file.", exists=True, dir_okay=False)
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Holds the token that clients must send.", exists=True, dir_okay=False),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least to log.")
    ] = "info",
    log_format: Annotated[
        Literal["json", "text"] | None, typer.Option(help="[default: text on a terminal]")
    ] = None,
) -> None:
    """Serve a model over HTTP and gRPC.

    Speaks the Open Inference Protocol v2 until SIGTERM; then it answers what it has accepted, and
    ends. See docs/serving.md.
    """
    from recflow_jax.commands.serve_engine_of import serve_engine_of
    from recflow_jax.engine.options import EngineOptions
    from recflow_jax.serving.options import ServerOptions

    shared: dict[str, Any] = {
        "server": ServerOptions(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port if grpc else None,
            max_body_bytes=max_body_mib * 2**20,
            max_requests=max_requests,
            max_buffered_bytes=max_buffered_mib * 2**20,
            default_timeout_s=timeout_s,
            drain_s=drain_s,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            token=token_file.read_text().strip() if token_file else None,
        ),
        "name": name,
        "version": model_version,
        "log_level": log_level,
        "log_format": log_format,
    }
    options = EngineOptions(
        backend=backend,
        max_batch=max_batch,
        segments=segments,
        objective=objective,
        p99_ms=p99_ms,
        max_queued_samples=max_queued_samples,
        max_update_rows=MOST_ROWS_WRITTEN if row_updates else None,
    )
    varied = any((max_rows_per_table, table_dtype, compute_dtype))
    if engine is not None:
        told = (params, model, varied, random_params, profile, model_control, front_ends)
        if any(told) or options != EngineOptions():
            raise ValueError("serve --engine: the model and its engine are the other server's")
        return serve_engine_of(engine, **shared)
    if varied and not model:
        raise ValueError("serve: --max-rows-per-table and dtypes vary --model, which is missing")
    config = _config(model, max_rows_per_table, table_dtype, compute_dtype) if model else None
    from recflow_jax.commands.serve import serve

    serve(
        config,
        params=params,
        random=random_params,
        profile=profile,
        engine=options,
        model_control=model_control,
        front_ends=front_ends,
        **shared,
    )


@app.command(epilog=_example("recflow tune", "recflow tune --batch 256,1024 --out tables/"))
def tune(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the table; the default is where it is looked up.", callback=_folder
        ),
    ] = Path(__file__).parent / "tile_tables",
    model: Annotated[
        str, typer.Option(help="Names or TOML files.  [default: all shipped models]")
    ] = "",
    batch: Batches = "256,512,1024,2048,4096,8192",
    resume: Annotated[bool, typer.Option(help="Keep what an earlier run has measured.")] = True,
) -> None:
    """Measure which tiles dense layers are fastest with here.

    Tries the models' layers with every promising configuration of the kernel and with XLA's matmul,
    and writes the table that this device's engines choose by. About 3 s a shape.
    """
    models = [_config(name, None, None, None) for name in _list("--model", model, str)]
    from recflow_jax.commands.tune import tune

    tune(out=out, models=models, batches=_list("--batch", batch, int), resume=resume)


@app.command(epilog=_example("recflow info", "recflow info --json"))
def info(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show device, back end, versions and models.

    Says why the back end was chosen and which ceilings are known for the device.
    """
    from recflow_jax.commands.info import info

    info(as_json=as_json)


def _config(
    model: str,
    max_rows: int | None,
    table_dtype: TableDType | None,
    compute_dtype: ComputeDType | None,
) -> DLRMConfig:
    """The shipped model or TOML file named `model`, varied as asked."""
    is_file = model.endswith(".toml")
    config = DLRMConfig.load(model) if is_file else DLRMConfig.shipped(model)
    if max_rows is not None:
        config = config.with_max_rows(max_rows)
    return config.with_dtypes(tables=table_dtype, compute=compute_dtype)


def _timing(steady: bool) -> Any:
    from recflow_jax.measure.timing import STEADY, TimingOptions

    return STEADY if steady else TimingOptions()


def _list[T](option: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The comma-separated values of an option. Raises ValueError, naming both."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a list of {kind.__name__}") from None
