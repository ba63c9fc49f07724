"""Scores of phrases by the overlap of their masks: gIoU, cIoU and precision at thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from data.types import Query, Record
from evaluation.metrics.base import AS_LISA, SCORERS, STANDARD, Counts, Figure, with_intervals
from evaluation.metrics.counts import Overlaps, overlap
from evaluation.metrics.intervals import Statistics, of_ratios
from evaluation.metrics.matching import Names, assign
from evaluation.metrics.ratios import overlap_ratios
from evaluation.metrics.truth import ignored_pixels, is_present, targets_by_class, true_mask
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

LENGTHS = {"phrase": "short", "reason": "long"}  # kind of record -> the papers' word for its queries


@SCORERS.register("overlap")
class OverlapScorer:
    """gIoU and cIoU over all queries, and over each kind of record (a reasoning set holds phrases and sentences). Each
    class of a class list that is in the image is a query.

    standard: pixels under several parts of an object are inside, ignored pixels do not count, and a target that lies
    completely in them is not scored. as_released: the system's own `ReleasedTruth`.

    Counts: `kind` of the record, `overlaps` and `released` (rows of `Overlap`, one per phrase, in the two variants),
    `unseen` (targets that lie completely in ignored pixels), `forced` and `unmatched`, which is 0.
    """

    kinds = ("refer", "reason", "phrase", "multi", "classes")
    by_phrase = True

    def __init__(self) -> None:
        self.by_kind: dict[str, Overlaps] = {}
        self.released = Overlaps()
        self.images: list[tuple[str, list[list[int]]]] = []  # kind and standard rows of each
        self.unseen = 0
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        """A phrase without an answer is predicted empty."""
        rows, released_rows, unseen = [], [], 0
        shape = replies[0].size
        device = replies[0].masks.device
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            targets = asked_targets(record, query)
            for target, mask in zip(targets, assign(reply.claims, query.phrases), strict=True):
                if target is None:
                    continue
                if mask is None:
                    predicted = torch.zeros(shape, dtype=torch.bool, device=device)
                else:
                    predicted = reply.masks[mask] > 0
                truth = true_mask(record, target, shape).to(device)
                row = overlap(predicted, truth, ignore, rejected=mask is None)
                if is_present(record, target) and not row.truth:
                    unseen += 1
                else:
                    rows.append(list(row))
                pixels = released_pixels(record, target, truth, ignore, released)
                released_rows.append(list(overlap(predicted, *pixels, rejected=mask is None)))
        return {
            "kind": record.kind,
            "overlaps": rows,
            "released": released_rows,
            "unseen": unseen,
            "forced": protocol == FORCED,
            "unmatched": 0,
        }

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        return False

    def add(self, counts: Counts) -> None:
        self.images.append((counts["kind"], counts["overlaps"]))
        scores = self.by_kind.setdefault(counts["kind"], Overlaps())
        for row in counts["overlaps"]:
            scores.add(row)
        # Files of early versions hold neither `released`, `unseen` nor `forced`.
        for row in counts.get("released", counts["overlaps"]):
            self.released.add(row)
        self.unseen += counts.get("unseen", 0)
        self.forced |= counts.get("forced", False)

    def merge(self, other: Self) -> None:
        for kind, scores in other.by_kind.items():
            self.by_kind.setdefault(kind, Overlaps()).merge(scores)
        self.released.merge(other.released)
        self.images += other.images
        self.unseen += other.unseen
        self.forced |= other.forced

    def figures(self) -> list[Figure]:
        """Of all queries, and of short and long ones separately where the set has both (lisa.md 6)."""
        total = Overlaps()
        for scores in self.by_kind.values():
            total.merge(scores)
        figures = total.figures(self.released, forced=self.forced)
        for kind, length in self._lengths():
            scores = self.by_kind[kind]
            figures.append(Figure(f"gIoU_{length}", STANDARD, scores.giou()))
            figures.append(Figure(f"cIoU_{length}", STANDARD, scores.ciou()))
        return with_intervals(figures, self.statistics())

    def statistics(self) -> list[Statistics]:
        """Of all images, then of those of each kind that has figures of its own."""
        parts = [self._ratios((kind,)).only(("gIoU", "cIoU"), ending=f"_{length}") for kind, length in self._lengths()]
        return [self._ratios(tuple(self.by_kind)), *parts]

    def details(self) -> dict[str, Any]:
        """The standard figures per kind, where there are several; the number of completely ignored targets, if any."""
        details = {"wholly_ignored": self.unseen} if self.unseen else {}
        if len(self.by_kind) < 2:
            return details
        parts = {
            kind: {"queries": len(scores.rows), "gIoU": scores.giou(), "cIoU": scores.ciou()}
            for kind, scores in sorted(self.by_kind.items())
        }
        return {"by_kind": parts, **details}

    def _lengths(self) -> list[tuple[str, str]]:
        """(kind, word for its figures), where the set has queries of both lengths."""
        return list(LENGTHS.items()) if self.by_kind.keys() >= LENGTHS.keys() else []

    def _ratios(self, kinds: Sequence[str]) -> Statistics:
        return of_ratios(overlap_ratios([rows for kind, rows in self.images if kind in kinds]))


def asked_targets(record: Record, query: Query) -> Sequence[int | None]:
    """The target of each name that the question is about; None for classes of a list that are not in the image."""
    if record.kind == "classes":
        names = Names(record.vocabulary)
        targets = targets_by_class(record, names)
        indices = [names.exact(name) for name in query.phrases]
        return [None if index is None else targets.get(index) for index in indices]
    if len(query.targets) != len(query.phrases):
        raise ValueError(f"{record.image}: {query.question!r} asks {len(query.phrases)} of {query.targets}")
    return query.targets


def released_pixels(
    record: Record, target: int, truth: Tensor, ignore: Tensor | None, released: ReleasedTruth
) -> tuple[Tensor, Tensor | None]:
    """True mask and ignored pixels, (H, W) bool both, as the paper's released program has them. An absent target stays
    empty: ignored pixels can only stand for an object that is there."""
    present = is_present(record, target)
    released_mask = record.targets[target].released_mask if present else None
    if released.parts == "exclude" and released_mask is not None:
        truth = torch.from_numpy(released_mask()).to(truth.device)
    if ignore is None or released.ignored == "leave out":
        return truth, ignore
    return (truth | ignore if released.ignored == "object" and present else truth & ~ignore), None
