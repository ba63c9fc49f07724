"""Bootstrap: 95 % intervals of figures over the choice of images, from resampled images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from evaluation.metrics.base import Interval

RESAMPLES = 1000
BLOCK = 50  # resamples per block; a block holds (BLOCK, images) numbers
LEVEL = 0.95
Ratio = tuple[np.ndarray, np.ndarray]  # (N,) numerator and (N,) denominator per image


@dataclass(frozen=True)
class Statistics:
    """Figures as functions of sums over images, which is all that resampling needs.

    names: of F figures, "" of one that is not given. columns: (N, M) numbers per image, in the order in which the
    images were added. read: (B, M) sums to (B, F) figures, NaN where there is nothing to count.
    """

    names: tuple[str, ...]
    columns: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def intervals(self) -> dict[str, Interval | None]:
        """The interval of each figure."""
        return {name: found for name, found in zip(self.names, intervals(self.columns, self.read), strict=True) if name}

    def only(self, names: Collection[str], ending: str = "") -> Statistics:
        """The figures of these names, with an ending; the resamples stay the same."""
        return replace(self, names=tuple(f"{name}{ending}" if name in names else "" for name in self.names))

    def differences(self, other: Statistics) -> dict[str, Interval | None]:
        """Intervals of `other` minus this one for every figure of both; row n of both is about the same image.

        Both are read from the same resamples, so what makes an image hard for both of them cancels out.
        """
        if len(self.columns) != len(other.columns):
            raise ValueError(f"{len(self.columns)} images against {len(other.columns)}: nothing to pair")
        names = [name for name in self.names if name and name in other.names]
        own, others = ([side.names.index(name) for name in names] for side in (self, other))
        width = self.columns.shape[1]

        def read(sums: np.ndarray) -> np.ndarray:
            return other.read(sums[:, width:])[:, others] - self.read(sums[:, :width])[:, own]

        if not names:
            return {}
        return dict(zip(names, intervals(np.concatenate([self.columns, other.columns], axis=1), read), strict=True))


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


def of_ratios(ratios: Mapping[str, Ratio]) -> Statistics:
    """sum(numerators) / sum(denominators) by name; at least one ratio."""
    columns = np.stack([column for ratio in ratios.values() for column in ratio], axis=1)
    return Statistics(tuple(ratios), columns, lambda sums: quotient(sums[:, ::2], sums[:, 1::2]))


def ratio_intervals(ratios: Mapping[str, Ratio]) -> dict[str, Interval | None]:
    """Intervals of sum(numerators) / sum(denominators) by name."""
    return of_ratios(ratios).intervals() if ratios else {}


def quotient(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Elementwise parts / wholes, NaN where the whole is 0."""
    return np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)


def _percentiles(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
