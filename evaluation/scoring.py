"""From answers about one picture to counts (plain numbers, one JSON line), and from counts to figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.types import Query, Record
from evaluation.bootstrap import interval
from evaluation.matching import Names, assign, read_list
from evaluation.metrics import (
    IGNORE,
    PRECISIONS,
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
from evaluation.protocols import FORCED, Reply
from utils.registry import Registry

SCORERS = Registry("metric kind")  # one instance a suite and process


@SCORERS.register("semantic")
class SemanticScorer:
    """mIoU of class lists from one confusion matrix, in two variants, and present/absent accuracy.

    standard: names match exactly, of two masks of a class the higher logit counts, ignored pixels do not count, pixels
    without an answer are wrong. as_released (lasagna.md 7.2): names match the most similar class, a class's last mask
    replaces earlier ones, and ignored or unanswered pixels are class 0.
    """

    KINDS = ("classes",)  # of records that it can score

    def __init__(self) -> None:
        self.names: list[str] = []
        self.confusions: dict[str, Confusion] = {}
        self.presence = Presence()
        self.forced = False

    @staticmethod
    def count(record: Record, queries: Sequence[Query], replies: Sequence[Reply], protocol: str) -> dict[str, Any]:
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
            asked = {names.exact(name) for query in queries for name in query.asked}
            present = {names.exact(target.phrase) for target in record.targets if target.mask is not None}
            counts["presence"] = presence_cells(asked, present, {index for index, _ in exact})
        return counts

    def add(self, counts: dict[str, Any]) -> None:
        self._open(counts["classes"])
        for variant, confusion in self.confusions.items():
            confusion.add(counts[variant])
        if counts["presence"] is None:
            self.forced = True
        else:
            self.presence.add(counts["presence"])

    def merge(self, other: SemanticScorer) -> None:
        if other.names:
            self._open(other.names)
            for variant, confusion in self.confusions.items():
                confusion.merge(other.confusions[variant])
        self.presence.merge(other.presence)
        self.forced |= other.forced

    def figures(self) -> list[Figure]:
        """Present/absent accuracy is a figure of generated answers only: a forced one names the classes itself."""
        figures = [] if self.forced else self.presence.figures()
        for variant in (STANDARD, RELEASED):
            confusion = self.confusions.get(variant, Confusion(0))
            figures += [
                Figure("mIoU", variant, confusion.miou()),
                Figure("pixel_accuracy", variant, confusion.pixel_accuracy()),
                Figure("fwIoU", variant, confusion.weighted_iou()),
            ]
        return sorted(figures, key=lambda figure: (figure.variant == RELEASED, figure.metric != "mIoU"))

    def details(self) -> dict[str, Any]:
        """IoU of each class (standard), None where it occurs nowhere."""
        iou = self.confusions[STANDARD].iou().tolist() if self.names else []
        values = [None if math.isnan(value) else value for value in iou]
        return {"class_iou": dict(zip(self.names, values, strict=True))}

    def _open(self, names: list[str]) -> None:
        if not self.names:
            self.names = list(names)
            self.confusions = {variant: Confusion(len(names)) for variant in (STANDARD, RELEASED)}
        elif self.names != list(names):
            raise ValueError("pictures of one suite have different class lists")


@SCORERS.register("overlap")
class OverlapScorer:
    """gIoU and cIoU over all queries, and over each kind of record (a reasoning set holds phrases and sentences)."""

    KINDS = ("refer", "reason", "phrase", "multi")

    def __init__(self) -> None:
        self.kinds: dict[str, Overlaps] = {}
        self.pictures: list[Overlaps] = []

    @staticmethod
    def count(record: Record, queries: Sequence[Query], replies: Sequence[Reply], protocol: str) -> dict[str, Any]:
        """One row of pixel counts a phrase asked about; what is not answered is predicted empty."""
        rows = []
        shape, device = replies[0].masks.shape[-2:], replies[0].masks.device
        ignore = None if record.ignore is None else torch.from_numpy(record.ignore()).to(device)
        for query, reply in zip(queries, replies, strict=True):
            if len(query.targets) != len(query.asked):
                raise ValueError(f"{record.image}: {query.question!r} asks {len(query.asked)} of {query.targets}")
            for target, mask in zip(query.targets, assign(reply.claims, query.asked), strict=True):
                predicted = reply.masks[mask] > 0 if mask is not None else _empty(shape, device)
                truth = true_mask(record, target, shape).to(device)
                rows.append(overlap(predicted, truth, ignore, rejected=mask is None))
        return {"kind": record.kind, "overlaps": [list(row) for row in rows], "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        picture = Overlaps()
        for row in counts["overlaps"]:
            picture.add(row)
        self.pictures.append(picture)
        self.kinds.setdefault(counts["kind"], Overlaps()).merge(picture)

    def merge(self, other: OverlapScorer) -> None:
        for kind, scores in other.kinds.items():
            self.kinds.setdefault(kind, Overlaps()).merge(scores)
        self.pictures += other.pictures

    def figures(self) -> list[Figure]:
        """With intervals of the standard gIoU, cIoU and precisions."""
        whole = Overlaps()
        for scores in self.kinds.values():
            whole.merge(scores)
        intervals = {name: interval(*sums) for name, sums in self._sums().items()}
        return [
            replace(figure, interval=intervals.get(figure.metric) if figure.variant == STANDARD else None)
            for figure in whole.figures()
        ]

    def _sums(self) -> dict[str, tuple[list[float], list[float]]]:
        """Metric -> its numerators and denominators, one a picture."""
        rows = [picture.rows for picture in self.pictures]
        present = [[row for row in group if row.truth] for group in rows]
        sums: dict[str, tuple[list[float], list[float]]] = {
            "gIoU": ([len(p.rows) * (p.giou() or 0.0) for p in self.pictures], [len(group) for group in rows]),
            "cIoU": ([sum(r.intersection for r in g) for g in rows], [sum(r.union for r in g) for g in rows]),
        }
        for level in PRECISIONS:
            hits = [sum(row.intersection >= level * row.union for row in group) for group in present]
            sums[f"Pr@{level}"] = hits, [len(group) for group in present]
        return sums

    def details(self) -> dict[str, Any]:
        """The standard figures of each kind, where there are several."""
        if len(self.kinds) < 2:
            return {}
        parts = {
            kind: {"queries": len(scores.rows), "gIoU": scores.giou(), "cIoU": scores.ciou()}
            for kind, scores in sorted(self.kinds.items())
        }
        return {"by_kind": parts}


def true_map(record: Record, names: Names, shape: tuple[int, int]) -> Tensor:
    """(H, W) long class indices, IGNORE where no class is; of overlapping masks the lower index wins."""
    truth = torch.full(shape, IGNORE, dtype=torch.long)
    present = {names.exact(target.phrase): i for i, target in enumerate(record.targets) if target.mask is not None}
    for index in sorted(present, reverse=True):
        truth[true_mask(record, present[index], shape)] = index
    if record.ignore is not None:
        truth[torch.from_numpy(record.ignore())] = IGNORE
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
        reading = read_list(reply.claims, query.asked, names, fuzzy=fuzzy)
        pairs += [(index, reply.masks[mask]) for index, mask in reading.masks]
        unmatched += reading.unmatched
    return pairs, unmatched


def true_mask(record: Record, target: int, shape: tuple[int, int]) -> Tensor:
    draw = record.targets[target].mask if target >= 0 else None
    if draw is None:
        return torch.zeros(shape, dtype=torch.bool)
    mask = torch.from_numpy(draw())
    if mask.shape != shape:
        phrase = record.targets[target].phrase
        raise ValueError(f"{record.image}: the mask of {phrase!r} is {tuple(mask.shape)}, the picture {tuple(shape)}")
    return mask.bool()


def _empty(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool, device=device)
