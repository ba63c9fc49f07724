"""Maps a function over tensors of several images with one call for all that have the same shape and key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def map_batched(work: Callable[[Tensor, Key], Tensor], values: Sequence[Tensor], keys: Sequence[Key]) -> list[Tensor]:
    """[work(value, key), ...] for tensors (N, ...), with one call of `work` per key and trailing shape.

    work: (sum of N, ...) and a key -> a tensor with as many entries in its first dimension. For example, three images
    with 2, 1 and 4 masks and two image sizes as keys take two calls, of which one gets the masks of two images.
    """
    groups: dict[tuple[Key, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, (value, key) in enumerate(zip(values, keys, strict=True)):
        groups[key, value.shape[1:]].append(index)
    results: list[Tensor] = [torch.empty(0)] * len(values)
    for (key, _), indices in groups.items():
        group = [values[index] for index in indices]
        joint = work(group[0] if len(group) == 1 else torch.cat(group), key)
        for index, result in zip(indices, joint.split([len(value) for value in group]), strict=True):
            results[index] = result
    return results
