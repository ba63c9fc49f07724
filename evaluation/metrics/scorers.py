"""From answers about one picture to counts (plain numbers, one JSON line), and from counts to figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.collate import rasterize_ignored, rasterize_target
from data.types import Query, Record
from evaluation.metrics.counts import (
    IGNORE,
    RELEASED,
    STANDARD,
    Confusion,
    Figure,
    Overlaps,
    Presence,
    class_map,
    confusion_cells,
    overlap,
    presence_cells,
)
from evaluation.metrics.intervals import Interval, intervals, quotient, ratio_intervals
from evaluation.metrics.matching import Names, assign, read_list
from evaluation.metrics.ratios import overlap_ratios
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth
from utils.registry import Registry

SCORERS = Registry("metric kind")  # one instance a suite and process
AS_LISA = ReleasedTruth()
LENGTHS = {"phrase": "short", "reason": "long"}  # kind of record -> what its queries are called
MAX_CLASSES = 5000  # that a confusion matrix is made of
NONE = -1  # a pixel without a class, among the classes of a picture


@SCORERS.register("semantic")
class SemanticScorer:
    """mIoU of class lists from one confusion matrix, in two variants, and present/absent accuracy.

    standard: names match exactly, of two masks of a class the higher logit counts, ignored pixels do not count, pixels
    without an answer are wrong. as_released (lasagna.md 7.2): names match the most similar class, a class's last mask
    replaces earlier ones, and ignored or unanswered pixels are class 0.
    """

    KINDS = ("classes",)  # of records that it can score

    def __init__(self) -> None:
        self.names: list[str] = []  # of all class lists, in the order seen
        self.cells: dict[str, list[np.ndarray]] = {STANDARD: [], RELEASED: []}  # of each picture; NONE: no class
        self.presence: list[Sequence[int]] = []
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        """Counts of one picture; `unmatched` claims name none of the classes."""
        names = Names(record.vocabulary)
        shape, device = replies[0].masks.shape[-2:], replies[0].masks.device
        truth = true_map(record, names, shape).to(device)
        exact, unmatched = read_masks(replies, queries, names, fuzzy=False)
        fuzzy, _ = read_masks(replies, queries, names, fuzzy=True)
        size = len(names.names)
        counts: dict[str, Any] = {
            "classes": names.names,
            STANDARD: confusion_cells(truth, standard_map(exact, shape, size, device), size).tolist(),
            RELEASED: confusion_cells(released_truth(truth), released_map(fuzzy, shape, device), size).tolist(),
            "unmatched": unmatched,
            "presence": None,
        }
        if protocol != FORCED:
            asked = {names.exact(name) for query in queries for name in query.phrases}
            counts["presence"] = presence_cells(asked, set(in_picture(record, names)), {index for index, _ in exact})
        return counts

    def add(self, counts: dict[str, Any]) -> None:
        places = self._places(counts["classes"])
        for variant, pictures in self.cells.items():
            pictures.append(_renumbered(np.array(counts[variant], dtype=np.int64).reshape(-1, 3), places))
        if counts["presence"] is None:
            self.forced = True
        else:
            self.presence.append(counts["presence"])

    def merge(self, other: SemanticScorer) -> None:
        places = self._places(other.names)
        for variant, pictures in other.cells.items():
            self.cells[variant] += [_renumbered(cells, places) for cells in pictures]
        self.presence += other.presence
        self.forced |= other.forced

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
        figures = with_intervals(figures, self._intervals())
        return sorted(figures, key=lambda figure: (figure.variant == RELEASED, figure.metric != "mIoU"))

    def details(self) -> dict[str, Any]:
        """IoU of each class (standard), None where it occurs nowhere."""
        values = [None if math.isnan(value) else value for value in self._confusion(STANDARD).iou().tolist()]
        return {"class_iou": dict(zip(self.names, values, strict=True))}

    def _places(self, names: Sequence[str]) -> np.ndarray:
        """(K + 1,) where the K classes of a list stand in `names`, which gets those that it lacks, and NONE."""
        self.names += [name for name in names if name not in self.names]
        if len(self.names) > MAX_CLASSES:
            raise ValueError(f"a class list of {len(self.names)} names, more than the limit of {MAX_CLASSES}")
        place = {name: index for index, name in enumerate(self.names)}
        return np.array([*(place[name] for name in names), NONE])

    def _confusion(self, variant: str) -> Confusion:
        confusion = Confusion(len(self.names))
        if self.cells[variant]:
            confusion.add(_renumbered(np.concatenate(self.cells[variant]), np.arange(len(self.names) + 1)))
        return confusion

    def _presence(self) -> Presence:
        presence = Presence()
        presence.add(np.array(self.presence, dtype=np.int64).reshape(-1, 4).sum(axis=0))
        return presence

    def _intervals(self) -> dict[str, Interval | None]:
        """Of the standard figures: each picture counts with its right, true and predicted pixels of every class."""
        size, pictures = len(self.names), self.cells[STANDARD]
        if not pictures:
            return {}
        cells = np.concatenate(pictures)
        row = np.repeat(np.arange(len(pictures)), [len(cells) for cells in pictures])
        columns = np.zeros((3, len(pictures), size + 1))
        right = cells[:, 0] == cells[:, 1]
        np.add.at(columns[0], (row[right], cells[right, 0]), cells[right, 2])
        np.add.at(columns[1], (row, cells[:, 0]), cells[:, 2])
        np.add.at(columns[2], (row, cells[:, 1]), cells[:, 2])
        found = intervals(np.concatenate(columns[:, :, :size], axis=1), partial(_class_figures, classes=size))
        here_right, here, absent_right, absent = np.array(self.presence).reshape(-1, 4).T
        shares = (
            {} if self.forced else {"present_accuracy": (here_right, here), "absent_accuracy": (absent_right, absent)}
        )
        return {**dict(zip(("mIoU", "pixel_accuracy", "fwIoU"), found, strict=True)), **ratio_intervals(shares)}


@SCORERS.register("overlap")
class OverlapScorer:
    """gIoU and cIoU over all queries, and over each kind of record (a reasoning set holds phrases and sentences). Of a
    class list each class that is in the picture is a query.

    standard: pixels under several parts of an object are inside, ignored pixels do not count, and what lies wholly in
    them is not scored. as_released: the system's own `ReleasedTruth`.
    """

    KINDS = ("refer", "reason", "phrase", "multi", "classes")

    def __init__(self) -> None:
        self.kinds: dict[str, Overlaps] = {}
        self.released = Overlaps()
        self.pictures: list[tuple[str, list[list[int]]]] = []  # kind and rows of each
        self.unseen = 0

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        """One row of pixel counts a phrase asked about, in both variants; what is not answered is predicted empty.
        `unseen`: how many things that are there lie wholly in ignored pixels, which leaves nothing to score."""
        rows, as_released, unseen = [], [], 0
        shape, device = replies[0].masks.shape[-2:], replies[0].masks.device
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            targets = asked_targets(record, query)
            for target, mask in zip(targets, assign(reply.claims, query.phrases), strict=True):
                if target is None:
                    continue
                predicted = reply.masks[mask] > 0 if mask is not None else _empty(shape, device)
                truth = true_mask(record, target, shape).to(device)
                row = overlap(predicted, truth, ignore, rejected=mask is None)
                if is_present(record, target) and not row.truth:
                    unseen += 1
                else:
                    rows.append(list(row))
                pixels = released_pixels(record, target, truth, ignore, released)
                as_released.append(list(overlap(predicted, *pixels, rejected=mask is None)))
        return {"kind": record.kind, "overlaps": rows, "released": as_released, "unseen": unseen, "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        self.pictures.append((counts["kind"], counts["overlaps"]))
        scores = self.kinds.setdefault(counts["kind"], Overlaps())
        for row in counts["overlaps"]:
            scores.add(row)
        for row in counts.get("released", counts["overlaps"]):
            self.released.add(row)
        self.unseen += counts.get("unseen", 0)

    def merge(self, other: OverlapScorer) -> None:
        for kind, scores in other.kinds.items():
            self.kinds.setdefault(kind, Overlaps()).merge(scores)
        self.released.merge(other.released)
        self.pictures += other.pictures
        self.unseen += other.unseen

    def figures(self) -> list[Figure]:
        """Of everything, and of short and long queries apart where the set has both (lisa.md 6)."""
        whole = Overlaps()
        for scores in self.kinds.values():
            whole.merge(scores)
        figures = with_intervals(whole.figures(self.released), self._intervals(tuple(self.kinds)))
        for kind, length in LENGTHS.items() if self.kinds.keys() >= LENGTHS.keys() else ():
            scores = self.kinds[kind]
            apart = [Figure("gIoU", STANDARD, scores.giou()), Figure("cIoU", STANDARD, scores.ciou())]
            apart = with_intervals(apart, self._intervals((kind,)))
            figures += [replace(figure, metric=f"{figure.metric}_{length}") for figure in apart]
        return figures

    def details(self) -> dict[str, Any]:
        """The standard figures of each kind, where there are several; what is wholly ignored, where something is."""
        found = {"wholly_ignored": self.unseen} if self.unseen else {}
        if len(self.kinds) < 2:
            return found
        parts = {
            kind: {"queries": len(scores.rows), "gIoU": scores.giou(), "cIoU": scores.ciou()}
            for kind, scores in sorted(self.kinds.items())
        }
        return {"by_kind": parts, **found}

    def _intervals(self, kinds: Sequence[str]) -> dict[str, Interval | None]:
        return ratio_intervals(overlap_ratios([rows for kind, rows in self.pictures if kind in kinds]))


def with_intervals(figures: Sequence[Figure], found: Mapping[str, Interval | None]) -> list[Figure]:
    """The figures, those of the standard variant with the intervals that there are."""
    return [
        replace(figure, interval=found.get(figure.metric))
        if figure.variant == STANDARD and figure.value is not None
        else figure
        for figure in figures
    ]


def true_map(record: Record, names: Names, shape: tuple[int, int]) -> Tensor:
    """(H, W) long class indices, IGNORE where no class is; of overlapping masks the lower index wins."""
    truth = torch.full(shape, IGNORE, dtype=torch.long)
    present = in_picture(record, names)
    for index in sorted(present, reverse=True):
        truth[true_mask(record, present[index], shape)] = index
    if record.ignore is not None:
        truth[torch.from_numpy(rasterize_ignored(record, tuple(shape)))] = IGNORE
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
    """(H, W) as released: a class's last mask replaces earlier ones, and where no logit is positive stands class 0."""
    return class_map(dict(masks), shape, 0, device)


def released_truth(truth: Tensor) -> Tensor:
    """As released, unlabelled pixels are class 0."""
    return truth.clamp(min=0)


def read_masks(
    replies: Sequence[Reply], queries: Sequence[Query], names: Names, *, fuzzy: bool
) -> tuple[list[tuple[int, Tensor]], int]:
    """(class, logits) pairs of all answers about a picture, in their order, and the number of claims that name none."""
    pairs, unmatched = [], 0
    for query, reply in zip(queries, replies, strict=True):
        reading = read_list(reply.claims, query.phrases, names, fuzzy=fuzzy)
        pairs += [(index, reply.masks[mask]) for index, mask in reading.masks]
        unmatched += reading.unmatched
    return pairs, unmatched


def in_picture(record: Record, names: Names) -> dict[int | None, int]:
    """Class indices of what is in the picture, and the target of each; two targets of one class are an error."""
    found: dict[int | None, int] = {}
    for index, target in enumerate(record.targets):
        if target.mask is not None:
            place = names.exact(target.phrase)
            if place in found:
                raise ValueError(
                    f"{record.image}: several targets are {target.phrase!r}; a class list is scored with one target a "
                    "class (of part sets: instances: union)"
                )
            found[place] = index
    return found


def asked_targets(record: Record, query: Query) -> Sequence[int | None]:
    """The target of each name that is asked about; None for classes of a list that are not in the picture."""
    if record.kind == "classes":
        names = Names(record.vocabulary)
        here = in_picture(record, names)
        return [here.get(names.exact(name)) for name in query.phrases]
    if len(query.targets) != len(query.phrases):
        raise ValueError(f"{record.image}: {query.question!r} asks {len(query.phrases)} of {query.targets}")
    return query.targets


def is_present(record: Record, target: int) -> bool:
    """What the data say, whatever its mask holds."""
    return target >= 0 and record.targets[target].mask is not None


def true_mask(record: Record, target: int, shape: tuple[int, int]) -> Tensor:
    """(H, W) bool, nothing of what is absent; EmptyMask where nothing is in the mask of what is present."""
    if not is_present(record, target):
        return torch.zeros(shape, dtype=torch.bool)
    return torch.from_numpy(rasterize_target(record, target, tuple(shape)))


def ignored_pixels(record: Record, reply: Reply) -> Tensor | None:
    """(H, W) bool, where the masks of the reply are: what no metric may count."""
    if record.ignore is None:
        return None
    return torch.from_numpy(rasterize_ignored(record, tuple(reply.masks.shape[-2:]))).to(reply.masks.device)


def released_pixels(
    record: Record, target: int, truth: Tensor, ignore: Tensor | None, released: ReleasedTruth
) -> tuple[Tensor, Tensor | None]:
    """True mask and ignored pixels, (H, W) bool both, as a release has them."""
    summed = record.targets[target].released_mask if is_present(record, target) else None
    if released.parts == "exclude" and summed is not None:
        truth = torch.from_numpy(summed()).to(truth.device)
    if ignore is None or released.ignored == "leave out":
        return truth, ignore
    return (truth | ignore if released.ignored == "object" else truth & ~ignore), None


def _empty(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool, device=device)


def _renumbered(cells: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, 3) cells with class k called `places[k]`."""
    return np.stack([places[cells[:, 0]], places[cells[:, 1]], cells[:, 2]], axis=1)


def _class_figures(sums: np.ndarray, classes: int) -> np.ndarray:
    """(B, 3 K) right, true and predicted pixels of every class to (B, 3) mIoU, pixel accuracy and weighted IoU."""
    right, truth, predicted = sums[:, :classes], sums[:, classes : 2 * classes], sums[:, 2 * classes :]
    iou, pixels = quotient(right, truth + predicted - right), truth.sum(axis=1)
    seen = ~np.isnan(iou)
    iou = np.where(seen, iou, 0.0)
    miou = quotient(iou.sum(axis=1), seen.sum(axis=1))
    return np.stack([miou, quotient(right.sum(axis=1), pixels), quotient((truth * iou).sum(axis=1), pixels)], axis=1)
