"""Training: its parts by hand, a small problem, and the real one."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from recflow_jax import module
from recflow_jax import train as training
from recflow_jax.batch import JaggedBatch
from recflow_jax.commands import train as command
from recflow_jax.config import DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.data import movielens
from recflow_jax.data.workloads import generate
from recflow_jax.layout import Layout
from recflow_jax.model import forward, to_device
from recflow_jax.params import init_params, load_params
from recflow_jax.train import TrainOptions, auc, fit, logloss, minibatches, predict

CONFIG = DLRMConfig(
    name="small",
    tables=(
        TableConfig(name="user", rows=30, dim=8),
        TableConfig(name="item", rows=40, dim=8),
    ),
    features=(
        FeatureConfig(name="user", table="user", side="user"),
        FeatureConfig(name="history", table="item", pooling="mean", side="user"),
        FeatureConfig(name="item", table="item"),
    ),
    dense_width=3,
    bottom_mlp=(8,),
    interaction="dot",
    top_mlp=(16, 8, 1),
)
QUICK = TrainOptions(epochs=4, batch=64, learning_rate=1e-2)


def problem(samples: int, seed: int = 0) -> tuple[JaggedBatch, np.ndarray]:
    """Clicks that one dense feature and the item's id decide."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((samples, 3)).astype(np.float32)
    items = rng.integers(40, size=samples)
    bags = [rng.integers(40, size=rng.integers(9)) for _ in range(samples)]
    sparse = {"user": rng.integers(30, size=samples), "history": bags, "item": items}
    labels = dense[:, 1] + np.where(items % 2 == 0, 1.0, -1.0) > 0
    return JaggedBatch.from_features(CONFIG, dense, sparse), labels.astype(np.float32)


@pytest.mark.parametrize("levels", [1, 2, 7, 1000])
def test_auc_is_the_share_of_pairs_in_order(levels: int):
    rng = np.random.default_rng(levels)
    labels = (rng.random(83) < 0.3).astype(np.float32)
    scores = rng.integers(levels, size=83).astype(np.float32)
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    assert auc(labels, scores) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_auc_of_one_class_is_an_error():
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        auc(np.ones(3, np.float32), np.arange(3, dtype=np.float32))


def test_logloss_is_the_mean_surprise():
    labels = np.array([1, 0, 1], np.float32)
    logits = np.array([2.0, -1.0, -80.0], np.float32)
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.log([chance[0], 1 - chance[1], chance[2]]).mean()
    assert logloss(labels, logits) == pytest.approx(expected, rel=1e-6)


def test_every_epoch_takes_every_sample_at_most_once():
    plan = minibatches(50, TrainOptions(epochs=3, batch=16))
    assert plan.shape == (9, 16)
    epochs = plan.reshape(3, 48)
    assert all(len(set(epoch.tolist())) == 48 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert plan.min() >= 0 and plan.max() < 50


def test_minibatches_are_decided_by_the_seed():
    plans = [minibatches(50, TrainOptions(batch=16, seed=seed)) for seed in (1, 1, 2)]
    assert np.array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


def test_a_minibatch_is_no_larger_than_the_data():
    assert minibatches(5, TrainOptions(epochs=2, batch=16)).shape == (2, 5)


@pytest.mark.parametrize("field", ["epochs", "batch", "learning_rate", "table_bound"])
def test_options_name_what_is_not_above_zero(field: str):
    with pytest.raises(ValueError, match=f"{field} is 0, not above 0"):
        TrainOptions(**{field: 0})


def test_fit_learns_what_it_has_not_seen():
    batch, labels = problem(1500)
    unseen, unseen_labels = problem(300, seed=1)
    before = predict(CONFIG, init_params(CONFIG, seed=0, table_bound=0.05), unseen)
    after = predict(CONFIG, fit(CONFIG, batch, labels, options=QUICK), unseen)
    assert logloss(unseen_labels, after) < 0.5 * logloss(unseen_labels, before)
    assert auc(unseen_labels, after) > 0.95


def test_fit_gives_the_same_again():
    batch, labels = problem(200)
    options = TrainOptions(epochs=1, batch=64, seed=3)
    first, second = (fit(CONFIG, batch, labels, options=options) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_fit_starts_from_its_seed():
    batch, labels = problem(64)
    still = TrainOptions(epochs=1, batch=64, learning_rate=1e-12, seed=3, table_bound=0.1)
    params = fit(CONFIG, batch, labels, options=still)
    start = init_params(CONFIG, seed=3, table_bound=0.1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), params, start)


def test_fit_traces_its_step_once(monkeypatch: pytest.MonkeyPatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(args[1].rows.shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    batch, labels = problem(213)
    fit(CONFIG, batch, labels, options=TrainOptions(epochs=2, batch=53))
    assert len(traces) == 1


def test_to_device_names_rows_and_pads_behind_them():
    bags = [np.array([], np.int32), np.array([5, 39], np.int32)]
    sparse = {"user": np.array([2, 29]), "history": bags, "item": np.array([7, 0])}
    batch = JaggedBatch.from_features(CONFIG, np.zeros((2, 3)), sparse)
    packed = to_device(Layout.of(CONFIG), batch, ids=9)
    users = 30  # items' rows come behind those of the users
    assert packed.rows.tolist() == [2, users + 7, 29, users + 5, users + 39, users, 0, 0, 0]
    assert packed.offsets.tolist() == [0, 1, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("samples", [1, 16, 17, 47])
def test_predict_scores_every_sample_in_its_place(samples: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SCORING_BATCH", 16)
    params = init_params(CONFIG, seed=1)
    batch, _ = problem(samples)
    layout = Layout.of(CONFIG)
    whole = to_device(layout, batch, ids=len(batch.values))
    score = jax.jit(
        partial(forward, config=CONFIG, layout=layout, precision=jax.lax.Precision.HIGHEST)
    )
    np.testing.assert_allclose(
        predict(CONFIG, params, batch), score(params, whole)[:, 0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(
    terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Console, "is_terminal", terminal)
    batch, labels = problem(20)
    fit(CONFIG, batch, labels, options=TrainOptions(epochs=1, batch=10))
    out, err = capfd.readouterr()
    assert out == ""
    assert ("training" in err) if terminal else (err == "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small log in MovieLens' format: everybody likes the even items."""
    rng = np.random.default_rng(0)
    users = [f"{u}\t{18 + u}\tM\twriter\t{u}0000" for u in range(9)]
    items = [f"{i}\tTitle\t{1990 + i}\tDrama" for i in range(8)]
    rated = []
    for time in range(600):
        item = int(rng.integers(8))
        rated.append(f"{rng.integers(9)}\t{item}\t{4 - 2 * (item % 2)}\t{time}")
    for suffix, header, lines in (
        ("user", "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", users),
        ("item", "item_id:token\tmovie_title:token\trelease_year:token\tclass:token_seq", items),
        ("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rated),
    ):
        (tmp_path / f"ml-100k.{suffix}").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


def test_the_command_saves_what_it_trained(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "model.safetensors"
    result = command.train(out=out, data=folder, epochs=20)
    assert result.auc > 0.95
    assert f"test AUC {result.auc:.4f}" in capsys.readouterr().out
    config, params = load_params(out)
    data = movielens.load(folder)
    assert config == data.config == result.config
    logits = predict(config, params, data.test.batch)
    assert auc(data.test.labels, logits) == result.auc
    assert logloss(data.test.labels, logits) == result.logloss


@pytest.mark.parametrize("out", [".", "missing/model.safetensors", "ml-100k.user/model"])
def test_an_out_that_cannot_be_written_is_found_before_training(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "train_movielens", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(command.OutputError, match=str(folder / out)):
        command.train(out=folder / out, data=folder)


def test_the_check_of_out_leaves_no_file_and_harms_none(folder: Path):
    kept = folder / "ml-100k.user"
    before = sorted(folder.iterdir()), kept.read_text()
    command.check_writable(folder / "new")
    command.check_writable(kept)
    assert (sorted(folder.iterdir()), kept.read_text()) == before


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(ValueError, match="'netflix' is not one of movielens"):
        command.train("netflix", out="model.safetensors")


@pytest.fixture(scope="module")
def real() -> movielens.MovieLens:
    try:
        return movielens.load()
    except movielens.DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_movielens_reaches_its_auc_in_time(real: movielens.MovieLens, seed: int):
    result = training.train_movielens(real, options=TrainOptions(seed=seed))
    assert result.auc >= 0.75
    assert result.seconds < 120


def test_quantised_tables_are_not_trained() -> None:
    config = CONFIG.with_dtypes(tables="int8")
    batch, labels = generate(config, 4, seed=0), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="model 'small': table 'user' is int8, which cannot be tr"):
        fit(config, batch, labels)
