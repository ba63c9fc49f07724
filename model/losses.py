"""The training objective: text cross-entropy, mask BCE (refined where targets overlap) and mask dice (lisa.md 5.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.types import Batch
from model.fused_losses import DICE_SMOOTH, bce_and_dice, cross_entropy
from model.point_sampling import sample_points, values_at
from model.seg_model import SegOutput
from utils.batching import map_batched
from utils.config import LossConfig

COUNT_EPS = 1e-8  # as released by LISA
POINT_EPS = 1e-4  # as released by Sa2VA, with points, in Dice alone; BCE has it next to the number of all points
MaskGroup = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # logits, truth, ignore, weights of one image's masks


@dataclass
class Losses:
    """`total` is optimised; `parts` (weighted, detached) are logged."""

    total: Tensor
    parts: dict[str, Tensor]


def objective(output: SegOutput, batch: Batch, config: LossConfig) -> Losses:
    """ce * CE + bce * BCE + dice * Dice over one micro-batch, with the weights of `config`.

    CE is a mean over supervised tokens, BCE and Dice are means over masks: an image with five targets counts five times
    as much in the mask losses as one with a single target (as released, lisa.md 5.3), unless loss.masks_per_image gives
    both the same number. What is random (the choice of masks, the points) comes from torch's generator.
    """
    if [len(masks) for masks in output.masks] != [len(masks) for masks in batch.masks]:
        counts = [(len(predicted), len(truth)) for predicted, truth in zip(output.masks, batch.masks, strict=True)]
        raise ValueError(f"predicted and true masks differ in number, image by image: {counts} {batch.names}")
    ce = config.ce * text_loss(output.token_logits, output.token_targets)
    zero = ce.new_zeros(())
    # the epsilon also makes a batch without masks 0 / 1e-8 = 0, with a graph (its dummy query was sliced off)
    truth, ignore = _truth(output, batch, config)
    images = [
        _counted(group, config.masks_per_image)
        for group in zip(output.masks, truth, ignore, _weights(output, batch, config), strict=True)
    ]
    count = sum(len(masks) for masks, *_ in images)
    groups = (_at_points(group, config.points) if config.points else group for group in _by_size(images))
    sums = [mask_losses(*group, smooth=config.dice_smooth) for group in groups]
    blank = _refused(batch, config)
    count += sum(map(len, blank))
    sums.extend(mask_losses(masks, masks, smooth=config.dice_smooth) for masks in blank)
    bce = config.bce * sum((bce for bce, _ in sums), zero) / (count + COUNT_EPS)
    dice_count = count + (POINT_EPS if config.points else COUNT_EPS)
    dice = config.dice * sum((dice for _, dice in sums), zero) / dice_count
    total = ce + bce + dice
    parts = {"loss": total, "ce": ce, "mask": bce + dice, "bce": bce, "dice": dice}
    return Losses(total, {name: value.detach() for name, value in parts.items()})


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(S, V) logits, (S,) targets. Zero, with a graph, where nothing is supervised."""
    return cross_entropy(logits, targets) if len(targets) else logits.float().sum()


def mask_losses(
    logits: Tensor,
    truth: Tensor,
    ignore: Tensor | None = None,
    weights: Tensor | None = None,
    smooth: float = DICE_SMOOTH,
) -> tuple[Tensor, Tensor]:
    """(N, H, W) float32 logits and truth -> BCE and dice, each summed over the masks.

    ignore: (H, W) or (N, H, W) bool, pixels that count in neither. weights: (N, H, W), of the pixels in BCE; its mean
    stays one over their number. smooth: of dice (loss.dice_smooth).
    """
    ignore = None if ignore is None else ignore.expand(logits.shape)
    bce, dice = bce_and_dice(logits, truth.to(logits.dtype), ignore, weights, smooth)
    return bce.sum(), dice.sum()


def refinement_weights(logits: Tensor, rows: Tensor, kind: str, alpha: float) -> Tensor:
    """(N, H, W) weights of pixels in BCE, for N masks of an image and the question (N,) of each (pixellm.md 5.4).

    paper: a pixel that two or more masks of one question claim (logit > 0) weighs `alpha`, others 1. overlap_only, as
    one release had it: a second BCE over these pixels alone is added to the plain one, so they weigh 2.
    """
    predicted = logits.detach() > 0
    claims = torch.zeros_like(logits)
    for row in rows.unique():
        mine = rows == row
        claims[mine] = predicted[mine].sum(0).to(claims.dtype)
    return torch.where(claims >= 2, alpha if kind == "paper" else 2.0, 1.0)


def _counted(image: MaskGroup, number: int) -> MaskGroup:
    """The masks of an image that count, 0: all of them. Else exactly `number`, as released by Sa2VA (sa2va.md 5.2): of
    more a random choice, fewer are repeated in order, so that of two the first counts three times in five."""
    logits, truth, ignore, weights = image
    have = len(logits)
    if not number or not have or have == number:
        return image
    if have > number:
        index = torch.randperm(have, device=logits.device)[:number]
    else:
        index = torch.arange(number, device=logits.device) % have
    if ignore is not None and ignore.dim() == 3:
        ignore = ignore[index]
    return logits[index], truth[index], ignore, None if weights is None else weights[index]


def _at_points(group: MaskGroup, number: int) -> MaskGroup:
    """Masks (N, h, w) at `number` points each, (N, 1, number). Truth and weights are interpolated as logits are; a
    point next to an ignored cell is ignored."""
    logits, truth, ignore, weights = group
    points = sample_points(logits, number)

    def at(maps: Tensor) -> Tensor:
        return values_at(maps.to(logits.dtype), points)[:, None]

    ignored = None if ignore is None else at(ignore.expand(logits.shape)) > 0
    return at(logits), at(truth), ignored, None if weights is None else at(weights)


def _by_size(images: Iterable[MaskGroup]) -> Iterator[MaskGroup]:
    """Images (logits, truth, ignore, weights) of one size, and with the same of these given, as if they were one image
    with all their masks: fewer and larger kernels."""
    groups = defaultdict(list)
    for logits, truth, ignore, weights in images:
        ignore = None if ignore is None else ignore.expand(truth.shape)
        kind = truth.shape[1:], ignore is None, weights is None
        groups[kind].append((logits, truth, ignore, weights))
    for group in groups.values():
        if len(group) == 1:  # no copy
            yield group[0]
        else:
            logits, truth, ignore, weights = zip(*group, strict=True)
            yield torch.cat(logits), torch.cat(truth), _concatenated(ignore), _concatenated(weights)


def _concatenated(values: tuple[Tensor | None, ...]) -> Tensor | None:
    """All are None or none is: the images of a group have the same of these given."""
    tensors = [value for value in values if value is not None]
    return torch.cat(tensors) if tensors else None


def _weights(output: SegOutput, batch: Batch, config: LossConfig) -> list[Tensor | None]:
    """Refinement weights of each image's masks; as released there are none."""
    if config.overlap_refinement == "none":
        return [None] * len(output.masks)
    rows = batch.mask_rows.split([len(masks) for masks in batch.masks])
    return [
        refinement_weights(masks, mine, config.overlap_refinement, config.overlap_weight)
        for masks, mine in zip(output.masks, rows, strict=True)
    ]


def _refused(batch: Batch, config: LossConfig) -> list[Tensor]:
    """(N, H, W) zeros for the refused slots of each image that has a mask, where the recipe counts them as released:
    logit 0 against an empty truth, a constant without gradient that weakens the others' (gsva.md 5.4)."""
    if not config.count_refused:
        return []
    counts = [number if len(masks) else 0 for number, masks in zip(batch.refused, batch.masks, strict=True)]
    pairs = zip(counts, batch.masks, strict=True)
    return [masks.new_zeros(number, *masks.shape[1:], dtype=torch.float32) for number, masks in pairs]


def _truth(output: SegOutput, batch: Batch, config: LossConfig) -> tuple[list[Tensor], list[Tensor | None]]:
    """True masks and ignored pixels of each image. At the decoder's size, a cell's truth is the share of it that is
    covered, or that of one of its pixels (truth_resize nearest); a cell with any ignored pixel is ignored."""
    truth = [masks.float() for masks in batch.masks]
    ignored = _ignored(batch, config)
    if config.mask_size == "full":
        return truth, ignored
    sizes = [masks.shape[1:] for masks in output.masks]
    pairs = zip(ignored, sizes, strict=True)
    ignored = [None if mask is None else _cell_means(mask[None].float(), size)[0] > 0 for mask, size in pairs]
    resize = _cell_means if config.truth_resize == "area" else _cell_samples
    return map_batched(resize, truth, sizes), ignored


def _cell_means(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, H, W) -> (N, h, w): the mean over the area of each cell."""
    return F.interpolate(masks[:, None], list(size), mode="area")[:, 0] if len(masks) else masks.new_zeros(0, *size)


def _cell_samples(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, H, W) -> (N, h, w): the value at the upper left corner of each cell, as released by Sa2VA."""
    return F.interpolate(masks[:, None], list(size), mode="nearest")[:, 0] if len(masks) else masks.new_zeros(0, *size)


def _ignored(batch: Batch, config: LossConfig) -> list[Tensor | None]:
    """Ignored pixels of each image; none unless the recipe asks: as released they are background."""
    return batch.ignore if config.ignore_region and batch.ignore else [None] * len(batch.masks)
