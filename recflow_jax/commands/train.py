"""`recflow train`: trains a click model on real data, tests it and saves it."""

import tempfile
from pathlib import Path

from recflow_jax.console import console
from recflow_jax.data import movielens
from recflow_jax.params import save_params
from recflow_jax.train import TrainOptions, TrainResult, train_movielens

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
) -> TrainResult:
    """Trains on `dataset`, prints the test AUC and saves the model to `out`.

    `data` is the folder of the data set's files (default: recbole's copy). Raises ValueError for
    an unknown data set or bad options, DataError for missing data and OutputError for an `out`
    that cannot be written, all before training.
    """
    if dataset not in DATASETS:
        raise ValueError(f"data set {dataset!r} is not one of {', '.join(DATASETS)}")
    options = TrainOptions(epochs=epochs, seed=seed)
    check_writable(Path(out))
    samples = movielens.load(data)
    console.print(_data_line(samples), soft_wrap=True)
    result = train_movielens(samples, options=options)
    save_params(out, result.config, result.params)
    console.print(_result_line(result), soft_wrap=True)
    console.print(f"saved {out}", markup=False, soft_wrap=True)
    return result


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


def _result_line(result: TrainResult) -> str:
    return (
        f"test AUC {result.auc:.4f}, log loss {result.logloss:.4f} nats "
        f"({result.epochs} epochs, {result.seconds:.1f} s)"
    )
