"""What was known strictly before each interaction of a rating log: counts, means and liked items.

Interactions of the same second as a sample, its own among them, are never part of what it knows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Keys = Int[np.ndarray, " interactions"]
Times = Int[np.ndarray, " interactions"]
Values = Float[np.ndarray, " interactions"]

PRIOR_COUNT = 5
PRIOR_RATING = 3.5
RECENT = 10
SECONDS_PER_DAY = 86_400
NEVER_SECONDS = 365 * SECONDS_PER_DAY

DENSE = (
    "user_count",
    "user_mean",
    "user_bias",
    "user_recent_bias",
    "user_spread",
    "era_taste",
    "genre_count",
    "genre_bias",
    "genre_taste",
    "item_count",
    "item_mean",
    "item_bias",
    "item_bias_at_age",
    "user_idle",
    "hour_sin",
    "hour_cos",
    "weekend",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RatingLog:
    """Who rated what, how and when (seconds), in order of time."""

    users: Keys
    items: Keys
    ratings: Values
    times: Times


def sums_before(keys: Keys, times: Times, values: Values, *, last: int | None = None) -> Values:
    """For each interaction, the sum of `values` over those of the same key and an earlier time.

    `last` keeps only that many of the latest of them.
    """
    order = np.lexsort((times, keys))
    key_starts = _run_starts(keys[order])
    run_starts = np.maximum(key_starts, _run_starts(times[order]))
    first = key_starts if last is None else np.maximum(key_starts, run_starts - last)
    total = np.concatenate([[0.0], np.cumsum(values[order])])
    sums = np.empty(len(keys))
    sums[order] = total[run_starts] - total[first]
    return sums


def _run_starts(sorted_keys: np.ndarray) -> np.ndarray:
    """For each element, where its run of equal elements starts."""
    starts = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(sorted_keys)]
    return np.maximum.accumulate(np.where(starts, np.arange(len(sorted_keys)), 0))


def counts_before(keys: Keys, times: Times, *, last: int | None = None) -> Values:
    """For each interaction, how many of the same key have an earlier time (at most `last`)."""
    return sums_before(keys, times, np.ones(len(keys)), last=last)


def _mean_before(
    keys: Keys, times: Times, values: Values, prior: Values | float, last: int | None = None
) -> Values:
    """The mean of the earlier `values` of the same key, drawn to `prior` where they are few."""
    total = sums_before(keys, times, values, last=last)
    return (total + PRIOR_COUNT * prior) / (counts_before(keys, times, last=last) + PRIOR_COUNT)


def dense_features(
    log: RatingLog,
    *,
    genres: Bool[np.ndarray, "interactions genres"],
    eras: Keys,
    age_groups: Keys,
) -> Float[np.ndarray, "interactions dense"]:
    """The columns of DENSE, of order 1. Of each interaction are given the genres and the era of
    its item and the age group of its user.
    """
    seen = _expect(log)
    columns = {
        **_user_columns(log, seen),
        **_taste_columns(log, seen, genres, eras),
        **_item_columns(log, seen, age_groups),
        "user_idle": _log_idle(log.users, log.times),
        **_clock(log.times),
    }
    return np.stack([columns[name] for name in DENSE], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Expected:
    """What earlier ratings led to expect of each interaction.

    A bias is a mean of ratings less what the other side led to expect: a user's less the means
    of the items, an item's less the means of the users who gave them.
    """

    overall: Values
    user_mean: Values
    item_mean: Values
    user_bias: Values
    item_bias: Values

    @property
    def rating(self) -> Values:
        """The rating to expect, from both sides."""
        return self.overall + self.user_bias + self.item_bias


def _expect(log: RatingLog) -> _Expected:
    users, items, ratings, times = log.users, log.items, log.ratings, log.times
    overall = _mean_before(np.zeros_like(users), times, ratings, PRIOR_RATING)
    user_mean = _mean_before(users, times, ratings, overall)
    item_mean = _mean_before(items, times, ratings, overall)
    return _Expected(
        overall=overall,
        user_mean=user_mean,
        item_mean=item_mean,
        user_bias=_mean_before(users, times, ratings - item_mean, 0),
        item_bias=_mean_before(items, times, ratings - user_mean, 0),
    )


def _user_columns(log: RatingLog, seen: _Expected) -> dict[str, np.ndarray]:
    users, times = log.users, log.times
    surprise = log.ratings - seen.item_mean
    return {
        "user_count": _log_count(counts_before(users, times)),
        "user_mean": seen.user_mean - seen.overall,
        "user_bias": seen.user_bias,
        "user_recent_bias": _mean_before(users, times, surprise, 0, last=RECENT),
        "user_spread": _mean_before(users, times, (log.ratings - seen.user_mean) ** 2, 1),
    }


def _taste_columns(
    log: RatingLog, seen: _Expected, genres: Bool[np.ndarray, "interactions genres"], eras: Keys
) -> dict[str, np.ndarray]:
    # Against the items' means a genre's bias holds the user's own level too, against both sides
    # only the taste: the two together rank better than either.
    taste = log.ratings - seen.rating
    return {
        "era_taste": _mean_before(_pairs(log.users, eras), log.times, taste, 0),
        "genre_count": _log_count(_genre_count(log, genres)),
        "genre_bias": _genre_mean(log, genres, log.ratings - seen.item_mean),
        "genre_taste": _genre_mean(log, genres, taste),
    }


def _item_columns(log: RatingLog, seen: _Expected, age_groups: Keys) -> dict[str, np.ndarray]:
    surprise = log.ratings - seen.user_mean
    of_age = _pairs(log.items, age_groups)
    return {
        "item_count": _log_count(counts_before(log.items, log.times)),
        "item_mean": seen.item_mean - seen.overall,
        "item_bias": seen.item_bias,
        "item_bias_at_age": _mean_before(of_age, log.times, surprise, 0),
    }


def _pairs(first: Keys, second: Keys) -> Keys:
    """One key for each pair of keys from 0 on."""
    return first.astype(np.int64) * (second.max(initial=0) + 1) + second


def _log_count(counts: Values) -> Values:
    return np.log1p(counts) / 4


def _log_idle(users: Keys, times: Times) -> Values:
    """log of the seconds since the user's last interaction, 0 to about 1."""
    previous = sums_before(users, times, times.astype(np.float64), last=1)
    seconds = np.minimum(times - previous, NEVER_SECONDS)
    return np.log1p(seconds) / np.log1p(NEVER_SECONDS)


def _clock(times: Times) -> dict[str, np.ndarray]:
    angle = 2 * np.pi * (times % SECONDS_PER_DAY) / SECONDS_PER_DAY
    weekday = (times // SECONDS_PER_DAY + 3) % 7  # 1 January 1970 was a Thursday
    return {"hour_sin": np.sin(angle), "hour_cos": np.cos(angle), "weekend": weekday >= 5}


def _genre_mean(
    log: RatingLog, genres: Bool[np.ndarray, "interactions genres"], values: Values
) -> Values:
    """The mean of the user's earlier `values` with each of the sample's genres, averaged."""
    sample, genre = np.nonzero(genres)
    keys = _pairs(log.users[sample], genre)
    return _average(genres, _mean_before(keys, log.times[sample], values[sample], 0))


def _genre_count(log: RatingLog, genres: Bool[np.ndarray, "interactions genres"]) -> Values:
    """How many earlier interactions the user has with each of the sample's genres, averaged."""
    sample, genre = np.nonzero(genres)
    keys = _pairs(log.users[sample], genre)
    return _average(genres, counts_before(keys, log.times[sample]))


def _average(
    genres: Bool[np.ndarray, "interactions genres"], of_pairs: Float[np.ndarray, " pairs"]
) -> Values:
    """The mean over each sample's genres of one value per pair of sample and genre."""
    sample, _ = np.nonzero(genres)
    total = np.bincount(sample, weights=of_pairs, minlength=len(genres))
    return total / np.maximum(genres.sum(axis=1), 1)


def liked_before(
    log: RatingLog, liked: Bool[np.ndarray, " interactions"], *, last: int
) -> tuple[Int[np.ndarray, " ids"], Int[np.ndarray, " interactions_and_one"]]:
    """Each sample's bag of the `last` latest items that its user liked earlier, oldest first.

    Returns (values, offsets).
    """
    users, items, times = log.users, log.items, log.times
    counts = sums_before(users, times, liked.astype(np.float64)).astype(np.int64)
    by_user = np.flatnonzero(liked)[np.lexsort((times[liked], users[liked]))]
    stops = np.searchsorted(users[by_user], users) + counts
    lengths = np.minimum(counts, last)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return items[by_user][np.repeat(stops - lengths, lengths) + within], offsets
