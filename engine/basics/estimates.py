"""Estimates with 95% intervals for scores of shape (prompts, images a prompt).

The images of one prompt are not independent, so the bootstrap resamples *prompts* with all their
images (a cluster bootstrap) and takes the 2.5th and 97.5th percentile. With few prompts (under
20 or so) such intervals are somewhat too narrow; with one prompt there is none (NaN).

An image pair with a NaN on either side counts for neither model; callers report how many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STREAM = 12  # keyed.Stream.BOOTSTRAP; not imported, so that this works without the kernels
_LEVEL = (2.5, 97.5)
_CHUNK_ELEMENTS = 4_000_000  # bounds the memory of a block of resamples to about 60 MB


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; NaN where there is nothing to estimate from."""

    mean: float
    low: float
    high: float


def or_null(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class PairedSummary:
    """Base against tuned on the image pairs that both have a score for."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    """Tuned minus base."""
    win_rate: Estimate
    """Share of image pairs in which tuned scores higher; a tie counts one half."""
    num_prompts: int
    """Prompts with at least one usable pair."""
    num_pairs: int
    num_dropped: int
    """Pairs left out because a score was NaN."""


def paired_summary(
    base: ArrayLike, tuned: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> PairedSummary:
    """Everything the report says about two (P, N) score tables, from the same image pairs."""
    base_pn, tuned_pn = _pair(base, tuned)
    usable = ~np.isnan(base_pn)
    return PairedSummary(
        base=mean_estimate(base_pn, resamples, seed),
        tuned=mean_estimate(tuned_pn, resamples, seed),
        difference=paired_difference(base_pn, tuned_pn, resamples, seed),
        win_rate=win_rate(base_pn, tuned_pn, resamples, seed),
        num_prompts=int(usable.any(axis=1).sum()),
        num_pairs=int(usable.sum()),
        num_dropped=int((~usable).sum()),
    )


def paired_difference(
    base: ArrayLike, tuned: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of tuned - base over image pairs with the same prompt and seed."""
    base_pn, tuned_pn = _pair(base, tuned)
    return mean_estimate(tuned_pn - base_pn, resamples, seed)


def win_rate(base: ArrayLike, tuned: ArrayLike, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Share of image pairs that tuned wins, ties counted half.

    If every pair goes the same way the bootstrap cannot know better and its interval is a point.
    """
    base_pn, tuned_pn = _pair(base, tuned)
    wins = (np.sign(tuned_pn - base_pn) + 1) / 2
    return mean_estimate(wins, resamples, seed)


def win_matrix(
    tables: Sequence[ArrayLike], resamples: int = 10_000, seed: int = 0
) -> list[list[Estimate]]:
    """Of every two models, from their (P, N) tables: how often the row's beats the column's.

    ``matrix[i][j]`` and ``matrix[j][i]`` add up to 1, bounds crosswise; a model ties with itself.
    """
    matrix = [[Estimate(0.5, 0.5, 0.5) for _ in tables] for _ in tables]
    for row, column in itertools.combinations(range(len(tables)), 2):
        wins = win_rate(tables[column], tables[row], resamples, seed)
        matrix[row][column] = wins
        matrix[column][row] = Estimate(1 - wins.mean, 1 - wins.high, 1 - wins.low)
    return matrix


def mean_estimate(values: ArrayLike, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of all values of a (P, N) table that are not NaN."""
    values_pn = _table(values)
    usable = ~np.isnan(values_pn)
    sums = np.where(usable, values_pn, 0.0).sum(axis=1)
    counts = usable.sum(axis=1)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(sums):
        return Estimate(np.nan, np.nan, np.nan)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Estimate(mean, np.nan, np.nan)
    low, high = np.percentile(_resampled_means(sums, counts, resamples, seed), _LEVEL)
    return Estimate(mean, float(low), float(high))


def worst_pairs(base: ArrayLike, tuned: ArrayLike, count: int) -> list[tuple[int, int]]:
    """(prompt, image) indices where tuned falls below base by most, the worst first.

    Only real losses are returned, so the list may be shorter than ``count``.
    """
    base_pn, tuned_pn = _pair(base, tuned)
    difference = np.nan_to_num(tuned_pn - base_pn, nan=0.0)
    order = np.argsort(difference, axis=None, kind="stable")[:count]
    found = [np.unravel_index(index, difference.shape) for index in order]
    return [(int(p), int(n)) for p, n in found if difference[p, n] < 0]


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Means of ``resamples`` draws of as many prompts as there are, with replacement."""
    size = len(sums)
    if resamples * size <= _CHUNK_ELEMENTS:
        blocks: Iterable[NDArray[np.float64]] = [_drawn_once(size, resamples, seed)]
    else:
        blocks = _draw(size, resamples, seed)
    return np.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in blocks])


@lru_cache(maxsize=4)
def _drawn_once(size: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """All draws at once, kept: the many estimates of a comparison share them."""
    return np.concatenate(list(_draw(size, resamples, seed)))


def _draw(size: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each of ``size`` prompts was drawn, (resamples, size) in blocks of rows.

    The same law as drawing indices, so that means are matrix products.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
    chunk = max(1, _CHUNK_ELEMENTS // size)
    for start in range(0, resamples, chunk):
        block = min(chunk, resamples - start)
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=block)
        yield drawn.astype(np.float64)


def _pair(base: ArrayLike, tuned: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both tables, with NaN on both sides wherever either side has none."""
    base_pn, tuned_pn = _table(base), _table(tuned)
    if base_pn.shape != tuned_pn.shape:
        raise ValueError(
            f"base has scores of shape {base_pn.shape} and tuned {tuned_pn.shape}: a paired "
            "comparison needs the same prompts and seeds on both sides"
        )
    unusable = ~(np.isfinite(base_pn) & np.isfinite(tuned_pn))
    return np.where(unusable, np.nan, base_pn), np.where(unusable, np.nan, tuned_pn)


def _table(values: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"scores must have shape (prompts, images), got {table.shape}")
    return table
