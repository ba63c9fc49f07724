"""Scores of class lists: mIoU from one confusion matrix, present/absent accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data.collate import rasterize_ignored
from data.types import Query, Record
from evaluation.metrics.base import (
    AS_LISA,
    RELEASED,
    SCORERS,
    STANDARD,
    Counts,
    Figure,
    with_intervals,
)
from evaluation.metrics.counts import IGNORE, Confusion, Presence, class_map, confusion_cells, presence_cells
from evaluation.metrics.intervals import Statistics, of_ratios, quotient
from evaluation.metrics.matching import Names, read_list
from evaluation.metrics.truth import targets_by_class, true_mask
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

MAX_CLASSES = 5000  # of a confusion matrix
NONE = -1  # class of a pixel without an answer, or that no class covers, in the cells that a scorer keeps


@SCORERS.register("semantic")
class SemanticScorer:
    """mIoU, pixel accuracy and frequency-weighted IoU of class lists in two variants, and present/absent accuracy.

    standard: names match exactly; of two masks of a class the higher logit counts; ignored pixels do not count; pixels
    without an answer are wrong, and so is a mask on pixels that are known to be of no class. as_released (lasagna.md
    7.2): names match the most similar class; a class's last mask replaces earlier ones; ignored and unanswered pixels,
    and those of no class, are class 0.

    Counts: `classes` (names), `standard` and `as_released` (cells of the confusion matrix: true class, predicted class,
    pixels), `presence` (see `presence_cells`; None of teacher-forced answers) and `unmatched`.
    """

    kinds = ("classes",)
    by_phrase = False

    def __init__(self) -> None:
        # Class lists may differ between images (open vocabularies), so cells are kept in the numbering of `names`,
        # which grows by each list's new names.
        self.names: list[str] = []
        self.cells: dict[str, list[np.ndarray]] = {STANDARD: [], RELEASED: []}  # variant -> (n, 3) per image
        self.presence: list[Sequence[int]] = []
        self.forced = False
        self.by_logits = 0  # images whose as-released counts depend on logits that were not there

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        names = Names(record.vocabulary)
        shape = replies[0].size
        device = replies[0].masks.device
        truth = true_map(record, names, shape).to(device)
        exact, unmatched = read_masks(replies, queries, names, fuzzy=False)
        fuzzy, _ = read_masks(replies, queries, names, fuzzy=True)
        size = len(names.names)
        labelled = truth.masked_fill(truth == size, IGNORE)
        counts: Counts = {
            "classes": names.names,
            STANDARD: confusion_cells(truth, standard_map(exact, shape, size, device), size).tolist(),
            RELEASED: confusion_cells(released_truth(labelled), released_map(fuzzy, shape, device), size).tolist(),
            "unmatched": unmatched,
            "presence": None,
        }
        if protocol != FORCED:
            indices = (names.exact(name) for query in queries for name in query.phrases)
            asked = {index for index in indices if index is not None}
            present = set(targets_by_class(record, names))
            counts["presence"] = presence_cells(asked, present, {index for index, _ in exact})
        return counts

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        """The release takes a class's last mask, and a class for every name: then other masks overlap."""
        names = Names(counts["classes"])
        classes = [index for index, _ in read_masks(replies, queries, names, fuzzy=False)[0]]
        return counts["unmatched"] > 0 or len(set(classes)) < len(classes)

    def add(self, counts: Counts) -> None:
        self.by_logits += counts.get("by_logits", False)
        places = self._places(counts["classes"])
        for variant, images in self.cells.items():
            images.append(_renumber(np.array(counts[variant], dtype=np.int64).reshape(-1, 3), places))
        if counts["presence"] is None:
            self.forced = True
        else:
            self.presence.append(counts["presence"])

    def merge(self, other: Self) -> None:
        places = self._places(other.names)
        for variant, images in other.cells.items():
            self.cells[variant] += [_renumber(cells, places) for cells in images]
        self.presence += other.presence
        self.forced |= other.forced
        self.by_logits += other.by_logits

    def figures(self) -> list[Figure]:
        """Present/absent accuracy is a figure of generated answers only: a forced one names the classes itself."""
        figures = [] if self.forced else self._presence().figures()
        for variant in (STANDARD, RELEASED):
            confusion = self._confusion(variant)
            figures += [
                Figure("mIoU", variant, confusion.miou()),
                Figure("pixel_accuracy", variant, confusion.pixel_accuracy()),
                Figure("fwIoU", variant, confusion.weighted_iou()),
            ]
        if self.by_logits:
            figures = [replace(figure, value=None) if figure.variant == RELEASED else figure for figure in figures]
        figures = with_intervals(figures, self.statistics())
        return sorted(figures, key=lambda figure: (figure.variant == RELEASED, figure.metric != "mIoU"))

    def details(self) -> dict[str, Any]:
        """IoU per class (standard), None of a class that occurs nowhere; the number of images without the logits that
        as-released figures need."""
        values = [None if math.isnan(value) else value for value in self._confusion(STANDARD).iou().tolist()]
        details: dict[str, Any] = {"class_iou": dict(zip(self.names, values, strict=True))}
        return {**details, "released_needs_logits": self.by_logits} if self.by_logits else details

    def _places(self, names: Sequence[str]) -> np.ndarray:
        """(K + 1,) the places in `self.names` of the K names of a list, then NONE; names that are new are appended.

        For self.names = ["sky"] and the list ["road", "sky"] it is [1, 0, -1]: index 2 of the list stands for "none".
        """
        self.names += [name for name in names if name not in self.names]
        if len(self.names) > MAX_CLASSES:
            raise ValueError(f"a class list of {len(self.names)} names, more than the limit of {MAX_CLASSES}")
        place = {name: index for index, name in enumerate(self.names)}
        return np.array([*(place[name] for name in names), NONE])

    def _confusion(self, variant: str) -> Confusion:
        confusion = Confusion(len(self.names))
        if self.cells[variant]:
            # NONE is -1 and so indexes the last entry of `places`: the row or column after all classes.
            places = np.arange(len(self.names) + 1)
            confusion.add(_renumber(np.concatenate(self.cells[variant]), places))
        return confusion

    def _presence(self) -> Presence:
        presence = Presence()
        presence.add(np.array(self.presence, dtype=np.int64).reshape(-1, 4).sum(axis=0))
        return presence

    def statistics(self) -> list[Statistics]:
        """All are functions of right, true and predicted pixels per class, summed over images; so an image is one row
        of 3 K numbers, and images are resampled as rows."""
        size, images = len(self.names), self.cells[STANDARD]
        if not images:
            return []
        cells = np.concatenate(images)
        image = np.repeat(np.arange(len(images)), [len(cells) for cells in images])  # (n,) the image of each cell
        columns = np.zeros((3, len(images), size + 1))
        right = cells[:, 0] == cells[:, 1]
        np.add.at(columns[0], (image[right], cells[right, 0]), cells[right, 2])
        np.add.at(columns[1], (image, cells[:, 0]), cells[:, 2])
        np.add.at(columns[2], (image, cells[:, 1]), cells[:, 2])  # NONE goes to the last column, cut off below
        names = ("mIoU", "pixel_accuracy", "fwIoU")
        numbers = np.concatenate(columns[:, :, :size], axis=1)
        statistics = [Statistics(names, numbers, partial(_class_figures, classes=size))]
        if self.forced:
            return statistics
        present_right, present, absent_right, absent = np.array(self.presence).reshape(-1, 4).T
        ratios = {"present_accuracy": (present_right, present), "absent_accuracy": (absent_right, absent)}
        return [*statistics, of_ratios(ratios)]


def true_map(record: Record, names: Names, shape: tuple[int, int]) -> Tensor:
    """(H, W) long class indices, the number of classes where none is, IGNORE at ignored pixels; where masks overlap the
    lower index wins."""
    truth = torch.full(shape, len(names.names), dtype=torch.long)
    targets = targets_by_class(record, names)
    for index in sorted(targets, reverse=True):  # lower indices are written last
        truth[true_mask(record, targets[index], shape)] = index
    if record.ignore is not None:
        truth[torch.from_numpy(rasterize_ignored(record, shape))] = IGNORE
    return truth


def standard_map(
    masks: Sequence[tuple[int, Tensor]], shape: tuple[int, int], none: int, device: torch.device | str = "cpu"
) -> Tensor:
    """(H, W) class indices from (class, logits) pairs, `none` where no logit is positive; duplicates by maximum."""
    best: dict[int, Tensor] = {}
    for index, logits in masks:
        best[index] = torch.maximum(best[index], logits) if index in best else logits
    return class_map(best, shape, none, device)


def released_map(
    masks: Sequence[tuple[int, Tensor]], shape: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """(H, W) as released: a class's last mask replaces earlier ones, pixels without a positive logit are class 0."""
    return class_map(dict(masks), shape, 0, device)


def released_truth(truth: Tensor) -> Tensor:
    """As released, pixels without a class (IGNORE) are class 0."""
    return truth.clamp(min=0)


def pixels_taken(replies: Sequence[Reply], queries: Sequence[Query], names: Names) -> dict[tuple[int, int], Tensor]:
    """(reply, mask) -> (H, W) bool: the pixels that a mask takes in the standard map, where others take some of them.

    Binary masks with these pixels give the same map as the logits.
    """
    claimed = []  # class, reply, mask
    for number, (query, reply) in enumerate(zip(queries, replies, strict=True)):
        claimed += [(index, number, mask) for index, mask in read_list(reply.claims, query.phrases, names).masks]
    claimed = sorted(set(claimed))  # of equal logits the lower class wins
    logits = {place: replies[number].masks[mask] for place, (_, number, mask) in enumerate(claimed)}
    if not logits:
        return {}
    winner = class_map(logits, replies[0].size, none=-1, device=replies[0].masks.device)
    return {
        (number, mask): winner == place
        for place, (_, number, mask) in enumerate(claimed)
        if ((logits[place] > 0) & (winner != place)).any()
    }


def read_masks(
    replies: Sequence[Reply], queries: Sequence[Query], names: Names, *, fuzzy: bool
) -> tuple[list[tuple[int, Tensor]], int]:
    """(class, logits) pairs of all answers about an image, in their order, and the number of claims without a class."""
    pairs, unmatched = [], 0
    for query, reply in zip(queries, replies, strict=True):
        reading = read_list(reply.claims, query.phrases, names, fuzzy=fuzzy)
        pairs += [(index, reply.masks[mask]) for index, mask in reading.masks]
        unmatched += reading.unmatched
    return pairs, unmatched


def _renumber(cells: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, 3) cells in which class k becomes class `places[k]`."""
    return np.stack([places[cells[:, 0]], places[cells[:, 1]], cells[:, 2]], axis=1)


def _class_figures(sums: np.ndarray, classes: int) -> np.ndarray:
    """(B, 3 K) right, true and predicted pixels per class to (B, 3) mIoU, pixel accuracy and weighted IoU."""
    right, truth, predicted = sums[:, :classes], sums[:, classes : 2 * classes], sums[:, 2 * classes :]
    iou, pixels = quotient(right, truth + predicted - right), truth.sum(axis=1)
    occurs = ~np.isnan(iou)
    iou = np.where(occurs, iou, 0.0)
    miou = quotient(iou.sum(axis=1), occurs.sum(axis=1))
    return np.stack([miou, quotient(right.sum(axis=1), pixels), quotient((truth * iou).sum(axis=1), pixels)], axis=1)
