"""Accumulators of integer counts, read in a standard and an as-released variant.

`add` takes the counts of one image, `merge` those of another process. Figures come from the integers alone, so they
are the same to the last bit for any order of the images and any distribution over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.base import RELEASED, STANDARD, Figure

IGNORE = -1  # truth of a pixel that no standard metric counts
PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
# What the released scoring programs add to denominators: LISA to the IoU of each query and to the number of queries,
# all of them to the union of cIoU, GSVA to the IoU of each query.
LISA_EPS = 1e-5
CIOU_EPS = 1e-10
GSVA_EPS = 1e-8


class Overlap(NamedTuple):
    """Pixel counts of one predicted mask against one true mask. `rejected`: 1 where the answer says "not there"."""

    intersection: int
    union: int
    truth: int
    predicted: int
    rejected: int = 0


def overlap(predicted: Tensor, truth: Tensor, ignore: Tensor | None = None, *, rejected: bool = False) -> Overlap:
    """Counts of two (H, W) bool masks, without the pixels of `ignore`, (H, W) bool."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted mask {tuple(predicted.shape)} and true mask {tuple(truth.shape)} differ in shape")
    keep = torch.ones_like(truth) if ignore is None else ~ignore
    predicted, truth = predicted & keep, truth & keep
    counts = torch.stack([(predicted & truth).sum(), (predicted | truth).sum(), truth.sum(), predicted.sum()])
    return Overlap(*counts.tolist(), int(rejected))


@dataclass
class Overlaps:
    """gIoU, cIoU, N-acc and T-acc from one row of counts per query."""

    rows: list[Overlap] = field(default_factory=list)

    def add(self, row: Sequence[int]) -> None:
        """`row`: an Overlap, or its numbers as read back from a file."""
        self.rows.append(Overlap(*row))

    def merge(self, other: Overlaps) -> None:
        self.rows += other.rows

    def giou(self) -> float | None:
        """Mean IoU over the queries; where nothing is there and nothing is predicted it is 1."""
        return mean([row.intersection / row.union if row.union else 1.0 for row in self.rows])

    def ciou(self) -> float | None:
        """Sum of intersections over sum of unions."""
        return ratio(sum(row.intersection for row in self.rows), sum(row.union for row in self.rows))

    def n_acc(self) -> float | None:
        """Share of the absent targets that were rejected (no mask, or an empty one)."""
        absent = [row for row in self.rows if not row.truth]
        return ratio(sum(row.rejected or not row.predicted for row in absent), len(absent))

    def t_acc(self) -> float | None:
        """Share of the present targets that were not rejected."""
        present = [row for row in self.rows if row.truth]
        return ratio(sum(not row.rejected and row.predicted > 0 for row in present), len(present))

    def precision(self, threshold: float) -> float | None:
        """Pr@threshold: share of the present targets whose IoU reaches it."""
        present = [row for row in self.rows if row.truth]
        return ratio(sum(row.intersection >= threshold * row.union for row in present), len(present))

    def released(self) -> dict[str, float]:
        """gIoU and cIoU of LISA's validation (lisa.md 6), also LaSagnA's: a small constant in every denominator."""
        # The release adds 1 where the union is empty, so an absent target without a mask has an IoU of 1.
        terms = [row.intersection / (row.union + LISA_EPS) + (row.union == 0) for row in self.rows]
        union = sum(row.union for row in self.rows)
        return {
            "gIoU": math.fsum(terms) / (len(terms) + LISA_EPS),
            "cIoU": sum(row.intersection for row in self.rows) / (union + CIOU_EPS),
        }

    def released_generalised(self, *, count_false_masks: bool) -> dict[str, float | None]:
        """GSVA's scoring of sets with absent targets (gsva.md 6.3).

        A present target that was rejected keeps the credit of its mask. count_false_masks: whether the mask of an
        absent target enters the union of cIoU, as on gRefCOCO, or not, as on every other set. N-acc is None where
        nothing is absent, T-acc where nothing is present; the release divides by zero there.
        """
        present = [row for row in self.rows if row.truth]
        absent = [row for row in self.rows if not row.truth]
        terms = [row.intersection / (row.union + GSVA_EPS) for row in present] + [float(row.rejected) for row in absent]
        union = sum(row.union for row in present)
        if count_false_masks:
            union += sum(row.predicted for row in absent if not row.rejected)
        return {
            "gIoU": math.fsum(terms) / (len(terms) + LISA_EPS),
            "cIoU": sum(row.intersection for row in present) / (union + CIOU_EPS),
            "N-acc": ratio(sum(row.rejected for row in absent), len(absent)),
            "T-acc": ratio(sum(not row.rejected for row in present), len(present)),
        }

    def figures(self, released: Overlaps | None = None, *, forced: bool = False) -> list[Figure]:
        """The standard variant of these rows, and LISA's of `released`: the rows by the truth that the release compares
        with, where it is another; default: these rows. forced: the true answers were fed, which decide nothing, so
        N-acc and T-acc are None."""
        figures = [Figure("gIoU", STANDARD, self.giou()), Figure("cIoU", STANDARD, self.ciou())]
        figures += [Figure(f"Pr@{level}", STANDARD, self.precision(level)) for level in PRECISIONS]
        if any(not row.truth for row in self.rows):
            decisions = {"N-acc": self.n_acc(), "T-acc": self.t_acc()}
            figures += [Figure(name, STANDARD, None if forced else value) for name, value in decisions.items()]
        scores = released or self
        return figures + [Figure(name, RELEASED, value) for name, value in scores.released().items() if scores.rows]


class Confusion:
    """(K + 1, K + 1) pixels by true class (row) and predicted class (column); the last of each is "none": what is
    predicted there is wrong, and pixels of it are no share of any figure."""

    def __init__(self, classes: int):
        self.classes = classes
        self.counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)

    def add(self, cells: np.ndarray) -> None:
        """`cells`: (n, 3) of true class, predicted class, number of pixels, as `confusion_cells` gives them."""
        cells = np.asarray(cells, dtype=np.int64).reshape(-1, 3)
        # `+=` would count a cell once that several images have.
        np.add.at(self.counts, (cells[:, 0], cells[:, 1]), cells[:, 2])

    def merge(self, other: Confusion) -> None:
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """(K,) IoU per class, NaN where the class is neither in the truth nor predicted."""
        right = np.diagonal(self.counts)[:-1].astype(np.float64)
        union = self.counts[:-1].sum(axis=1) + self.counts[:, :-1].sum(axis=0) - right
        return np.divide(right, union, out=np.full(self.classes, np.nan), where=union > 0)

    def miou(self) -> float | None:
        """Mean over the classes that have an IoU."""
        return mean([value for value in self.iou().tolist() if not math.isnan(value)])

    def pixel_accuracy(self) -> float | None:
        """Share of the pixels of all classes that are right."""
        return ratio(int(np.diagonal(self.counts)[:-1].sum()), int(self.counts[:-1].sum()))

    def weighted_iou(self) -> float | None:
        """Mean IoU of the classes weighted by their share of the true pixels."""
        pixels, iou = self.counts[:-1].sum(axis=1), np.nan_to_num(self.iou())
        return ratio(math.fsum((pixels * iou).tolist()), int(pixels.sum()))


def confusion_cells(truth: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """The cells of one image that are not zero: (n, 3) int64 of true class, predicted class, number of pixels.

    truth: (H, W) in 0..classes or IGNORE. predicted: (H, W) in 0..classes. `classes` stands for "none" in both.

    Every pixel becomes one number, true * (classes + 1) + predicted, so that one bincount fills the flat matrix. For
    2 classes, pixels of (true, predicted) = (0, 0), (0, 2), (0, 2), (1, 1) become 0, 2, 2, 4, and the cells are
    (0, 0, 1), (0, 2, 2), (1, 1, 1).
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"predicted map {tuple(predicted.shape)} and true map {tuple(truth.shape)} differ in shape")
    keep = truth != IGNORE
    flat = torch.bincount((truth[keep].long() * (classes + 1) + predicted[keep]), minlength=(classes + 1) ** 2)
    cells = flat.nonzero().squeeze(1)
    return torch.stack([cells // (classes + 1), cells % (classes + 1), flat[cells]], dim=1).cpu().numpy()


def class_map(logits: dict[int, Tensor], shape: tuple[int, int], none: int, device: torch.device | str) -> Tensor:
    """(H, W) long: the class of the highest logit among the positive ones, `none` where no logit is positive.

    logits: class index -> (H, W). Of equal logits the lower index wins, as in an argmax over all classes. The classes
    are compared one by one, since a stack of all logits would need K times the memory.
    """
    best = torch.zeros(shape, device=device)
    winner = torch.full(shape, none, dtype=torch.long, device=device)
    for index in sorted(logits):
        better = logits[index] > best
        best = torch.where(better, logits[index], best)
        winner[better] = index
    return winner


@dataclass
class Presence:
    """Answers to a class list: did each present class get a mask, and no absent one?

    An absent class is right where it is refused or not mentioned, a present one where it has a mask.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(4, dtype=np.int64))

    def add(self, cells: np.ndarray) -> None:
        """`cells`: (4,) present right, present, absent right, absent, as `presence_cells` gives them."""
        self.counts += np.asarray(cells, dtype=np.int64)

    def merge(self, other: Presence) -> None:
        self.counts += other.counts

    def present_accuracy(self) -> float | None:
        return ratio(int(self.counts[0]), int(self.counts[1]))

    def absent_accuracy(self) -> float | None:
        return ratio(int(self.counts[2]), int(self.counts[3]))

    def figures(self) -> list[Figure]:
        return [
            Figure("present_accuracy", STANDARD, self.present_accuracy()),
            Figure("absent_accuracy", STANDARD, self.absent_accuracy()),
        ]


def presence_cells(asked: set[int], present: set[int], claimed: set[int]) -> tuple[int, int, int, int]:
    """(present right, present, absent right, absent) of one image, from class indices.

    asked: those in the question; present: those in the image; claimed: those answered with a mask.
    """
    asked_present = asked & present
    asked_absent = asked - present
    return (
        len(asked_present & claimed),
        len(asked_present),
        len(asked_absent - claimed),
        len(asked_absent),
    )


def mean(values: list[float]) -> float | None:
    """Mean that does not depend on the order of the values (`fsum` rounds once); None of no values."""
    return math.fsum(values) / len(values) if values else None


def ratio(part: float, whole: float) -> float | None:
    """part / whole, None where the whole is 0."""
    return part / whole if whole else None
