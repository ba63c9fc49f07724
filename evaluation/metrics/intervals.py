"""How far a figure may be off by the choice of pictures: 95% intervals from resampled pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

DRAWS, AT_ONCE, LEVEL = 1000, 50, 0.95
Interval = tuple[float, float]
Ratio = tuple[np.ndarray, np.ndarray]  # (N,) what counts of each picture, (N,) of how much


def intervals(columns: np.ndarray, read: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> list[Interval | None]:
    """Percentile intervals of figures that are functions of sums over pictures.

    columns: (N, M) numbers of each picture. read: (B, M) sums to (B, F) figures, NaN where there is nothing to count.
    Pictures are drawn, not queries: queries about one picture are not independent. The order of the pictures has no
    say, so shards and resumed runs give the same intervals. None below two pictures, or where nothing is counted.
    """
    columns = np.asarray(columns, dtype=np.float64)
    number = len(columns)
    figures = read(columns.sum(axis=0, keepdims=True)).shape[1]
    if number < 2:
        return [None] * figures
    columns = columns[np.lexsort(columns.T)]
    rng, values = np.random.default_rng(seed), []
    shift = number * np.arange(AT_ONCE)[:, None]
    for _ in range(DRAWS // AT_ONCE):
        drawn = rng.integers(number, size=(AT_ONCE, number)) + shift
        times = np.bincount(drawn.ravel(), minlength=AT_ONCE * number).reshape(AT_ONCE, number)
        values.append(read(times @ columns))
    return [_percentiles(column) for column in np.concatenate(values).T]


def ratio_intervals(shares: Mapping[str, Ratio]) -> dict[str, Interval | None]:
    """Intervals of sum(parts) / sum(wholes) for each named share."""
    if not shares:
        return {}
    columns = np.stack([column for share in shares.values() for column in share], axis=1)
    return dict(zip(shares, intervals(columns, lambda sums: quotient(sums[:, ::2], sums[:, 1::2])), strict=True))


def quotient(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Elementwise parts / wholes, NaN where the whole is 0."""
    return np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)


def _percentiles(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
