"""Short answers in words: right where they equal an accepted one. Tells what general skill training has kept (VQA)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.types import Query, Record
from evaluation.metrics.counts import STANDARD, Figure, ratio
from evaluation.metrics.intervals import ratio_intervals
from evaluation.metrics.matching import without_tokens
from evaluation.metrics.ratios import stack_ratios, sum_ratios
from evaluation.metrics.scorers import AS_LISA, SCORERS, with_intervals
from evaluation.protocols import GENERATED, Reply
from systems.base import ReleasedTruth

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(DIGITS)}}
ARTICLES = ("a", "an", "the")


@SCORERS.register("exact")
class ExactScorer:
    """Share of the questions whose answer equals an accepted one, both freed of what VQA's scoring frees them of."""

    KINDS = ("vqa",)

    def __init__(self) -> None:
        self.pictures: list[list[list[int]]] = []  # of each: [right, masks in the answer] of every question
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> dict[str, Any]:
        if len(record.accepted) != len(replies):
            raise ValueError(f"{record.image}: no accepted short answers to compare with; see the source vqa")
        rows = []
        for accepted, reply in zip(record.accepted, replies, strict=True):
            right = plain(without_tokens(reply.text)) in {plain(answer) for answer in accepted}
            rows.append([int(right), len(reply.masks)])
        return {"answers": rows, "forced": protocol != GENERATED, "unmatched": 0}

    def add(self, counts: dict[str, Any]) -> None:
        self.pictures.append(counts["answers"])
        self.forced |= counts["forced"]

    def merge(self, other: ExactScorer) -> None:
        self.pictures += other.pictures
        self.forced |= other.forced

    def figures(self) -> list[Figure]:
        """A given answer is no figure of what the model knows."""
        if self.forced:
            return [Figure("exact_match", STANDARD, None)]
        rows, picture = stack_ratios(self.pictures, 2)
        share = sum_ratios(picture, rows[:, 0], np.ones(len(rows)), len(self.pictures))
        figure = Figure("exact_match", STANDARD, ratio(int(rows[:, 0].sum()), len(rows)))
        return with_intervals([figure], ratio_intervals({"exact_match": share}))

    def details(self) -> dict[str, Any]:
        """How many of the answers draw a mask that nobody asked for."""
        return {"answers_with_masks": sum(masks > 0 for rows in self.pictures for _, masks in rows)}


def plain(answer: str) -> str:
    """Lower case; apostrophes, commas in numbers and full stops that are no decimal points go, other punctuation is a
    blank; numbers to ten are digits; articles go."""
    answer = re.sub(r"['`’]|(?<=\d),(?=\d)|(?<!\d)\.|\.(?!\d)", "", answer.lower())
    words = re.sub(r"[^\w.]+|_", " ", answer).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)
