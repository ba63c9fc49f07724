"""Points at which the mask losses compare, most of them where the prediction is uncertain (PointRend; sa2va.md 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OVERSAMPLING = 3  # candidates per point
IMPORTANCE = 0.75  # share of the points that are the most uncertain candidates; the others are uniform


@torch.no_grad()
def sample_points(logits: Tensor, number: int) -> Tensor:
    """(N, h, w) logits -> (N, number, 2) points (x, y) in 0 .. 1, from torch's generator of their device.

    In training that generator is a function of seed, step and micro-batch (`training.loop.seed_dropout`), and so are
    the points: a resumed run draws those of the uninterrupted one.
    """
    masks, important = len(logits), int(IMPORTANCE * number)
    candidates = torch.rand(masks, OVERSAMPLING * number, 2, device=logits.device)
    certainty = values_at(logits, candidates).abs()
    chosen = certainty.topk(important, dim=1, largest=False).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, torch.rand(masks, number - important, 2, device=logits.device)], dim=1)


def values_at(maps: Tensor, points: Tensor) -> Tensor:
    """(N, h, w) maps at (N, P, 2) points (x, y) in 0 .. 1 -> (N, P), bilinear, zero outside.

    Equals `F.grid_sample(..., align_corners=False)`. Written as an embedding lookup, whose gradient sums in a fixed
    order: that of grid_sample is a race between threads on a GPU, and runs would not be reproducible.
    """
    height, width = maps.shape[1:]
    size = points.new_tensor([width, height])
    place = points * size - 0.5  # the centre of cell 0 is at 0
    low = place.floor()
    table = maps.reshape(-1, 1)
    first = torch.arange(len(maps), device=maps.device)[:, None] * (height * width)
    total = maps.new_zeros(points.shape[:2])
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        cell = low + points.new_tensor(corner)
        share = (1 - (place - cell).abs()).prod(-1)
        inside = ((cell >= 0) & (cell < size)).all(-1)
        x, y = cell.long().clamp(min=0).minimum(size.long() - 1).unbind(-1)
        total = total + F.embedding(first + y * width + x, table)[..., 0] * share.masked_fill(~inside, 0)
    return total
