"""MovieLens-100K as a click model: who liked which movie (rating >= 4), in order of time.

The data set (F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and
Context", ACM TiiS 5(4), 2015) is GroupLens Research's, free for research use; it may not be
redistributed without their permission nor used commercially without it, and it is not
redistributed here. It is read, as data only, from the PyPI package recbole 1.2.1, which carries
it; recbole itself is never imported.

What a sample may know is what happened strictly before its own time: interactions of the same
second, its own among them, are not in its features.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.data.history import DENSE, RatingLog, dense_features, liked_before

REMEDY = "pip install --no-deps recbole==1.2.1"
LIKED = 4
HISTORY = 50
TRAIN_SHARE = 0.8

TRAIT_COLUMNS = ("age", "gender", "occupation", "zip_code")
AGE_STARTS = (18, 25, 35, 45, 50, 56)
ZIP_ROWS = 11  # the first digit, or none
FIRST_YEAR, YEAR_ROWS = 1920, 80
YEARS_PER_ERA = 5
DIM = 16
CROSS_LAYERS, CROSS_RANK = 3, 64
ClickInteraction = Literal["dot", "dcn"]
LIKED_BAG = BagConfig(kind="normal", mean=32, sd=18, max=HISTORY)
GENRES_BAG = BagConfig(kind="normal", mean=2, sd=1, max=6)


class DataError(RuntimeError):
    """Data that is missing or is not MovieLens; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Interactions in order of time, ready for the model.

    labels: float32 [n], 1 where the user liked the item. users: int32 [n]. times: int64 [n],
    seconds since 1970.
    """

    batch: JaggedBatch
    labels: Float[np.ndarray, " samples"]
    users: Int[np.ndarray, " samples"]
    times: Int[np.ndarray, " samples"]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Samples":
        """Samples [start, stop)."""
        return Samples(
            batch=self.batch.part(start, stop),
            labels=self.labels[start:stop],
            users=self.users[start:stop],
            times=self.times[start:stop],
        )

    def until(self, share: float) -> int:
        """How many samples the first `share` of time-ordered samples are, no second cut in two."""
        return int(np.searchsorted(self.times, self.times[int(share * len(self))]))


@dataclass(frozen=True, kw_only=True, eq=False)
class MovieLens:
    """The click model's config and its samples: all of `train` is earlier than all of `test`."""

    config: DLRMConfig
    train: Samples
    test: Samples

    def requests(self) -> list[tuple[int, JaggedBatch, np.ndarray]]:
        """The test samples as requests: (user, the user's samples by time, labels), in order
        of the users' first test interactions.
        """
        order = np.argsort(self.test.users, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(self.test.users[order])) + 1)
        groups.sort(key=lambda group: group[0])
        return [
            (int(self.test.users[g[0]]), take(self.test.batch, g), self.test.labels[g])
            for g in groups
        ]


def take(batch: JaggedBatch, samples: Int[np.ndarray, " taken"]) -> JaggedBatch:
    """The named samples of an unweighted `batch`, in that order."""
    bag_lengths = np.diff(batch.offsets).reshape(batch.samples, -1)[samples].ravel()
    starts, stops = batch.id_offsets[samples], batch.id_offsets[samples + 1]
    lengths = stops - starts
    shifts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return JaggedBatch(
        dense=batch.dense[samples],
        values=batch.values[shifts + np.arange(len(shifts))],
        offsets=np.concatenate([[0], np.cumsum(bag_lengths)]),
    )


def load(
    directory: str | Path | None = None, *, interaction: ClickInteraction = "dot"
) -> MovieLens:
    """Reads ml-100k.{inter,item,user} from `directory` (default: recbole's copy).

    Raises DataError if a file is missing or is not what its header says.
    """
    data = read(Path(directory) if directory else find())
    config = click_model(data, interaction)
    samples = make_samples(config, data)
    cut = samples.until(TRAIN_SHARE)
    return MovieLens(
        config=config, train=samples.part(0, cut), test=samples.part(cut, len(samples))
    )


def find() -> Path:
    """The folder of recbole's copy, found without importing recbole. Raises DataError."""
    spec = importlib.util.find_spec("recbole")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "dataset_example" / "ml-100k"
        if path.is_dir():
            return path
    raise DataError(f"MovieLens-100K is not installed; get it with: {REMEDY}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trait:
    """What is known of every user: ids [users] in [0, rows)."""

    ids: Int[np.ndarray, " users"]
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RatingData:
    """The files as numbers. Interactions are in order of time; ids count lines from 0."""

    log: RatingLog
    traits: dict[str, Trait]  # age, gender, occupation, zip
    years: Int[np.ndarray, " all_items"]
    genres: Bool[np.ndarray, "all_items genres"]

    @property
    def liked(self) -> Bool[np.ndarray, " interactions"]:
        """Whether each interaction is a click."""
        return self.log.ratings >= LIKED


def read(directory: Path) -> RatingData:
    """Parses the three files of `directory`. Raises DataError."""
    item = _columns(directory / "ml-100k.item", ("item_id", "release_year", "class"))
    user = _columns(directory / "ml-100k.user", ("user_id", *TRAIT_COLUMNS))
    return RatingData(
        log=_read_log(directory / "ml-100k.inter", user["user_id"], item["item_id"]),
        traits=_traits(directory / "ml-100k.user", user),
        years=_years(item["release_year"]),
        genres=_genres(item["class"]),
    )


def _read_log(path: Path, users: Sequence[str], items: Sequence[str]) -> RatingLog:
    rated = _columns(path, ("user_id", "item_id", "rating", "timestamp"))
    times = _numbers(path, "timestamp", rated["timestamp"]).astype(np.int64)
    order = np.argsort(times, kind="stable")
    return RatingLog(
        users=_places(path, "user_id", rated["user_id"], users)[order],
        items=_places(path, "item_id", rated["item_id"], items)[order],
        ratings=_numbers(path, "rating", rated["rating"])[order],
        times=times[order],
    )


def _columns(path: Path, wanted: tuple[str, ...]) -> dict[str, list[str]]:
    """The wanted columns of a tab-separated file whose header reads name:type."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {why}; get it with: {REMEDY}") from error
    names = [field.partition(":")[0] for field in header.split("\t")]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}")
    if not lines:
        raise DataError(f"{path}: has a header and nothing behind it")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise DataError(f"{path}, line {number}: {len(row)} fields, not {len(names)}")
    return {name: [row[names.index(name)] for row in rows] for name in wanted}


def _numbers(path: Path, column: str, texts: Sequence[str]) -> np.ndarray:
    try:
        return np.array(texts, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}, column {column}: {error}") from error


def _places(
    path: Path, column: str, tokens: Sequence[str], vocabulary: Sequence[str]
) -> np.ndarray:
    places = {token: place for place, token in enumerate(vocabulary)}
    unknown = sorted(set(tokens) - set(places))
    if unknown:
        raise DataError(f"{path}: {column} {unknown[0]!r} is not described in the other files")
    return np.array([places[token] for token in tokens], np.int32)


def _traits(path: Path, user: Mapping[str, list[str]]) -> dict[str, Trait]:
    ages = _numbers(path, "age", user["age"])
    zips = [int(z[0]) if z[:1].isdecimal() else ZIP_ROWS - 1 for z in user["zip_code"]]
    named = {}
    for column in ("gender", "occupation"):
        names = sorted(set(user[column]))
        named[column] = Trait(ids=_places(path, column, user[column], names), rows=len(names))
    return {
        "age": Trait(
            ids=np.searchsorted(AGE_STARTS, ages, side="right").astype(np.int32),
            rows=len(AGE_STARTS) + 1,
        ),
        **named,
        "zip": Trait(ids=np.array(zips, np.int32), rows=ZIP_ROWS),
    }


def _years(texts: Sequence[str]) -> np.ndarray:
    """Years as ids from 1; 0 where the year is unknown."""
    known = [int(text) if text.isdigit() else 0 for text in texts]
    return np.clip(np.array(known) - FIRST_YEAR + 1, 0, YEAR_ROWS - 1).astype(np.int32)


def _genres(texts: Sequence[str]) -> np.ndarray:
    names = sorted({name for text in texts for name in text.split()})
    return np.array([[name in text.split() for name in names] for text in texts], bool)


def click_model(data: RatingData, interaction: ClickInteraction = "dot") -> DLRMConfig:
    """The model: ten vectors of DIM that meet in pairwise dots, or in cross layers, so that an
    item's row meets the mean row of the items its user liked.
    """
    rows = {
        "user": len(data.traits["age"].ids),
        **{name: trait.rows for name, trait in data.traits.items()},
        "item": len(data.years),
        "year": YEAR_ROWS,
        "genre": data.genres.shape[1],
    }
    user_side = [
        FeatureConfig(name=name, table=name, side="user") for name in ("user", *data.traits)
    ]
    return DLRMConfig(
        name="movielens-100k",
        tables=tuple(TableConfig(name=name, rows=n, dim=DIM) for name, n in rows.items()),
        features=(
            *user_side,
            FeatureConfig(name="liked", table="item", pooling="mean", side="user", bag=LIKED_BAG),
            FeatureConfig(name="item", table="item"),
            FeatureConfig(name="year", table="year"),
            FeatureConfig(name="genres", table="genre", pooling="mean", bag=GENRES_BAG),
        ),
        dense_width=len(DENSE),
        bottom_mlp=(64, DIM),
        interaction=interaction,
        cross_layers=CROSS_LAYERS if interaction == "dcn" else 0,
        cross_rank=CROSS_RANK if interaction == "dcn" else 0,
        top_mlp=(64, 32, 1),
    )


def make_samples(config: DLRMConfig, data: RatingData) -> Samples:
    """One sample per interaction, in order of time."""
    log = data.log
    genres, years = data.genres[log.items], data.years[log.items]
    traits = {name: trait.ids[log.users] for name, trait in data.traits.items()}
    sparse = {
        "user": log.users,
        **traits,
        "liked": liked_before(log, data.liked, last=HISTORY),
        "item": log.items,
        "year": years,
        "genres": (np.nonzero(genres)[1].astype(np.int32), np.cumsum([0, *genres.sum(axis=1)])),
    }
    dense = dense_features(
        log, genres=genres, eras=years // YEARS_PER_ERA, age_groups=traits["age"]
    )
    return Samples(
        batch=JaggedBatch.from_features(config, dense, sparse),
        labels=data.liked.astype(np.float32),
        users=log.users,
        times=log.times,
    )
