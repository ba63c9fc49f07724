"""Dense targets: class, colour, part and box at points of a grid, with which the encoders learn to recognise first."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy.base.sizes import SCENE_SIDE
from toy.world.scene import CLASSES, COLORS, PARTS, Scene

COLOR_NAMES = tuple(COLORS)
PART_NAMES = tuple((name, part) for name, parts in PARTS.items() for part in parts)
GROUPS = (len(CLASSES), len(COLOR_NAMES) + 1, len(PART_NAMES) + 1)  # the last colour and the last part mean none
FOLD = 2  # each patch predicts FOLD x FOLD points
GROUP_WEIGHTS = (1.0, 0.4, 0.4)  # of the cross-entropies of class, colour and part
BOX_WEIGHT = 3.0
CODES = {name: index for index, name in enumerate(CLASSES)}
COLOR_CODES = {name: index for index, name in enumerate(COLOR_NAMES)}
PART_CODES = {pair: index for index, pair in enumerate(PART_NAMES)}


@dataclass(frozen=True)
class Spots:
    """Targets at the cell centres of an S x S grid: codes (3, S, S) int64 (class, colour, part), boxes (S, S, 4)."""

    codes: np.ndarray
    boxes: np.ndarray


def owner_map(scene: Scene) -> np.ndarray:
    """Index of the visible thing at each pixel, (H, W) int8."""
    owner = np.zeros(scene.image.shape[:2], np.int8)
    for index, thing in enumerate(scene.things):
        owner[thing.mask] = index
    return owner


def read_spots(scene: Scene, patches: int) -> Spots:
    """Targets for a `patches` x `patches` feature grid. Boxes are (x0, y0, x1, y1) from their point, in image sides."""
    step = SCENE_SIDE // (patches * FOLD)
    pick = np.s_[step // 2 :: step, step // 2 :: step]
    owner = owner_map(scene)[pick]
    classes = np.array([CODES[thing.name] for thing in scene.things])
    colors = np.array([COLOR_CODES.get(thing.color, len(COLOR_NAMES)) for thing in scene.things])
    parts = np.full(owner.shape, len(PART_NAMES))
    for thing in scene.things:
        for part, mask in thing.parts.items():
            parts[mask[pick]] = PART_CODES[thing.name, part]
    corners = np.array([thing.box for thing in scene.things], np.float32)[owner]
    place = np.arange(step // 2, SCENE_SIDE, step, dtype=np.float32)
    x, y = np.meshgrid(place, place)
    boxes = (corners - np.stack([x, y, x, y], axis=-1)) / SCENE_SIDE
    return Spots(np.stack([classes[owner], colors[owner], parts]).astype(np.int64), boxes.astype(np.float32))


class DenseHead(nn.Module):
    """One linear layer on patch features (B, P, D); dropped when the weights are written."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, FOLD * FOLD * (sum(GROUPS) + 4))

    def forward(self, features: Tensor) -> Tensor:
        """(B, S, S, groups + 4) with S = FOLD * sqrt(P)."""
        batch, count, _ = features.shape
        side = round(count**0.5)
        spots = self.out(features).view(batch, side, side, FOLD, FOLD, -1)
        return spots.transpose(2, 3).reshape(batch, side * FOLD, side * FOLD, -1)


def dense_loss(output: Tensor, codes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and class accuracy of a DenseHead's output (B, S, S, G), for codes (B, 3, S, S) and boxes (B, S, S, 4)."""
    *groups, predicted_boxes = output.float().split([*GROUPS, 4], dim=-1)
    loss = BOX_WEIGHT * F.l1_loss(predicted_boxes, boxes)
    for weight, logits, truth in zip(GROUP_WEIGHTS, groups, codes.unbind(1), strict=True):
        loss = loss + weight * F.cross_entropy(logits.flatten(0, 2), truth.flatten())
    with torch.no_grad():
        accuracy = (groups[0].argmax(-1) == codes[:, 0]).float().mean()
    return loss, accuracy
