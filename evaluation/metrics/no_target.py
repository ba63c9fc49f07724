"""Scores of sets in which some of what is asked for is absent: generalised referring sets, false premises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import CHRF
from torch import Tensor

from data.types import Claim, Query, Record
from evaluation.metrics.counts import RELEASED, STANDARD, Figure, Overlap, Overlaps, mean, overlap, ratio
from evaluation.metrics.intervals import ratio_intervals
from evaluation.metrics.matching import assign_claims, without_tokens
from evaluation.metrics.ratios import overlap_ratios, stack_ratios, sum_ratios
from evaluation.metrics.scorers import AS_LISA, SCORERS, ignored_pixels, is_present, true_mask, with_intervals
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

PRECISIONS = (0.7, 0.8, 0.9)  # Pr@X that the reference program prints
SEEN = ("See", "See_precision", "See_recall", "See_absent", "See_F1")
CHRF_SCORER = CHRF()


class NoTargetBase:
    """One row of pixel counts a phrase, in two variants.

    standard: a rejected phrase has no mask. as_released: the published decision rule counts where the protocol has one,
    and a rejected phrase keeps the mask that was withheld. Ignored pixels count in neither; what is there and lies
    wholly in them is not scored.
    """

    KINDS = ("refer", "reason", "phrase")

    def __init__(self) -> None:
        self.rows = {STANDARD: Overlaps(), RELEASED: Overlaps()}
        self.pictures: list[list[list[int]]] = []  # the standard rows of each
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        rows: dict[str, list[list[int]]] = {STANDARD: [], RELEASED: []}
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            if len(query.targets) != len(query.phrases):
                raise ValueError(f"{record.image}: {query.question!r} asks {len(query.phrases)} of {query.targets}")
            honest = assign_claims(reply.claims, query.phrases)
            published = honest if reply.released is None else assign_claims(reply.released, query.phrases)
            for target, claim, other in zip(query.targets, honest, published, strict=True):
                truth = true_mask(record, target, reply.masks.shape[-2:]).to(reply.masks.device)
                if ignore is not None and is_present(record, target) and not (truth & ~ignore).any():
                    continue
                rows[STANDARD].append(_row(reply, claim, claim and claim.mask, truth, ignore))
                kept = None if other is None else other.withheld_mask if other.mask is None else other.mask
                rows[RELEASED].append(_row(reply, other, kept, truth, ignore))
        return {"rows": rows, "forced": protocol == FORCED, "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        self.forced |= counts["forced"]
        self.pictures.append(counts["rows"][STANDARD])
        for variant, rows in counts["rows"].items():
            for row in rows:
                self.rows[variant].add(row)

    def merge(self, other: NoTargetBase) -> None:
        self.forced |= other.forced
        self.pictures += other.pictures
        for variant, rows in other.rows.items():
            self.rows[variant].merge(rows)

    def figures(self) -> list[Figure]:
        """With intervals of the standard variant."""
        return with_intervals(self._figures(), ratio_intervals(overlap_ratios(self.pictures)))

    def _figures(self) -> list[Figure]:
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """How many of the phrases are absent."""
        rows = self.rows[STANDARD].rows
        return {"absent_queries": sum(not row.truth for row in rows), "queries_scored": len(rows)}


@SCORERS.register("generalised")
class NoTargetScorer(NoTargetBase):
    """gRefCOCO (gsva.md 6.3). standard: the reference program's rules; nothing there and no mask is an IoU of 1."""

    COUNT_FALSE_MASKS = True  # as released: the mask of an absent phrase enters the union of cIoU

    def _figures(self) -> list[Figure]:
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
class RefZomScorer(NoTargetScorer):
    """Ref-ZOM: overlaps over what is there, rejections apart (gsva.md 6.3)."""

    COUNT_FALSE_MASKS = False

    def _figures(self) -> list[Figure]:
        """With its authors' own: mIoU and oIoU of present phrases, Acc of absent ones."""
        present = [row for row in self.rows[STANDARD].rows if row.truth]
        overlaps = [row.intersection / row.union for row in present]
        union = sum(row.union for row in present)
        own = [
            Figure("mIoU", STANDARD, mean(overlaps)),
            Figure("oIoU", STANDARD, ratio(sum(row.intersection for row in present), union)),
            Figure("Acc", STANDARD, None if self.forced else self.rows[STANDARD].n_acc()),
        ]
        return own + super()._figures()


@SCORERS.register("premise")
class PremiseScorer(NoTargetBase):
    """True and false premises (sesame.md 6.2). See: said to be there exactly when it is. Segment: cIoU over all.

    See goes by the flags, not by pixels: what the data say of the phrase, and whether the answer has a mask for it; an
    empty one withdraws it, as released.

    Say, whose published judge is a language model without code: chrF of the answer about what is not there, its mask
    tokens aside, with what the data set says is there instead; over all such queries, and over those rightly refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Overlap]] = []  # of each picture; a phrase is one "pixel": is it there, is it said to be
        self.said: list[list[list[float]]] = []  # of each picture: [chrF, refused] of every false premise

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        said, seen = [], []
        for query, reply in zip(queries, replies, strict=True):
            for index, claim in zip(query.targets, assign_claims(reply.claims, query.phrases), strict=True):
                drawn = claim is not None and claim.mask is not None and bool((reply.masks[claim.mask] > 0).any())
                seen.append([int(is_present(record, index)), int(drawn)])
            target = record.targets[query.targets[0]] if len(query.targets) == 1 else None
            if target is not None and target.mask is None and target.correction:
                refused = all(claim.mask is None for claim in reply.claims)
                said.append([similarity(reply.text, target.correction), int(refused)])
        return {**NoTargetBase.count(record, queries, replies, protocol), "seen": seen, "said": said}

    def add(self, counts: dict[str, Any]) -> None:
        super().add(counts)
        self.said.append(counts["said"])
        flags = counts.get("seen")
        if flags is None:  # a file from before they were kept: its pixels are all there is
            flags = [[truth > 0, predicted > 0 and not no] for _, _, truth, predicted, no in counts["rows"][STANDARD]]
        self.seen.append(
            [Overlap(int(there and said), int(there or said), int(there), int(said)) for there, said in flags]
        )

    def merge(self, other: PremiseScorer) -> None:
        super().merge(other)
        self.seen += other.seen
        self.said += other.said

    def figures(self) -> list[Figure]:
        """Those of what is said about what is there have intervals of their own."""
        found = {} if self.forced else see(Overlaps(list(chain.from_iterable(self.seen))))
        seen = [Figure(name, STANDARD, found.get(name)) for name in SEEN]
        seen = with_intervals(seen, ratio_intervals(overlap_ratios(self.seen)))
        if self.forced or not any(self.said):
            return [*seen, *super().figures()]
        rows, picture = stack_ratios(self.said, 2)
        chrf, refused = rows.T
        said = {"Say": (chrf, np.ones(len(rows))), "Say_refused": (chrf * refused, refused)}
        shares = {name: sum_ratios(picture, *share, len(self.said)) for name, share in said.items()}
        spoken = [
            Figure(name, STANDARD, ratio(math.fsum(part), math.fsum(whole))) for name, (part, whole) in said.items()
        ]
        return [*seen, *super().figures(), *with_intervals(spoken, ratio_intervals(shares))]

    def _figures(self) -> list[Figure]:
        rows, released = self.rows[STANDARD], self.rows[RELEASED]
        figures = [Figure("Segment", STANDARD, rows.ciou()), Figure("gIoU", STANDARD, rows.giou())]
        if released.rows:
            figures.append(Figure("Segment", RELEASED, released.released()["cIoU"]))
        return figures


def see(overlaps: Overlaps) -> dict[str, float | None]:
    """What is said to be there against what is: accuracy, precision, recall and F1, and accuracy on what is not."""
    pairs = [(bool(row.truth), row.predicted > 0 and not row.rejected) for row in overlaps.rows]
    there, absent = [said for truth, said in pairs if truth], [not said for truth, said in pairs if not truth]
    hits, said = sum(there), sum(said for _, said in pairs)
    values = (
        ratio(hits + sum(absent), len(pairs)),
        ratio(hits, said),
        ratio(hits, len(there)),
        ratio(sum(absent), len(absent)),
        ratio(2 * hits, len(there) + said),
    )
    return dict(zip(SEEN, values, strict=True))


def similarity(said: str, reference: str) -> float:
    """chrF2 of an answer without its added tokens and of a reference, 0 to 1; capitals count for nothing."""
    return round(CHRF_SCORER.sentence_score(without_tokens(said).lower(), [reference.lower()]).score / 100, 6)


def _row(reply: Reply, claim: Claim | None, mask: int | None, truth: Tensor, ignore: Tensor | None) -> list[int]:
    drawn = torch.zeros_like(truth) if mask is None else reply.masks[mask] > 0
    return list(overlap(drawn, truth, ignore, rejected=claim is None or claim.mask is None))
