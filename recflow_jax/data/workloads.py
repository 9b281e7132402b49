"""Random input for any model, from its config: bags, ids, dense features and request sizes.

Bag lengths follow each feature's BagConfig exactly: a length is drawn from its table of chances,
and expected sizes are sums over the same table. Every draw takes a seed.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import BagConfig, DLRMConfig, FeatureConfig, dense_shapes
from recflow_jax.layout import Layout

MLPERF_REQUEST_SIZES = (100,) * 2 + (200,) * 12 + (300,) * 2 + (400, 500, 600, 700)
"""Samples per query of MLPerf's DLRM-DCNv2, one entry per twentieth of the queries."""

SECTOR_BYTES = 32  # the smallest piece that a GPU reads from device memory
EXACT_RANKS = 1024
_CHUNK_IDS = 2**20  # ids drawn at a time: their temporary arrays stay near the cache


class WorkloadError(ValueError):
    """Input that cannot be drawn; the message names the value."""


@dataclass(frozen=True, kw_only=True)
class IdDistribution:
    """How ids fall on a table's rows; `exponent` is zipf's a in P(rank) ~ rank^-a."""

    kind: Literal["uniform", "zipf"]
    exponent: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "uniform" else f"zipf({self.exponent:g})"


def parse_ids(text: str) -> IdDistribution:
    """Reads "uniform" or "zipf(1.05)". Raises WorkloadError."""
    if text == "uniform":
        return IdDistribution(kind="uniform")
    match = re.fullmatch(r"zipf\((\d+(?:\.\d*)?)\)", text)
    exponent = float(match[1]) if match else 0.0
    if exponent <= 0:
        raise WorkloadError(f"ids {text!r} are neither 'uniform' nor 'zipf(a)' with a > 0")
    return IdDistribution(kind="zipf", exponent=exponent)


def generate(config: DLRMConfig, samples: int, *, seed: int, ids: str = "uniform") -> JaggedBatch:
    """`samples` random samples: int32 ids, standard normal dense features, bags independent.

    Weights of weighted features are uniform in [0.5, 1.5), 1 for the others. Raises
    WorkloadError.
    """
    distribution = parse_ids(ids)
    if samples < 0:
        raise WorkloadError(f"samples is {samples}, below 0")
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((samples, config.dense_width), np.float32)
    lengths = bag_lengths(config, samples, rng)
    offsets = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths.ravel(), out=offsets[1:])
    values = np.empty(offsets[-1], np.int32)
    weights = np.ones(offsets[-1], np.float32) if config.weighted else None
    weighted = np.array([feature.weighted for feature in config.features])
    draw = _RowSampler(config, distribution)
    for first, last, features in _id_chunks(lengths, offsets):
        values[first:last] = draw(rng, features)
        if weights is not None:
            random = rng.random(last - first, np.float32) + np.float32(0.5)
            weights[first:last] = np.where(weighted[features], random, 1)
    return JaggedBatch(dense=dense, values=values, offsets=offsets, weights=weights)


def _id_chunks(lengths: np.ndarray, offsets: np.ndarray):
    """(first, last, the feature of each id) over whole samples, about _CHUNK_IDS at a time."""
    samples, features = lengths.shape
    ends = offsets[features::features] if features else np.zeros(samples, np.int64)
    start = 0
    while start < samples:
        first = int(offsets[start * features])
        stop = max(start + 1, int(np.searchsorted(ends, first + _CHUNK_IDS)))
        block = lengths[start:stop]
        of_bag = np.tile(np.arange(features, dtype=np.int32), len(block))
        yield first, first + int(block.sum()), np.repeat(of_bag, block.ravel())
        start = stop


def bag_lengths(
    config: DLRMConfig, samples: int, rng: np.random.Generator
) -> Int[np.ndarray, "samples features"]:
    """Random bag lengths, int64."""
    lengths = np.zeros((samples, len(config.features)), np.int64)
    columns: dict[tuple[float, ...], list[int]] = {}
    for index, feature in enumerate(config.features):
        columns.setdefault(length_chances(feature), []).append(index)
    for chances, members in columns.items():
        below = np.cumsum(chances)
        draws = rng.random((samples, len(members))) * below[-1]
        drawn = np.searchsorted(below, draws, side="right")
        lengths[:, members] = np.minimum(drawn, len(below) - 1)
    return lengths


def length_chances(feature: FeatureConfig) -> tuple[float, ...]:
    """P(bag has k ids) for k = 0, 1, ...; a `none`-pooled feature's bags end at its hotness."""
    chances = _bag_chances(feature.bag)
    if feature.pooling != "none" or len(chances) <= feature.hotness + 1:
        return chances
    return (*chances[: feature.hotness], math.fsum(chances[feature.hotness :]))


@functools.cache
def _bag_chances(bag: BagConfig) -> tuple[float, ...]:
    chances = _FULL_BAG_CHANCES[bag.kind](bag) * bag.coverage
    chances[0] += 1 - bag.coverage
    return tuple(chances.tolist())


def _fixed_chances(bag: BagConfig) -> Float[np.ndarray, " lengths"]:
    chances = np.zeros(int(bag.mean) + 1)
    chances[-1] = 1
    return chances


def _normal_chances(bag: BagConfig) -> Float[np.ndarray, " lengths"]:
    """floor(X), X normal in [0, max]; without a max, to where the tail is below 1e-15."""
    end = bag.max if bag.kind == "normal" else math.ceil(bag.mean + 8 * bag.sd)
    edges = np.minimum(np.arange(end + 2), end)
    scaled = (edges - bag.mean) / (bag.sd * math.sqrt(2))
    chances = np.diff([math.erf(x) for x in scaled])
    return chances / chances.sum()


def _gamma_poisson_chances(bag: BagConfig) -> Float[np.ndarray, " lengths"]:
    """Poisson with an exponential rate is geometric: P(k) = (1 - q) q^k, q = mean / (mean + 1)."""
    q = bag.mean / (bag.mean + 1)
    chances = (1 - q) * q ** np.arange(bag.max + 1.0)
    chances[-1] = q**bag.max
    return chances


_FULL_BAG_CHANCES = {
    "fixed": _fixed_chances,
    "normal": _normal_chances,
    "one_sided_normal": _normal_chances,
    "gamma_poisson": _gamma_poisson_chances,
}


def expected_ids(config: DLRMConfig) -> Float[np.ndarray, " features"]:
    """The expected length of each feature's bag."""
    chances = [length_chances(feature) for feature in config.features]
    return np.array([np.dot(c, np.arange(len(c))) for c in chances])


def expected_ids_per_sample(config: DLRMConfig) -> float:
    """The expected number of ids of a sample."""
    return float(expected_ids(config).sum())


class _RowSampler:
    """Draws rows for ids whose features are known."""

    def __init__(self, config: DLRMConfig, distribution: IdDistribution):
        index = {table.name: i for i, table in enumerate(config.tables)}
        self._keys = np.array([index[f.table] + 1 for f in config.features], np.int64)
        self._rows = np.array(config.feature_rows, np.int64)
        self._distribution = distribution

    def __call__(self, rng: np.random.Generator, features: np.ndarray) -> np.ndarray:
        draws = rng.random(len(features))
        rows = self._rows[features]
        if self._distribution.kind == "uniform":
            return (draws * rows).astype(np.int32)
        ranks = zipf_ranks(draws, self._rows, self._distribution.exponent, features)
        return scatter_ranks(ranks, rows, self._keys[features]).astype(np.int32)


def zipf_ranks(
    draws: Float[np.ndarray, " ids"],
    rows: Int[np.ndarray, " features"],
    exponent: float,
    features: Int[np.ndarray, " ids"],
) -> Int[np.ndarray, " ids"]:
    """Ranks 0, 1, ... with P(rank k) ~ (k + 1)^-exponent from uniform `draws` in [0, 1).

    Inverse CDF: exact for the first 1024 ranks; behind them the integral of x^-exponent over
    [k + 0.5, k + 1.5] stands for (k + 1)^-exponent, less than 1e-6 off for exponents up to 3.
    """
    head = np.cumsum(np.arange(1, EXACT_RANKS + 1) ** -float(exponent))
    in_head = np.minimum(rows, EXACT_RANKS)
    masses = head[in_head - 1]
    tails = _power_integral(np.maximum(rows, EXACT_RANKS) + 0.5, exponent)
    masses_drawn = draws * (masses + tails)[features]
    ranks = np.searchsorted(head, masses_drawn, side="right")
    behind = np.flatnonzero(masses_drawn >= masses[features])
    x = _power_integral_inverse(masses_drawn[behind] - head[-1], exponent)
    ranks[behind] = np.floor(x + 0.5).astype(np.int64) - 1
    return np.minimum(ranks, rows[features] - 1)


def _power_integral(x: np.ndarray, exponent: float) -> np.ndarray:
    """The integral of t^-exponent from EXACT_RANKS + 0.5 to x."""
    start = EXACT_RANKS + 0.5
    power = 1 - exponent
    if abs(power) < 1e-9:
        return np.log(x / start)
    return start**power * np.expm1(power * np.log(x / start)) / power


def _power_integral_inverse(mass: np.ndarray, exponent: float) -> np.ndarray:
    start = EXACT_RANKS + 0.5
    power = 1 - exponent
    if abs(power) < 1e-9:
        return start * np.exp(mass)
    return start * np.exp(np.log1p(power * mass * start**-power) / power)


def scatter_ranks(
    ranks: Int[np.ndarray, " ids"],
    rows: Int[np.ndarray, " ids"],
    keys: Int[np.ndarray, " ids"],
) -> Int[np.ndarray, " ids"]:
    """A fixed permutation of [0, rows) for each key: where the row of a rank lies.

    Steps that are one-to-one on the next power of two (odd products, xor with the upper half)
    are repeated until the result is below `rows`.
    """
    rows, keys = rows.astype(np.uint64), keys.astype(np.uint64)
    bits = np.ceil(np.log2(np.maximum(rows, 2))).astype(np.uint64)
    found = _mix(ranks.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(found >= rows)
    while len(outside):
        found[outside] = _mix(found[outside], bits[outside], keys[outside])
        outside = outside[found[outside] >= rows[outside]]
    return found.astype(np.int64)


def _mix(x: np.ndarray, bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    half = (bits + np.uint64(1)) >> np.uint64(1)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):
        x = ((x + keys * np.uint64(0x94D049BB133111EB)) * np.uint64(factor)) & mask
        x ^= x >> half
    return x


def request_sizes(count: int, *, seed: int) -> Int[np.ndarray, " count"]:
    """Samples per request, drawn from MLPerf's twentieths (mean 270)."""
    return np.random.default_rng(seed).choice(MLPERF_REQUEST_SIZES, count)


def flops_per_sample(config: DLRMConfig) -> float:
    """Floating-point operations of the matrix products of one sample: MLPs and interaction."""
    bottom, top = dense_shapes(config)
    layers = sum(2 * inputs * outputs for inputs, outputs in [*bottom, *top])
    cross = config.cross_layers * 4 * config.interaction_width * config.cross_rank
    if config.interaction != "dot":
        return float(layers + cross)
    pairs = config.dot_vectors * (config.dot_vectors - 1) // 2
    dim = config.bottom_width or config.table_of(config.features[0]).dim
    return float(layers + 2 * pairs * dim)


@dataclass(frozen=True, kw_only=True)
class GatherBytes:
    """Bytes that one sample's gather moves at least, when no row is read twice."""

    rows: float
    ids: float
    output: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.rows + self.ids + self.output


def gather_bytes_per_sample(config: DLRMConfig) -> GatherBytes:
    """Rows in whole 32-byte sectors, one more for a scale, 4 bytes per id (8 with weights), pooled
    rows written.
    """
    layout = Layout.of(config)
    sectors = [math.ceil(g.value_bytes / SECTOR_BYTES) + g.quantised for g in layout.groups]
    groups = dict(zip((t.name for t in config.tables), layout.table_places, strict=True))
    row_bytes = [SECTOR_BYTES * sectors[groups[f.table][0]] for f in config.features]
    ids = expected_ids(config)
    element = 4 if config.compute_dtype == "float32" else 2
    return GatherBytes(
        rows=float(np.dot(ids, row_bytes)),
        ids=float(ids.sum()) * (8 if config.weighted else 4),
        output=float(config.pooled_width * element),
    )
