"""`recflow train`: trains a click model on real data, tests it and saves it."""

import dataclasses
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from recflow_jax.calibration import calibrate
from recflow_jax.commands.info import versions
from recflow_jax.config import ComputeDType
from recflow_jax.console import console
from recflow_jax.data import movielens
from recflow_jax.measure.report import command_line, save_json
from recflow_jax.params import save_params
from recflow_jax.train import TrainOptions, TrainResult, evaluate, train_movielens

CALIBRATION_SAMPLES = 4096
DATASETS = ("movielens",)


class OutputError(OSError):
    """A file that cannot be written; found before the work whose result it should hold."""


def train(
    dataset: str = "movielens",
    *,
    out: str | Path = "movielens.safetensors",
    data: str | Path | None = None,
    epochs: int = TrainOptions.epochs,
    seed: int = TrainOptions.seed,
    compute_dtype: ComputeDType = "float32",
    interaction: movielens.ClickInteraction = "dot",
    report: str | Path | None = None,
) -> TrainResult:
    """Trains on `dataset`, prints the test AUC and saves the model to `out`.

    `data` is the folder of the data set's files (default: recbole's copy). The model is trained in
    float32; for another compute dtype it is converted afterwards, float8 layers are calibrated on
    the last CALIBRATION_SAMPLES training samples, and it is tested in both. `interaction`: how its
    vectors meet. `report`: where the figures go, as JSON.

    Raises ValueError for an unknown data set or bad options, DataError for missing data and
    OutputError for files that cannot be written, all before training.
    """
    if dataset not in DATASETS:
        raise ValueError(f"data set {dataset!r} is not one of {', '.join(DATASETS)}")
    options = TrainOptions(epochs=epochs, seed=seed)
    for path in (out, *([report] if report else [])):
        check_writable(Path(path))
    samples = movielens.load(data, interaction=interaction)
    console.print(_data_line(samples), soft_wrap=True)
    result = train_movielens(samples, options=options)
    console.print(_result_line(result), soft_wrap=True)
    converted = convert(result, samples, compute_dtype)
    if compute_dtype != result.config.compute_dtype:
        console.print(_converted_line(result, converted), soft_wrap=True)
    save_params(out, converted.config, converted.params)
    console.print(f"saved {out}", markup=False, soft_wrap=True)
    if report:
        save_json(Path(report), _as_report(result, converted, seed))
        console.print(f"wrote {report}", markup=False, soft_wrap=True)
    return converted


def convert(result: TrainResult, data: movielens.MovieLens, dtype: ComputeDType) -> TrainResult:
    """The trained model with another compute dtype, tested again."""
    if dtype == result.config.compute_dtype:
        return result
    config = result.config.with_dtypes(compute=dtype)
    if config.float8_matmuls:
        train = data.train.batch
        last = train.part(max(0, train.samples - CALIBRATION_SAMPLES), train.samples)
        config = calibrate(config, result.params, last)
    test_auc, test_logloss = evaluate(config, result.params, data.test)
    return dataclasses.replace(result, config=config, auc=test_auc, logloss=test_logloss)


def check_writable(path: Path) -> None:
    """Raises OutputError if a file at `path` could not be created."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, not a file to write")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _data_line(data: movielens.MovieLens) -> str:
    test = data.test
    ids = len(test.batch.values) / len(test)
    return (
        f"MovieLens-100K: {len(data.train):,} interactions to train on, the {len(test):,} after "
        f"them to test, {ids:.0f} ids per sample"
    )


def _converted_line(before: TrainResult, after: TrainResult) -> str:
    return (
        f"with {after.config.compute_dtype} layers: test AUC {after.auc:.4f} "
        f"({after.auc - before.auc:+.4f}), log loss {after.logloss:.4f} nats"
    )


def _as_report(trained: TrainResult, converted: TrainResult, seed: int) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "seed": seed,
        "epochs": trained.epochs,
        "interaction": converted.config.interaction,
        "compute_dtype": converted.config.compute_dtype,
        "auc": converted.auc,
        "logloss": converted.logloss,
        "float32_auc": trained.auc,
        "float32_logloss": trained.logloss,
        "auc_loss": trained.auc - converted.auc,
    }


def _result_line(result: TrainResult) -> str:
    return (
        f"test AUC {result.auc:.4f}, log loss {result.logloss:.4f} nats "
        f"({result.epochs} epochs, {result.seconds:.1f} s)"
    )
