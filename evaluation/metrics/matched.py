"""Scores of answers with any number of masks: matched to what was asked, misses and extras counted (pixellm.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data.types import Query, Record
from evaluation.metrics.counts import CIOU_EPS, LISA_EPS, RELEASED, STANDARD, Figure, Overlap, mean, overlap, ratio
from evaluation.metrics.intervals import Ratio, ratio_intervals
from evaluation.metrics.ratios import overlap_ratios
from evaluation.metrics.scorers import AS_LISA, SCORERS, ignored_pixels, is_present, true_mask, with_intervals
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

BOTH, MISSED, EXTRA = "both", "missed", "extra"


@SCORERS.register("matched")
class MatchedScorer:
    """Masks alone: no judge reads the texts, as in the paper's protocol, which was not released.

    Masks of an answer and targets of its question are paired one to one for the largest sum of IoU (in order where the
    answer was given). standard: a target without a mask, and a mask without a target, are pairs of IoU 0, and count in
    the union of cIoU. as_released: a mask without a target is counted in its raw logits, of which only those from 0.5
    to 1 are seen, and gIoU is over the larger of the numbers of masks and targets of a picture. What is absent is no
    target, and neither is what lies wholly in ignored pixels.
    """

    KINDS = ("multi", "refer", "reason", "phrase")

    def __init__(self) -> None:
        self.pairs: list[list[tuple[str, Overlap, int]]] = []  # of each picture: kind, counts, logits seen of an extra
        self.unions: list[list[Overlap]] = []
        self.larger = 0

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        """Pairs of all questions, and one row a question for the union of its masks."""
        pairs, unions, drawn_number, true_number = [], [], 0, 0
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            logits = reply.masks[[claim.mask for claim in reply.claims if claim.mask is not None]]
            shape, device = reply.masks.shape[-2:], reply.masks.device
            there = [target for target in query.targets if is_present(record, target)]
            truths = [true_mask(record, target, shape).to(device) for target in there]
            truth = torch.stack(truths) if truths else torch.zeros(0, *shape, dtype=torch.bool, device=device)
            if ignore is not None:
                truth, logits = truth & ~ignore, logits.masked_fill(ignore, -torch.inf)
                truth = truth[truth.flatten(1).any(1)]
            pairs += pair_up(logits, truth, in_order=protocol == FORCED)
            unions.append(list(overlap((logits > 0).any(0), truth.any(0))))
            drawn_number, true_number = drawn_number + len(logits), true_number + len(truth)
        return {"pairs": pairs, "unions": unions, "larger": max(drawn_number, true_number), "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        self.pairs.append([(kind, Overlap(*row), seen) for kind, row, seen in counts["pairs"]])
        self.unions.append([Overlap(*row) for row in counts["unions"]])
        self.larger += counts["larger"]

    def merge(self, other: MatchedScorer) -> None:
        self.pairs += other.pairs
        self.unions += other.unions
        self.larger += other.larger

    def figures(self) -> list[Figure]:
        pairs, unions = list(chain.from_iterable(self.pairs)), list(chain.from_iterable(self.unions))
        union = sum(row.union for _, row, _ in pairs)
        hits = sum(row.intersection for _, row, _ in pairs)
        figures = [
            Figure("gIoU", STANDARD, mean([_iou(row) if kind == BOTH else 0.0 for kind, row, _ in pairs])),
            Figure("cIoU", STANDARD, ratio(hits, union)),
            Figure("union_gIoU", STANDARD, mean([_iou(row) for row in unions])),
        ]
        figures = with_intervals(figures, ratio_intervals(self._shares()))
        if not pairs:
            return figures
        seen_unions = [seen if kind == EXTRA else row.union for kind, row, seen in pairs]
        terms = [
            row.intersection / (union + LISA_EPS) + (union == 0)
            for (_, row, _), union in zip(pairs, seen_unions, strict=True)
        ]
        return [
            *figures,
            Figure("gIoU", RELEASED, sum(terms) / (self.larger + LISA_EPS)),
            Figure("cIoU", RELEASED, hits / (sum(seen_unions) + CIOU_EPS)),
        ]

    def details(self) -> dict[str, Any]:
        kinds = [kind for kind, _, _ in chain.from_iterable(self.pairs)]
        return {f"masks_{kind}": kinds.count(kind) for kind in (BOTH, MISSED, EXTRA)}

    def _shares(self) -> dict[str, Ratio]:
        """A miss or an extra has no intersection; its IoU is 0 even where it is empty, which a union of 1 says."""
        rows = [[(*row[:1], max(row.union, kind != BOTH), *row[2:]) for kind, row, _ in pairs] for pairs in self.pairs]
        counts = overlap_ratios([[row for _, row, _ in pairs] for pairs in self.pairs])
        return {
            "gIoU": overlap_ratios(rows)["gIoU"],
            "cIoU": counts["cIoU"],
            "union_gIoU": overlap_ratios(self.unions)["gIoU"],
        }


def pair_up(logits: Tensor, truth: Tensor, *, in_order: bool = False) -> list[tuple[str, list[int], int]]:
    """(P, H, W) logits and (T, H, W) bool truth to max(P, T) rows: kind, pixel counts, raw logits seen."""
    masks, empty = logits > 0, torch.zeros(truth.shape[1:], dtype=torch.bool, device=truth.device)
    mine, theirs = match(masks, truth, in_order=in_order)
    rows = [(BOTH, list(overlap(masks[i], truth[j])), 0) for i, j in zip(mine, theirs, strict=True)]
    rows += [(MISSED, list(overlap(empty, truth[j])), 0) for j in range(len(truth)) if j not in theirs]
    extra = [i for i in range(len(masks)) if i not in mine]
    seen = [int(((logits[i] >= 0.5) & (logits[i] <= 1)).sum()) for i in extra]
    return rows + [(EXTRA, list(overlap(masks[i], empty)), number) for i, number in zip(extra, seen, strict=True)]


def match(masks: Tensor, truth: Tensor, *, in_order: bool = False) -> tuple[list[int], list[int]]:
    """(P, H, W) and (T, H, W) bool: the indices of masks and of truths that belong together, each used once."""
    number = min(len(masks), len(truth))
    if in_order or not number:
        return list(range(number)), list(range(number))
    drawn, real = masks.flatten(1).float(), truth.flatten(1).float()
    both = drawn @ real.T  # (P, T)
    iou = both / (drawn.sum(1)[:, None] + real.sum(1)[None] - both).clamp(min=1)
    mine, theirs = linear_sum_assignment(np.asarray(iou.cpu()), maximize=True)
    return mine.tolist(), theirs.tolist()


def _iou(row: Overlap) -> float:
    return row.intersection / row.union if row.union else 1.0
