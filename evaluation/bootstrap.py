"""How far a figure may be off by the choice of pictures: 95% intervals from resampled pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS, AT_ONCE, LEVEL = 1000, 50, 0.95


def interval(parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of sum(parts) / sum(wholes), where each pair of numbers is one picture's.

    Pictures are drawn, not queries: queries about one picture are not independent. The order of the pictures has no
    say, so shards and resumed runs give the same interval. None below two pictures, or where nothing is counted.
    """
    pairs = np.array(sorted(zip(parts, wholes, strict=True)), dtype=np.float64).reshape(-1, 2)
    if len(pairs) < 2 or not pairs[:, 1].any():
        return None
    rng, values = np.random.default_rng(seed), []
    for _ in range(DRAWS // AT_ONCE):
        sums = pairs[rng.integers(len(pairs), size=(AT_ONCE, len(pairs)))].sum(axis=1)
        counted = sums[sums[:, 1] > 0]
        values.append(counted[:, 0] / counted[:, 1])
    low, high = np.quantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
