"""Maps a function over per-image tensors, batching those of equal shape and key into one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def map_batched(work: Callable[[Tensor, Key], Tensor], values: Sequence[Tensor], keys: Sequence[Key]) -> list[Tensor]:
    """[work(value, key), ...] for tensors (N, ...), with one call for all that have the same key and shape."""
    groups = defaultdict(list)
    for index, (value, key) in enumerate(zip(values, keys, strict=True)):
        groups[key, value.shape[1:]].append(index)
    results: list[Tensor] = [torch.empty(0)] * len(values)
    for (key, _), indices in groups.items():
        mine = [values[index] for index in indices]
        done = work(mine[0] if len(mine) == 1 else torch.cat(mine), key)
        for index, result in zip(indices, done.split([len(value) for value in mine]), strict=True):
            results[index] = result
    return results
