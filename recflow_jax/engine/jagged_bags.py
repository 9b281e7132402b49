"""Samples with bags of any length: whether all is well with them, and ids as rows of groups.

Where numba is (the extra `threads`) in one pass, of a large request by several threads while
Python's interpreter is left to others; else in numpy's passes, block by block of samples.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import unwrap
from typing import Any

import numpy as np

from recflow_jax.batch import MAX_IDS
from recflow_jax.config import DLRMConfig
from recflow_jax.engine import copy_threads
from recflow_jax.engine.fixed_bags import INT32, are_below, copy_ids
from recflow_jax.layout import Layout
from scheduling.host_costs import LARGE_IDS

WORTH_IDS = 256  # of a sample, expected: fewer are not worth the seconds that compiling takes
BLOCK_IDS = 2**16  # made rows at a time, so that the arrays in between stay in the cache

Pass = Callable[..., bool]


class JaggedBags:
    """The bags of a model's samples. compiles: with numba, if it is there: in a second or two, when
    the first of these is made.
    """

    def __init__(self, config: DLRMConfig, layout: Layout, *, compiles: bool) -> None:
        self._limits = np.array(config.feature_rows, np.uint32)
        self._bases = np.array(layout.feature_bases, np.int32)
        self._longest = np.array([f.longest_bag or MAX_IDS for f in config.features], np.int64)
        self._small = self._large = None
        if compiles:
            self._small, self._large = one_pass(1), one_pass(copy_threads.threads(), frees=True)

    def rows(self, values: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
        """int32 [ids], each id as a row of its group; None where a bag is no bag of `values`, or
        too long, or an id is outside its table. offsets: int64 [samples * features + 1], which
        nobody writes to; of `values` somebody may: what is looked at is what was read once.
        """
        if offsets[0] != 0 or offsets[-1] != len(values):
            return None
        one_pass = self._large if len(values) >= LARGE_IDS else self._small
        if one_pass is None or values.dtype != INT32 or not values.flags.c_contiguous:
            return self._by_numpy(values, offsets)
        rows = np.empty(len(values), np.int32)
        of_features = (self._limits, self._bases, self._longest)
        return rows if one_pass(values, offsets, *of_features, rows) else None

    def _by_numpy(self, values: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
        features, lengths = len(self._limits), offsets[1:] - offsets[:-1]
        # As unsigned integers, lengths below 0 are above all others.
        unsigned, longest = lengths.view(np.uint64), self._longest.view(np.uint64)
        if np.count_nonzero(unsigned.reshape(-1, features) > longest):
            return None
        samples = len(lengths) // features
        rows = np.empty(len(values), np.int32)
        step = min(max(BLOCK_IDS * samples // max(len(values), 1), 1), samples)
        limits, bases = np.tile(self._limits, step), np.tile(self._bases, step)
        for start in range(0, samples, max(step, 1)):
            counts = lengths[start * features : (start + step) * features]
            first = start * features
            ids = slice(offsets[first], offsets[first + len(counts)])
            if not copy_ids(values[ids], out=rows[ids], of=len(values)):
                return None
            if not are_below(rows[ids], np.repeat(limits[: len(counts)], counts)):
                return None
            rows[ids] += np.repeat(bases[: len(counts)], counts)
        return rows


@cache
def one_pass(count: int, *, frees: bool = False) -> Pass | None:
    """(values, offsets, rows of tables, first rows in groups, longest bags, out) -> whether all is
    well, by `count` threads. frees: whether it leaves the interpreter to others. None without numba
    or a layer for several threads.
    """
    features = (np.ones(1, np.uint32), np.zeros(1, np.int32), np.ones(1, np.int64))
    nothing = np.zeros(0, np.int32)
    probe = (nothing, np.zeros(2, np.int64), *features, nothing)
    return copy_threads.compiled(partial(_compiled, frees=frees), count, *probe)


def _compiled(numba: Any, count: int, *, frees: bool) -> Pass:
    share, operands = _share(numba)

    def alone(values: Any, offsets: Any, limits: Any, bases: Any, longest: Any, out: Any) -> Any:
        return share(values, offsets, limits, bases, longest, out, 0, 1) == 0

    def together(values: Any, offsets: Any, limits: Any, bases: Any, longest: Any, out: Any) -> Any:
        of_caller = numba.get_num_threads()
        numba.set_num_threads(count)
        bad = 0
        for part in numba.prange(count):
            bad += share(values, offsets, limits, bases, longest, out, part, count)
        numba.set_num_threads(of_caller)
        return bad == 0

    compile_it = numba.njit(numba.types.boolean(*operands), nogil=frees, parallel=count > 1)
    return compile_it(unwrap(together if count > 1 else alone))  # without what tests put around it


@cache
def _share(numba: Any) -> tuple[Any, tuple[Any, ...]]:
    """A part of the pass, compiled, and the types of the operands of all of it."""
    types = numba.types
    int32s, int64s, uint32s = (
        types.Array(kind, 1, "C", readonly=True)
        for kind in (types.int32, types.int64, types.uint32)
    )
    operands = (int32s, int64s, uint32s, int32s, int64s, types.int32[::1])

    def share(
        values: Any,
        offsets: Any,
        limits: Any,
        bases: Any,
        longest: Any,
        out: Any,
        part: Any,
        parts: Any,
    ) -> Any:
        """How much is known to be wrong with one of `parts` runs of samples: 0 or 1."""
        features = len(limits)
        samples = (len(offsets) - 1) // features
        first, last = samples * part // parts, samples * (part + 1) // parts
        start = offsets[first * features]
        if start < 0:
            return 1
        for sample in range(first, last):
            for feature in range(features):
                stop = offsets[sample * features + feature + 1]
                if not start <= stop <= min(len(values), start + longest[feature]):
                    return 1
                limit, base = limits[feature], bases[feature]
                for place in range(numba.uint64(start), numba.uint64(stop)):
                    row = values[place]
                    if numba.uint32(row) >= limit:
                        return 1
                    out[place] = row + base
                start = stop
        return 0

    counted = types.int64(*operands, types.int64, types.int64)
    return numba.njit(counted, nogil=True)(unwrap(share)), operands
