"""Bootstrap: 95 % intervals of figures over the choice of images, from resampled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from evaluation.metrics.base import Interval

RESAMPLES = 1000
BLOCK = 50  # resamples per block; a block holds (BLOCK, images) numbers
LEVEL = 0.95
Ratio = tuple[np.ndarray, np.ndarray]  # (N,) numerator and (N,) denominator per image


def intervals(columns: np.ndarray, read: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> list[Interval | None]:
    """Percentile intervals of figures that are functions of sums over images.

    columns: (N, M) numbers per image. read: (B, M) sums to (B, F) figures, NaN where there is nothing to count. Returns
    F intervals, None with fewer than two images or where nothing is counted.

    Images are resampled, not queries, since queries about the same image are not independent. The order of the images
    does not matter, so sharded and resumed runs give the same intervals.

    A resample of N images is described by how often each of them occurs. With the numerators and denominators of three
    images [[1, 2], [3, 4], [0, 5]] and the sampled indices 0, 2, 2 these are [1, 0, 2], the sums [1, 12], and the
    figure is 1 / 12: one matrix product serves a block of resamples.
    """
    columns = np.asarray(columns, dtype=np.float64)
    images = len(columns)
    figures = read(columns.sum(axis=0, keepdims=True)).shape[1]
    if images < 2:
        return [None] * figures
    columns = columns[np.lexsort(columns.T)]  # one order, whichever the images came in
    rng = np.random.default_rng(seed)
    shift = images * np.arange(BLOCK)[:, None]  # so that one bincount serves all resamples of a block
    values = []
    for _ in range(RESAMPLES // BLOCK):
        sampled = rng.integers(images, size=(BLOCK, images)) + shift
        times = np.bincount(sampled.ravel(), minlength=BLOCK * images).reshape(BLOCK, images)
        values.append(read(times @ columns))
    return [_percentiles(column) for column in np.concatenate(values).T]


def ratio_intervals(ratios: Mapping[str, Ratio]) -> dict[str, Interval | None]:
    """Intervals of sum(numerators) / sum(denominators) by name."""
    if not ratios:
        return {}
    columns = np.stack([column for ratio in ratios.values() for column in ratio], axis=1)
    return dict(zip(ratios, intervals(columns, lambda sums: quotient(sums[:, ::2], sums[:, 1::2])), strict=True))


def quotient(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Elementwise parts / wholes, NaN where the whole is 0."""
    return np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)


def _percentiles(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
