"""The click model's samples: what they hold, and that they hold nothing of their own time."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from recflow_jax.batch import JaggedBatch, check_batch
from recflow_jax.data import movielens
from recflow_jax.data.history import DENSE, RatingLog, counts_before, liked_before, sums_before
from recflow_jax.data.movielens import DataError, RatingData

USERS = """user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
7\t24\tM\twriter\t85711
8\t17\tF\tartist\tV1A
9\t56\tF\twriter\t05146
"""
ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
a\tOne\t1995\tDrama Comedy
b\tTwo\tunkonwn\tDrama
c\tThree\t1920\tWar
d\tFour\t1922\tComedy War Drama
"""
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def write(folder: Path, rated: str) -> Path:
    (folder / "ml-100k.user").write_text(USERS)
    (folder / "ml-100k.item").write_text(ITEMS)
    (folder / "ml-100k.inter").write_text(HEADER + rated)
    return folder


def random_log(seed: int, interactions: int) -> str:
    """Unsorted lines, many of them in the same second."""
    rng = np.random.default_rng(seed)
    lines = [
        f"{rng.choice(['7', '8', '9'])}\t{rng.choice(list('abcd'))}\t{rng.integers(1, 6)}\t"
        f"{874_724_710 + 3_600 * rng.integers(interactions // 2)}\n"
        for _ in range(interactions)
    ]
    return "".join(lines)


@pytest.fixture
def data(tmp_path: Path) -> RatingData:
    return movielens.read(write(tmp_path, random_log(seed=1, interactions=70)))


def samples_of(data: RatingData) -> JaggedBatch:
    return movielens.make_samples(movielens.click_model(data), data).batch


def row(batch: JaggedBatch, sample: int) -> tuple[np.ndarray, list[list[int]]]:
    bags = [batch.bag(sample, feature).tolist() for feature in range(batch.features)]
    return batch.dense[sample], bags


def with_log(data: RatingData, keep: np.ndarray, ratings: np.ndarray) -> RatingData:
    log = data.log
    kept = RatingLog(
        users=log.users[keep], items=log.items[keep], ratings=ratings[keep], times=log.times[keep]
    )
    return dataclasses.replace(data, log=kept)


def test_a_sample_knows_nothing_of_its_own_time_or_later(data: RatingData):
    """Its features stay as they are where its own rating is another and all that happened in its
    second or later never did.
    """
    whole = samples_of(data)
    for sample, time in enumerate(data.log.times):
        itself = np.arange(len(data.log.times)) == sample
        keep = (data.log.times < time) | itself
        other_rating = np.where(itself, 6 - data.log.ratings, data.log.ratings)
        alone = samples_of(with_log(data, keep, other_rating))
        dense, bags = row(alone, int(np.flatnonzero(itself[keep])[0]))
        expected_dense, expected_bags = row(whole, sample)
        np.testing.assert_allclose(dense, expected_dense, rtol=1e-5, atol=1e-6)
        assert bags == expected_bags


def test_other_ratings_later_or_in_the_same_second_change_nothing(data: RatingData):
    log = data.log
    time = log.times[len(log.times) // 2]
    later = log.times >= time
    assert np.count_nonzero(log.times == time) > 1
    changed = with_log(
        data, np.full(len(later), True), np.where(later, 6 - log.ratings, log.ratings)
    )
    stop = int(np.searchsorted(log.times, time, side="right"))
    before, after = samples_of(data).part(0, stop), samples_of(changed).part(0, stop)
    np.testing.assert_allclose(after.dense, before.dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.values, before.values)


@pytest.mark.parametrize(
    "name", [n for n in DENSE if n.endswith(("mean", "bias", "taste", "spread", "age"))]
)
def test_what_others_rated_before_is_known(data: RatingData, name: str):
    column = DENSE.index(name)
    flipped = with_log(data, np.full(70, True), 6 - data.log.ratings)
    assert not np.allclose(samples_of(data).dense[:, column], samples_of(flipped).dense[:, column])


@pytest.mark.parametrize("last", [None, 1, 3])
def test_sums_before_is_a_sum_over_the_earlier_ones(last: int | None):
    rng = np.random.default_rng(0)
    keys, times = rng.integers(4, size=60), np.sort(rng.integers(20, size=60))
    values = rng.integers(1, 100, size=60).astype(np.float64)
    sums = sums_before(keys, times, values, last=last)
    for i in range(60):
        earlier = values[(keys == keys[i]) & (times < times[i])]
        assert sums[i] == earlier[-last if last else 0 :].sum()


def test_nothing_comes_before_the_first():
    assert counts_before(np.zeros(3, np.int32), np.array([5, 5, 5])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("last", [1, 2, 50])
def test_liked_bags_are_the_latest_liked_items(data: RatingData, last: int):
    log = data.log
    values, offsets = liked_before(log, data.liked, last=last)
    for i in range(len(log.times)):
        earlier = (log.users == log.users[i]) & (log.times < log.times[i]) & (log.ratings >= 4)
        expected = log.items[earlier][-last:]
        assert values[offsets[i] : offsets[i + 1]].tolist() == expected.tolist()


def test_a_sample_holds_its_user_and_item(tmp_path: Path):
    rated = "8\td\t3\t200\n7\tb\t4\t100\n8\ta\t5\t100\n"
    data = movielens.read(write(tmp_path, rated))
    config = movielens.click_model(data)
    samples = movielens.make_samples(config, data)
    assert samples.times.tolist() == [100, 100, 200]
    assert samples.labels.tolist() == [1, 1, 0]
    assert samples.users.tolist() == [0, 1, 1]
    names = [feature.name for feature in config.features]
    bags = dict(zip(names, row(samples.batch, 2)[1], strict=True))
    assert bags == {
        "user": [1],
        "age": [0],  # under 18
        "gender": [0],
        "occupation": [0],
        "zip": [10],  # V is no digit
        "liked": [0],
        "item": [3],
        "year": [3],
        "genres": [0, 1, 2],
    }
    assert row(samples.batch, 0)[1][names.index("year")] == [0]
    assert row(samples.batch, 0)[1][names.index("liked")] == []


def test_ages_start_where_their_group_does(tmp_path: Path):
    traits = movielens.read(write(tmp_path, "7\ta\t1\t1\n")).traits
    assert traits["age"].ids.tolist() == [1, 0, 6]
    assert traits["age"].rows == 7


def test_vectors_meet_in_cross_layers_if_asked_to(data: RatingData):
    crossed = movielens.click_model(data, "dcn")
    assert (crossed.interaction, crossed.cross_layers, crossed.cross_rank) == ("dcn", 3, 64)
    assert crossed.features == movielens.click_model(data).features


def test_config_shares_the_item_table(data: RatingData):
    config = movielens.click_model(data)
    tables = {feature.name: feature.table for feature in config.features}
    assert tables["liked"] == tables["item"]
    sides = {feature.name: feature.side for feature in config.features}
    assert [name for name, side in sides.items() if side == "item"] == ["item", "year", "genres"]


def test_training_ends_before_the_test_begins(tmp_path: Path):
    data = movielens.load(write(tmp_path, random_log(seed=2, interactions=90)))
    assert data.train.times.max() < data.test.times.min()
    assert len(data.train) + len(data.test) == 90
    assert 64 <= len(data.train) <= 72
    check_batch(data.config, data.train.batch)
    check_batch(data.config, data.test.batch)


def test_no_second_is_cut_in_two(tmp_path: Path):
    times = [0, 1, 2, 3, 4, 5, 7, 7, 7, 8]
    data = movielens.load(write(tmp_path, "".join(f"7\ta\t4\t{time}\n" for time in times)))
    assert data.train.times.tolist() == times[:6]
    assert data.test.times.tolist() == times[6:]


def test_requests_come_in_order_of_time(tmp_path: Path):
    users = "777777777777777798979877"
    rated = "".join(f"{user}\ta\t4\t{time}\n" for time, user in enumerate(users))
    data = movielens.load(write(tmp_path, rated))
    assert len(data.train) == 19
    assert [(user, len(labels)) for user, _, labels in data.requests()] == [(0, 3), (2, 1), (1, 1)]


def test_requests_are_the_test_samples_of_one_user_each(tmp_path: Path):
    data = movielens.load(write(tmp_path, random_log(seed=3, interactions=200)))
    requests = data.requests()
    assert sorted(user for user, _, _ in requests) == sorted(set(data.test.users.tolist()))
    for user, batch, labels in requests:
        mine = np.flatnonzero(data.test.users == user)
        assert labels.tolist() == data.test.labels[mine].tolist()
        for place, sample in enumerate(mine.tolist()):
            assert row(batch, place)[1] == row(data.test.batch, sample)[1]
            np.testing.assert_array_equal(batch.dense[place], data.test.batch.dense[sample])


@pytest.mark.parametrize("samples", [[], [0], [69], [5, 5, 0, 69, 3]])
def test_take_is_a_join_of_single_samples(data: RatingData, samples: list[int]):
    batch = samples_of(data)
    taken = movielens.take(batch, np.array(samples, np.int64))
    assert taken.samples == len(samples)
    for place, sample in enumerate(samples):
        assert row(taken, place)[1] == row(batch, sample)[1]
        np.testing.assert_array_equal(taken.dense[place], batch.dense[sample])


@pytest.mark.parametrize(
    ("rated", "message"),
    [
        ("7\ta\t4\n", r"ml-100k.inter, line 2: 3 fields, not 4"),
        ("7\tz\t4\t100\n", r"ml-100k.inter: item_id 'z' is not described"),
        ("1\ta\t4\t100\n", r"ml-100k.inter: user_id '1' is not described"),
        ("7\ta\tgood\t100\n", r"ml-100k.inter, column rating: .*'good'"),
        ("", r"ml-100k.inter: has a header and nothing behind it"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, rated: str, message: str):
    with pytest.raises(DataError, match=message):
        movielens.load(write(tmp_path, rated))


def test_a_missing_file_is_named(tmp_path: Path):
    write(tmp_path, "7\ta\t4\t100\n")
    (tmp_path / "ml-100k.item").unlink()
    with pytest.raises(DataError, match=r"ml-100k.item: cannot be read.*pip install --no-deps"):
        movielens.load(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path):
    write(tmp_path, "7\ta\t4\t100\n")
    (tmp_path / "ml-100k.item").write_text("item_id:token\tclass:token_seq\na\tDrama\n")
    with pytest.raises(DataError, match=r"ml-100k.item: has no column release_year"):
        movielens.load(tmp_path)


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps recbole==1\.2\.1$"):
        movielens.load()


def test_the_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    folder.mkdir(parents=True)
    (tmp_path / "recbole" / "__init__.py").write_text("raise ImportError('needs torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "recbole", raising=False)
    assert movielens.find() == folder
    assert "recbole" not in sys.modules


def test_the_whole_data_set():
    try:
        data = movielens.load()
    except DataError as error:
        pytest.skip(str(error))
    assert len(data.train) + len(data.test) == 100_000
    assert abs(len(data.train) - 80_000) < 10
    assert data.config.feature_rows[0] == 943
    assert data.train.times.max() < data.test.times.min()
    check_batch(data.config, data.train.batch)
    check_batch(data.config, data.test.batch)
    lengths = np.diff(data.train.batch.offsets).reshape(len(data.train), -1).mean(axis=0)
    for feature, length in zip(data.config.features, lengths, strict=True):
        assert length == pytest.approx(feature.bag.mean, rel=0.1), feature.name
