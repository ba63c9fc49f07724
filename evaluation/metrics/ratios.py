"""Figures of overlaps as shares: for each picture the number that counts, and the number it is counted out of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.counts import PRECISIONS, Overlap
from evaluation.metrics.intervals import Ratio


def overlap_ratios(pictures: Sequence[Sequence[Sequence[int]]]) -> dict[str, Ratio]:
    """Every figure that rows of `Overlap` give, by name; `pictures[n]` holds the rows of one picture's queries."""
    rows, picture = stack_ratios(pictures, len(Overlap._fields))
    intersection, union, truth, predicted, rejected = rows.T
    every, there = np.ones(len(rows), bool), truth > 0
    iou = np.divide(intersection, union, out=np.ones(len(rows)), where=union > 0)
    said = (predicted > 0) & (rejected == 0)
    named = {
        "gIoU": (iou, every),
        "cIoU": (intersection, union),
        "Segment": (intersection, union),
        "N-acc": (~there & ~said, ~there),
        "Acc": (~there & ~said, ~there),
        "T-acc": (there & said, there),
        "mIoU": (iou * there, there),
        "oIoU": (intersection * there, union * there),
        "See": (said == there, every),
        "See_precision": (said & there, said),
        "See_recall": (said & there, there),
        "See_absent": (~said & ~there, ~there),
        "See_F1": (2 * (said & there), said.astype(int) + there),
        **{f"Pr@{level}": (there & (intersection >= level * union), there) for level in PRECISIONS},
    }
    return {name: sum_ratios(picture, part, whole, len(pictures)) for name, (part, whole) in named.items()}


def stack_ratios(pictures: Sequence[Sequence[Sequence[float]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, width) rows of all pictures, and (R,) the picture of each."""
    rows = np.array([row for picture in pictures for row in picture]).reshape(-1, width)
    return rows, np.repeat(np.arange(len(pictures)), np.array([len(picture) for picture in pictures], dtype=int))


def sum_ratios(picture: np.ndarray, part: np.ndarray, whole: np.ndarray, pictures: int) -> Ratio:
    """Both numbers of each picture, from those of its rows."""
    part, whole = (np.bincount(picture, weights=values, minlength=pictures) for values in (part, whole))
    return part, whole
