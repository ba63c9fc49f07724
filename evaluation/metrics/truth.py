"""The truth of a record as tensors of the image's size: masks of targets, ignored pixels, the target of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from data.collate import rasterize_ignored, rasterize_target
from data.types import Record
from evaluation.metrics.matching import Names
from evaluation.protocols import Reply


def is_present(record: Record, target: int) -> bool:
    """Whether the data say that the target is in the image, whatever its mask holds."""
    return target >= 0 and record.targets[target].mask is not None


def true_mask(record: Record, target: int, shape: tuple[int, int]) -> Tensor:
    """(H, W) bool, empty for an absent target. Raises EmptyMask where a present target's mask has no pixel."""
    if not is_present(record, target):
        return torch.zeros(shape, dtype=torch.bool)
    return torch.from_numpy(rasterize_target(record, target, shape))


def ignored_pixels(record: Record, reply: Reply) -> Tensor | None:
    """(H, W) bool on the device of the reply's masks: pixels that no standard metric counts. None without any."""
    if record.ignore is None:
        return None
    return torch.from_numpy(rasterize_ignored(record, reply.size)).to(reply.masks.device)


def targets_by_class(record: Record, names: Names) -> dict[int, int]:
    """Class index -> index of its target, for the classes that are in the image.

    Raises ValueError where a class has two targets, or a target is in none of the classes.
    """
    targets: dict[int, int] = {}
    for index, target in enumerate(record.targets):
        if target.mask is None:
            continue
        place = names.exact(target.phrase)
        if place is None:
            raise ValueError(f"{record.image}: the target {target.phrase!r} is not in the class list")
        if place in targets:
            raise ValueError(
                f"{record.image}: several targets are {target.phrase!r}; a class list is scored with one target per "
                "class (of part sets: instances: union)"
            )
        targets[place] = index
    return targets
