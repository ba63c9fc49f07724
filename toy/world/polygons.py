"""Masks as polygons without holes and as run lengths, the two forms of annotation files."""

import cv2
import numpy as np
from pycocotools import mask as coco_mask

FINE = 4  # outlines are traced on an enlarged mask, so that they run along pixel edges and not through centres
ROUNDING = 1  # enlarged pixels; COCO's rasteriser restores the mask exactly with this shift, not with 0.5
CORNERS = 3  # a polygon has at least this many points


def pixel_polygons(mask: np.ndarray) -> list[list[list[int]]]:
    """[[x, y], …] outlines through pixel centres: filled together with their border they restore the mask."""
    return [_at_least_a_triangle(outline).tolist() for outline in _outlines(mask)]


def coco_polygons(mask: np.ndarray) -> list[list[float]]:
    """[x, y, x, y, …] outlines along pixel edges, as COCO's `segmentation` has them."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    large = mask[y : y + height, x : x + width].repeat(FINE, axis=0).repeat(FINE, axis=1)
    outlines = ((_at_least_a_triangle(outline) + ROUNDING) / FINE + (x, y) for outline in _outlines(large))
    return [outline.ravel().tolist() for outline in outlines]


def rle(mask: np.ndarray) -> dict:
    """COCO run lengths with `counts` as text, ready for JSON."""
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode("ascii")}


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Outer borders (N, 2) int of the mask's pieces.

    Annotation polygons cannot have holes: a piece with a hole is cut in two along a vertical line through the middle of
    the hole, again and again until no piece has one.
    """
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if tree is None:
        return []
    borders = []
    for index, (_, _, hole, parent) in enumerate(tree[0]):
        if parent >= 0:
            continue
        if hole < 0:  # OpenCV's first child: the piece has none
            borders.append(contours[index][:, 0])
            continue
        piece = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, index, 1, cv2.FILLED) > 0
        piece &= mask
        x, _, width, _ = cv2.boundingRect(contours[hole])
        middle = x + width // 2
        left = piece.copy()
        left[:, middle:] = False
        borders += _outlines(left) + _outlines(piece & ~left)
    return borders


def _at_least_a_triangle(outline: np.ndarray) -> np.ndarray:
    missing = max(0, CORNERS - len(outline))
    return np.concatenate([outline, np.repeat(outline[-1:], missing, axis=0)])
