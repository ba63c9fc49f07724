"""Score of short answers in words (VQA): shows how much of the base model's general skill is left after training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from data.types import Query, Record
from evaluation.metrics.base import AS_LISA, SCORERS, STANDARD, Counts, Figure, with_intervals
from evaluation.metrics.counts import ratio
from evaluation.metrics.intervals import Statistics, of_ratios
from evaluation.metrics.matching import without_tokens
from evaluation.metrics.ratios import stack_ratios, sum_ratios
from evaluation.protocols import FORCED, TWO_PASS, Reply
from systems.base import ReleasedTruth

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(DIGITS)}}
ARTICLES = ("a", "an", "the")


@SCORERS.register("exact")
class ExactScorer:
    """Share of the questions whose answer equals an accepted one, both in the plain form of VQA's scoring (`plain`).

    Counts: `answers` (per question: right, number of masks in the answer), `forced` and `unmatched`, which is 0.
    """

    kinds = ("vqa",)
    by_phrase = False

    def __init__(self) -> None:
        self.images: list[list[list[int]]] = []  # `answers` of each
        self.forced = False

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        if len(record.accepted) != len(replies):
            raise ValueError(f"{record.image}: no accepted short answers to compare with; see the source vqa")
        rows = []
        for accepted, reply in zip(record.accepted, replies, strict=True):
            right = plain(without_tokens(reply.text)) in {plain(answer) for answer in accepted}
            rows.append([int(right), len(reply.masks)])
        return {"answers": rows, "forced": protocol in (FORCED, TWO_PASS), "unmatched": 0}

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        return False

    def add(self, counts: Counts) -> None:
        self.images.append(counts["answers"])
        self.forced |= counts["forced"]

    def merge(self, other: Self) -> None:
        self.images += other.images
        self.forced |= other.forced

    def figures(self) -> list[Figure]:
        """A teacher-forced answer is the true one and says nothing about the model, so its figure is None."""
        if self.forced:
            return [Figure("exact_match", STANDARD, None)]
        rows, _ = stack_ratios(self.images, 2)
        figure = Figure("exact_match", STANDARD, ratio(int(rows[:, 0].sum()), len(rows)))
        return with_intervals([figure], self.statistics())

    def statistics(self) -> list[Statistics]:
        rows, image = stack_ratios(self.images, 2)
        return [of_ratios({"exact_match": sum_ratios(image, rows[:, 0], np.ones(len(rows)), len(self.images))})]

    def details(self) -> dict[str, Any]:
        """The number of answers with a mask, which no question asks for."""
        return {"answers_with_masks": sum(masks > 0 for rows in self.images for _, masks in rows)}


def plain(answer: str) -> str:
    """An answer in the form in which answers are compared: lower case, without articles, with numbers to ten as digits.

    Apostrophes, commas inside numbers and full stops that are no decimal points are removed, other punctuation becomes
    a blank: "The dog's 1,000 bones." is "dogs 1000 bones".
    """
    answer = re.sub(r"['`’]|(?<=\d),(?=\d)|(?<!\d)\.|\.(?!\d)", "", answer.lower())
    words = re.sub(r"[^\w.]+|_", " ", answer).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)
