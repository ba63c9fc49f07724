"""Scores of sets in which some of what is asked for is absent: generalised referring sets, false premises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.types import Claim, Query, Record
from evaluation.matching import assign_claims
from evaluation.metrics import RELEASED, STANDARD, Figure, Overlaps, mean, overlap, ratio
from evaluation.protocols import FORCED, Reply
from evaluation.scoring import SCORERS, true_mask

PRECISIONS = (0.7, 0.8, 0.9)  # Pr@X that the reference program prints


class AbsentScorer:
    """One row of pixel counts a phrase, in two variants.

    standard: a rejected phrase has no mask. as_released: the published decision rule counts where the protocol has one,
    and a rejected phrase keeps the mask that was withheld.
    """

    KINDS = ("refer", "reason", "phrase")

    def __init__(self) -> None:
        self.rows = {STANDARD: Overlaps(), RELEASED: Overlaps()}
        self.forced = False

    @staticmethod
    def count(record: Record, queries: Sequence[Query], replies: Sequence[Reply], protocol: str) -> dict[str, Any]:
        rows: dict[str, list[list[int]]] = {STANDARD: [], RELEASED: []}
        for query, reply in zip(queries, replies, strict=True):
            if len(query.targets) != len(query.asked):
                raise ValueError(f"{record.image}: {query.question!r} asks {len(query.asked)} of {query.targets}")
            honest = assign_claims(reply.claims, query.asked)
            published = honest if reply.released is None else assign_claims(reply.released, query.asked)
            for target, claim, other in zip(query.targets, honest, published, strict=True):
                truth = true_mask(record, target, reply.masks.shape[-2:]).to(reply.masks.device)
                rows[STANDARD].append(_row(reply, claim, claim and claim.mask, truth))
                kept = None if other is None else other.withheld if other.mask is None else other.mask
                rows[RELEASED].append(_row(reply, other, kept, truth))
        return {"rows": rows, "forced": protocol == FORCED, "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        self.forced |= counts["forced"]
        for variant, rows in counts["rows"].items():
            for row in rows:
                self.rows[variant].add(row)

    def merge(self, other: AbsentScorer) -> None:
        self.forced |= other.forced
        for variant, rows in other.rows.items():
            self.rows[variant].merge(rows)

    def details(self) -> dict[str, Any]:
        """How many of the phrases are absent."""
        rows = self.rows[STANDARD].rows
        return {"absent_queries": sum(not row.truth for row in rows), "queries_scored": len(rows)}


@SCORERS.register("generalised")
class GeneralisedScorer(AbsentScorer):
    """gRefCOCO (gsva.md 6.3). standard: the reference program's rules; nothing there and no mask is an IoU of 1."""

    COUNT_FALSE_MASKS = True  # as released: the mask of an absent phrase enters the union of cIoU

    def figures(self) -> list[Figure]:
        rows, released = self.rows[STANDARD], self.rows[RELEASED]
        figures = [
            Figure("gIoU", STANDARD, rows.giou()),
            Figure("cIoU", STANDARD, rows.ciou()),
            Figure("N-acc", STANDARD, None if self.forced else rows.n_acc()),
            Figure("T-acc", STANDARD, None if self.forced else rows.t_acc()),
            *(Figure(f"Pr@{level}", STANDARD, rows.precision(level)) for level in PRECISIONS),
        ]
        values = released.released_generalised(count_false_masks=self.COUNT_FALSE_MASKS) if released.rows else {}
        return figures + [Figure(name, RELEASED, value) for name, value in values.items()]


@SCORERS.register("generalised_apart")
class ApartScorer(GeneralisedScorer):
    """Ref-ZOM: overlaps over what is there, rejections apart (gsva.md 6.3)."""

    COUNT_FALSE_MASKS = False

    def figures(self) -> list[Figure]:
        """With its authors' own: mIoU and oIoU of present phrases, Acc of absent ones."""
        present = [row for row in self.rows[STANDARD].rows if row.truth]
        overlaps = [row.intersection / row.union for row in present]
        union = sum(row.union for row in present)
        own = [
            Figure("mIoU", STANDARD, mean(overlaps)),
            Figure("oIoU", STANDARD, ratio(sum(row.intersection for row in present), union)),
            Figure("Acc", STANDARD, None if self.forced else self.rows[STANDARD].n_acc()),
        ]
        return own + super().figures()


@SCORERS.register("premise")
class PremiseScorer(AbsentScorer):
    """True and false premises (sesame.md 6.2). See: said to be there exactly when it is. Segment: cIoU over all."""

    def figures(self) -> list[Figure]:
        rows, released = self.rows[STANDARD], self.rows[RELEASED]
        seen = {} if self.forced else see(rows)
        names = ("See", "See_present", "See_absent", "See_F1")
        figures = [Figure(name, STANDARD, seen.get(name)) for name in names]
        figures += [Figure("Segment", STANDARD, rows.ciou()), Figure("gIoU", STANDARD, rows.giou())]
        if released.rows:
            figures.append(Figure("Segment", RELEASED, released.released()["cIoU"]))
        return figures


def see(overlaps: Overlaps) -> dict[str, float | None]:
    """Accuracy of presence: over all, over what is there, over what is not, and F1 of presence."""
    pairs = [(bool(row.truth), row.predicted > 0 and not row.rejected) for row in overlaps.rows]
    there, absent = [said for truth, said in pairs if truth], [not said for truth, said in pairs if not truth]
    hits = sum(there)
    return {
        "See": ratio(hits + sum(absent), len(pairs)),
        "See_present": ratio(hits, len(there)),
        "See_absent": ratio(sum(absent), len(absent)),
        "See_F1": ratio(2 * hits, len(there) + sum(said for _, said in pairs)),
    }


def _row(reply: Reply, claim: Claim | None, mask: int | None, truth: Tensor) -> list[int]:
    drawn = torch.zeros_like(truth) if mask is None else reply.masks[mask] > 0
    return list(overlap(drawn, truth, rejected=claim is None or claim.mask is None))
