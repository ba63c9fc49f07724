"""Scores of sets with no-target queries: generalised referring sets, true and false premises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from data.types import Claim, Query, Record
from evaluation.metrics.base import AS_LISA, RELEASED, SCORERS, STANDARD, Counts, Figure, with_intervals
from evaluation.metrics.counts import Overlap, Overlaps, mean, overlap, ratio
from evaluation.metrics.intervals import Ratio, Statistics, of_ratios
from evaluation.metrics.matching import assign_claims, without_tokens
from evaluation.metrics.overlap import released_pixels
from evaluation.metrics.ratios import overlap_ratios, stack_ratios, sum_ratios
from evaluation.metrics.truth import ignored_pixels, is_present, true_mask
from evaluation.protocols import FORCED, Reply
from systems.base import ReleasedTruth

if TYPE_CHECKING:
    from sacrebleu.metrics import CHRF

PRECISIONS = (0.7, 0.8, 0.9)  # Pr@X that the reference program prints
SEE = ("See", "See_precision", "See_recall", "See_absent", "See_F1")


class NoTargetBase:
    """One row of pixel counts per phrase, in two variants.

    standard: a rejected phrase has no mask; ignored pixels do not count, and a target that lies completely in them is
    not scored. as_released: the published decision rule counts where the protocol has one, a rejected phrase keeps its
    withheld mask, and the truth is the system's own `ReleasedTruth`.

    Counts: `rows` (variant -> rows of `Overlap`, one per phrase), `forced` and `unmatched`, which is 0.
    """

    kinds = ("refer", "reason", "phrase")
    by_phrase = True

    def __init__(self) -> None:
        self.rows = {STANDARD: Overlaps(), RELEASED: Overlaps()}
        self.images: list[list[list[int]]] = []  # the standard rows of each
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        rows: dict[str, list[list[int]]] = {STANDARD: [], RELEASED: []}
        ignore = ignored_pixels(record, replies[0])
        for query, reply in zip(queries, replies, strict=True):
            if len(query.targets) != len(query.phrases):
                raise ValueError(f"{record.image}: {query.question!r} asks {len(query.phrases)} of {query.targets}")
            claims = assign_claims(reply.claims, query.phrases)
            released_claims = claims if reply.released is None else assign_claims(reply.released, query.phrases)
            for target, claim, released_claim in zip(query.targets, claims, released_claims, strict=True):
                truth = true_mask(record, target, reply.size).to(reply.masks.device)
                if ignore is None or not is_present(record, target) or (truth & ~ignore).any():
                    mask = claim.mask if claim else None
                    rows[STANDARD].append(_row(reply, claim, mask, truth, ignore))
                mask = released_claim.mask if released_claim else None
                if released_claim and mask is None:
                    mask = released_claim.withheld_mask
                pixels = released_pixels(record, target, truth, ignore, released)
                rows[RELEASED].append(_row(reply, released_claim, mask, *pixels))
        return {"rows": rows, "forced": protocol == FORCED, "unmatched": 0}

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        return False

    def add(self, counts: Counts) -> None:
        self.forced |= counts["forced"]
        self.images.append(counts["rows"][STANDARD])
        for variant, rows in counts["rows"].items():
            for row in rows:
                self.rows[variant].add(row)

    def merge(self, other: Self) -> None:
        self.forced |= other.forced
        self.images += other.images
        for variant, rows in other.rows.items():
            self.rows[variant].merge(rows)

    def figures(self) -> list[Figure]:
        """The figures of the suite, those of the standard variant with intervals."""
        return with_intervals(self._figures(), self.statistics())

    def statistics(self) -> list[Statistics]:
        return [of_ratios(overlap_ratios(self.images))]

    def _figures(self) -> list[Figure]:
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """The numbers of absent and of all phrases."""
        rows = self.rows[STANDARD].rows
        return {"absent_queries": sum(not row.truth for row in rows), "queries_scored": len(rows)}


@SCORERS.register("generalised")
class NoTargetScorer(NoTargetBase):
    """gRefCOCO (gsva.md 6.3). standard: by the rules of the reference program, an absent phrase without a mask has an
    IoU of 1."""

    COUNT_FALSE_MASKS = True  # as released, the mask of an absent phrase enters the union of cIoU

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
    """Ref-ZOM: overlaps over the present phrases, rejections in a figure of their own (gsva.md 6.3)."""

    COUNT_FALSE_MASKS = False

    def _figures(self) -> list[Figure]:
        """First the figures of its authors: mIoU and oIoU of present phrases, Acc of absent ones."""
        present = [row for row in self.rows[STANDARD].rows if row.truth]
        overlaps = [row.intersection / row.union for row in present]
        union = sum(row.union for row in present)
        authors = [
            Figure("mIoU", STANDARD, mean(overlaps)),
            Figure("oIoU", STANDARD, ratio(sum(row.intersection for row in present), union)),
            Figure("Acc", STANDARD, None if self.forced else self.rows[STANDARD].n_acc()),
        ]
        return authors + super()._figures()


@SCORERS.register("premise")
class PremiseScorer(NoTargetBase):
    """True and false premises (sesame.md 6.2).

    See: whether an answer claims an object exactly when it is there. It goes by flags, not by pixels: by what the data
    say of the phrase, and by whether the answer has a mask for it; an empty mask withdraws the claim, as released.

    Segment: cIoU over all phrases.

    Say: how well an answer corrects a false premise. The published judge is a language model whose program was not
    released; here it is the chrF between the answer, without its mask tokens, and the data set's statement of what is
    there instead, over all false premises and over those that the answer refuses.

    Counts: those of `NoTargetBase`, `seen` (per phrase: is it there, does the answer claim it) and `said` (per false
    premise: chrF, and whether the answer has no mask for it, by the same rule as `seen`).
    """

    def __init__(self) -> None:
        super().__init__()
        # A phrase counts as one "pixel" here, so that the ratios of overlaps serve for See, too.
        self.see_rows: list[list[Overlap]] = []  # per image
        self.say_rows: list[list[list[float]]] = []  # per image: `said`

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        seen, said = [], []
        for query, reply in zip(queries, replies, strict=True):
            for index, claim in zip(query.targets, assign_claims(reply.claims, query.phrases), strict=True):
                claimed = claim is not None and claim.mask is not None and bool((reply.masks[claim.mask] > 0).any())
                seen.append([int(is_present(record, index)), int(claimed)])
                target = record.targets[index]
                if len(query.targets) == 1 and target.mask is None and target.correction:
                    said.append([similarity(reply.text, target.correction), int(not claimed)])
        return {**NoTargetBase.count(record, queries, replies, protocol, released), "seen": seen, "said": said}

    def add(self, counts: Counts) -> None:
        super().add(counts)
        self.say_rows.append(counts["said"])
        flags = counts.get("seen")
        if flags is None:  # a file of an early version, which has pixels only
            rows = [Overlap(*row) for row in counts["rows"][STANDARD]]
            flags = [[row.truth > 0, row.predicted > 0 and not row.rejected] for row in rows]
        self.see_rows.append(
            [Overlap(int(there and claim), int(there or claim), int(there), int(claim)) for there, claim in flags]
        )

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.see_rows += other.see_rows
        self.say_rows += other.say_rows

    def figures(self) -> list[Figure]:
        """See, then Segment, then Say where there are false premises. Forced answers decide nothing: See is None."""
        values = {} if self.forced else see(Overlaps(list(chain.from_iterable(self.see_rows))))
        figures = [Figure(name, STANDARD, values.get(name)) for name in SEE]
        figures += self._figures()
        if self._has_said():
            sums = {name: (math.fsum(part), math.fsum(whole)) for name, (part, whole) in self._said()[0].items()}
            figures += [Figure(name, STANDARD, ratio(*parts)) for name, parts in sums.items()]
        return with_intervals(figures, self.statistics())

    def statistics(self) -> list[Statistics]:
        """See from flags, the overlaps from pixels, Say from texts."""
        see_ratios = of_ratios(overlap_ratios(self.see_rows)).only(SEE)
        (pixels,) = super().statistics()
        statistics = [see_ratios, pixels.only([name for name in pixels.names if name not in SEE])]
        if self._has_said():
            parts, image = self._said()
            images = len(self.say_rows)
            ratios = {name: sum_ratios(image, part, whole, images) for name, (part, whole) in parts.items()}
            statistics.append(of_ratios(ratios))
        return statistics

    def _has_said(self) -> bool:
        return not self.forced and any(self.say_rows)

    def _said(self) -> tuple[dict[str, Ratio], np.ndarray]:
        """Numerators and denominators per false premise by name, and the image of each."""
        rows, image = stack_ratios(self.say_rows, 2)
        chrf, refused = rows.T
        return {"Say": (chrf, np.ones(len(rows))), "Say_refused": (chrf * refused, refused)}, image

    def _figures(self) -> list[Figure]:
        rows, released = self.rows[STANDARD], self.rows[RELEASED]
        figures = [Figure("Segment", STANDARD, rows.ciou()), Figure("gIoU", STANDARD, rows.giou())]
        if released.rows:
            figures.append(Figure("Segment", RELEASED, released.released()["cIoU"]))
        return figures


def see(overlaps: Overlaps) -> dict[str, float | None]:
    """Claims that something is there against the truth: accuracy, precision, recall, accuracy on what is absent, F1."""
    pairs = [(bool(row.truth), row.predicted > 0 and not row.rejected) for row in overlaps.rows]
    claims = sum(claimed for _, claimed in pairs)
    present = sum(truth for truth, _ in pairs)
    absent = len(pairs) - present
    hits = sum(truth and claimed for truth, claimed in pairs)
    rejections = sum(not truth and not claimed for truth, claimed in pairs)
    values = (
        ratio(hits + rejections, len(pairs)),
        ratio(hits, claims),
        ratio(hits, present),
        ratio(rejections, absent),
        ratio(2 * hits, present + claims),
    )
    return dict(zip(SEE, values, strict=True))


def similarity(answer: str, reference: str) -> float:
    """chrF2 of an answer, without its added tokens, and a reference, 0 to 1; capitals do not count."""
    return round(_chrf().sentence_score(without_tokens(answer).lower(), [reference.lower()]).score / 100, 6)


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics import CHRF  # here because it takes as long as an answer of the toy assistant

    return CHRF()


def _row(reply: Reply, claim: Claim | None, mask: int | None, truth: Tensor, ignore: Tensor | None) -> list[int]:
    predicted = torch.zeros_like(truth) if mask is None else reply.masks[mask] > 0
    return list(overlap(predicted, truth, ignore, rejected=claim is None or claim.mask is None))
