"""Numerators and denominators of every overlap metric per image, to be resampled for confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.counts import PRECISIONS, Overlap
from evaluation.metrics.intervals import Ratio


def overlap_ratios(images: Sequence[Sequence[Sequence[int]]]) -> dict[str, Ratio]:
    """Every figure that rows of `Overlap` give, by name; `images[n]` holds the rows of one image's queries."""
    rows, image = stack_ratios(images, len(Overlap._fields))
    intersection, union, truth, predicted, rejected = rows.T
    every = np.ones(len(rows), bool)
    there = truth > 0
    claimed = (predicted > 0) & (rejected == 0)
    iou = np.divide(intersection, union, out=np.ones(len(rows)), where=union > 0)
    named = {
        "gIoU": (iou, every),
        "cIoU": (intersection, union),
        "Segment": (intersection, union),
        "N-acc": (~there & ~claimed, ~there),
        "Acc": (~there & ~claimed, ~there),
        "T-acc": (there & claimed, there),
        "mIoU": (iou * there, there),
        "oIoU": (intersection * there, union * there),
        "See": (claimed == there, every),
        "See_precision": (claimed & there, claimed),
        "See_recall": (claimed & there, there),
        "See_absent": (~claimed & ~there, ~there),
        "See_F1": (2 * (claimed & there), claimed.astype(int) + there),
        **{f"Pr@{level}": (there & (intersection >= level * union), there) for level in PRECISIONS},
    }
    return {name: sum_ratios(image, part, whole, len(images)) for name, (part, whole) in named.items()}


def stack_ratios(images: Sequence[Sequence[Sequence[float]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, width) rows of all images, and (R,) the index of the image of each row."""
    rows = np.array([row for image in images for row in image]).reshape(-1, width)
    return rows, np.repeat(np.arange(len(images)), np.array([len(image) for image in images], dtype=int))


def sum_ratios(image: np.ndarray, part: np.ndarray, whole: np.ndarray, images: int) -> Ratio:
    """(images,) numerators and denominators, from `part` and `whole` of R rows; `image`: (R,) the image of each row."""
    return (
        np.bincount(image, weights=part, minlength=images),
        np.bincount(image, weights=whole, minlength=images),
    )
