"""Scores of answers with any number of masks: matched with targets, misses and extras counted (pixellm.md 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data.types import Query, Record
from evaluation.metrics.base import AS_LISA, RELEASED, SCORERS, STANDARD, Counts, Figure, with_intervals
from evaluation.metrics.counts import CIOU_EPS, LISA_EPS, Overlap, mean, overlap, ratio
from evaluation.metrics.intervals import Ratio, Statistics, of_ratios
from evaluation.metrics.ratios import overlap_ratios
from evaluation.metrics.truth import ignored_pixels, is_present, true_mask
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

BOTH, MISSED, EXTRA = "both", "missed", "extra"  # kinds of pairs: mask and target, target alone, mask alone


@SCORERS.register("matched")
class MatchedScorer:
    """Scores masks only; no judge reads the texts, as the paper's protocol for that was not released.

    Masks of an answer and targets of its question are paired one to one for the largest sum of IoU (in order where the
    answer is teacher-forced). standard: a target without a mask, and a mask without a target, are pairs of IoU 0 and
    count in the union of cIoU. as_released: a mask without a target counts by its raw logits, of which only those from
    0.5 to 1 are seen, and gIoU is over the larger of the numbers of masks and targets per image. An absent target, or
    one that lies completely in ignored pixels, is not scored.

    Counts: `pairs` (kind, row of `Overlap`, logits seen), `unions` (one row of `Overlap` per question: the union of its
    masks against that of its targets), `larger` (of the numbers of masks and targets) and `unmatched`, which is 0.
    """

    kinds = ("multi", "refer", "reason", "phrase")
    by_phrase = False

    def __init__(self) -> None:
        self.pairs: list[list[tuple[str, Overlap, int]]] = []  # per image: kind, counts, logits seen of an extra mask
        self.unions: list[list[Overlap]] = []  # per image
        self.larger = 0
        self.by_logits = 0  # images whose as-released counts depend on logits that were not there

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        pairs, unions = [], []
        masks_total = targets_total = 0
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            logits = reply.masks[[claim.mask for claim in reply.claims if claim.mask is not None]]
            shape = reply.size
            device = reply.masks.device
            present = [target for target in query.targets if is_present(record, target)]
            truths = [true_mask(record, target, shape).to(device) for target in present]
            truth = torch.stack(truths) if truths else torch.zeros(0, *shape, dtype=torch.bool, device=device)
            if ignore is not None:
                truth, logits = truth & ~ignore, logits.masked_fill(ignore, -torch.inf)
                truth = truth[truth.flatten(1).any(1)]  # without targets that are ignored completely
            pairs += pair_up(logits, truth, in_order=protocol == FORCED)
            unions.append(list(overlap((logits > 0).any(0), truth.any(0))))
            masks_total += len(logits)
            targets_total += len(truth)
        return {"pairs": pairs, "unions": unions, "larger": max(masks_total, targets_total), "unmatched": 0}

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        """The release counts the logits of an extra mask."""
        return any(kind == EXTRA for kind, _, _ in counts["pairs"])

    def add(self, counts: Counts) -> None:
        self.by_logits += counts.get("by_logits", False)
        self.pairs.append([(kind, Overlap(*row), seen) for kind, row, seen in counts["pairs"]])
        self.unions.append([Overlap(*row) for row in counts["unions"]])
        self.larger += counts["larger"]

    def merge(self, other: Self) -> None:
        self.pairs += other.pairs
        self.unions += other.unions
        self.larger += other.larger
        self.by_logits += other.by_logits

    def figures(self) -> list[Figure]:
        pairs = list(chain.from_iterable(self.pairs))
        unions = list(chain.from_iterable(self.unions))
        union = sum(row.union for _, row, _ in pairs)
        hits = sum(row.intersection for _, row, _ in pairs)
        figures = [
            Figure("gIoU", STANDARD, mean([_iou(row) if kind == BOTH else 0.0 for kind, row, _ in pairs])),
            Figure("cIoU", STANDARD, ratio(hits, union)),
            Figure("union_gIoU", STANDARD, mean([_iou(row) for row in unions])),
        ]
        figures = with_intervals(figures, self.statistics())
        if not pairs:
            return figures
        seen_unions = [seen if kind == EXTRA else row.union for kind, row, seen in pairs]
        terms = [
            row.intersection / (union + LISA_EPS) + (union == 0)
            for (_, row, _), union in zip(pairs, seen_unions, strict=True)
        ]
        released = {
            "gIoU": math.fsum(terms) / (self.larger + LISA_EPS),
            "cIoU": hits / (sum(seen_unions) + CIOU_EPS),
        }
        return [
            *figures,
            *(Figure(name, RELEASED, None if self.by_logits else value) for name, value in released.items()),
        ]

    def statistics(self) -> list[Statistics]:
        return [of_ratios(self._ratios())]

    def details(self) -> dict[str, Any]:
        """The number of pairs of each kind, and of images without the logits that as-released figures need."""
        kinds = [kind for kind, _, _ in chain.from_iterable(self.pairs)]
        numbers = {f"masks_{kind}": kinds.count(kind) for kind in (BOTH, MISSED, EXTRA)}
        return {**numbers, "released_needs_logits": self.by_logits} if self.by_logits else numbers

    def _ratios(self) -> dict[str, Ratio]:
        """Numerators and denominators per image of the standard figures."""
        rows = [[row for _, row, _ in pairs] for pairs in self.pairs]
        # `overlap_ratios` counts an empty union as an IoU of 1. A missed target or an extra mask has an IoU of 0 even
        # where it has no pixel, which a union of 1 says: its intersection is 0.
        rows_with_union = [
            [row._replace(union=max(row.union, int(kind != BOTH))) for kind, row, _ in pairs] for pairs in self.pairs
        ]
        return {
            "gIoU": overlap_ratios(rows_with_union)["gIoU"],
            "cIoU": overlap_ratios(rows)["cIoU"],
            "union_gIoU": overlap_ratios(self.unions)["gIoU"],
        }


def pair_up(logits: Tensor, truth: Tensor, *, in_order: bool = False) -> list[tuple[str, list[int], int]]:
    """(P, H, W) logits and (T, H, W) bool truth to max(P, T) rows: kind, row of `Overlap`, raw logits seen.

    The last number is that of an extra mask's logits from 0.5 to 1, which is all that the release sees of it: it takes
    a histogram of the logits as if they were labels.
    """
    masks = logits > 0
    empty = torch.zeros(truth.shape[1:], dtype=torch.bool, device=truth.device)
    masks_used, targets_used = match(masks, truth, in_order=in_order)
    rows = [(BOTH, list(overlap(masks[i], truth[j])), 0) for i, j in zip(masks_used, targets_used, strict=True)]
    rows += [(MISSED, list(overlap(empty, truth[j])), 0) for j in range(len(truth)) if j not in targets_used]
    for i in range(len(masks)):
        if i not in masks_used:
            logits_seen = int(((logits[i] >= 0.5) & (logits[i] <= 1)).sum())
            rows.append((EXTRA, list(overlap(masks[i], empty)), logits_seen))
    return rows


def match(masks: Tensor, truth: Tensor, *, in_order: bool = False) -> tuple[list[int], list[int]]:
    """Pairs (P, H, W) bool masks with (T, H, W) bool targets: the indices of both, min(P, T) of each.

    The pairing has the largest sum of IoU (Hungarian algorithm); in_order: the k-th mask belongs to the k-th target.
    """
    pairs = min(len(masks), len(truth))
    if in_order or not pairs:
        return list(range(pairs)), list(range(pairs))
    predicted = masks.flatten(1).float()
    true = truth.flatten(1).float()
    intersection = predicted @ true.T  # (P, T)
    iou = intersection / (predicted.sum(1)[:, None] + true.sum(1)[None] - intersection).clamp(min=1)
    rows, columns = linear_sum_assignment(np.asarray(iou.cpu()), maximize=True)
    return rows.tolist(), columns.tolist()


def _iou(row: Overlap) -> float:
    return row.intersection / row.union if row.union else 1.0
