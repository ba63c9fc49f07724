"""One dialogue a target: what refer and reason data, explanations and dialogues of a dataset become in most papers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.types import Dialogue, Mask, Query, Record, Script, Target, Turn
from systems.base import (
    ABSENT,
    REASONING,
    Wording,
    about_picture,
    asked_as,
    fill_answer,
    label_set,
    random_name,
    sample_items,
)

SLOTS = {"phrase": "phrase", "sentence": "sentence", "explain": "", "answer": "mask"}
PHRASE_PROMPT = " What is {} in this image? Please output segmentation mask."  # the blank in front is published
SENTENCE_PROMPT = " {} Please output segmentation mask."


@dataclass(frozen=True)
class SingleTarget:
    """Up to `at_most` targets of a picture, each in its own dialogue (lisa.md 3.4, 4.3 to 4.6).

    explanatory: share of the explained pictures that are trained without masks, as text only; the others are half
    plain and half mask with explanation. Below 0: explanations are not used. Absent targets are not asked about.
    """

    wording: Wording
    at_most: int
    explanatory: float

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise ValueError(f"options.num_classes_per_sample must be 1 or more, got {self.at_most}")
        if self.explanatory > 1:
            raise ValueError(f"options.explanatory is a share, at most 1, got {self.explanatory}")

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        if record.kind == "vqa":
            return list(record.dialogues)
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        answered = self._style(record, rng)
        explanation = explanation_of(record)
        dialogues = []
        for index in sample_items(present, self.at_most, rng):
            target, answer = record.targets[index], fill_answer(self.wording.sample("answer", rng), Mask(index))
            if answered == "plain":
                turn = Turn(about_picture(self._question(record, target, rng)), answer)
            elif answered == "explained":
                question = about_picture(f"{target.phrase} {self.wording.sample('explain', rng)}")
                turn = Turn(question, (*answer, f" {explanation}"))
            else:
                turn = Turn(about_picture(target.phrase), (explanation,))
            dialogues.append((turn,))
        return dialogues

    def queries(self, record: Record) -> list[Query]:
        """The published prompts (lisa.md 3.3), one query a target. Which targets count is the benchmark's choice."""
        prompts = [SENTENCE_PROMPT if is_sentence(record, target) else PHRASE_PROMPT for target in record.targets]
        return [single_query(prompt, record, index) for index, prompt in enumerate(prompts)]

    def _style(self, record: Record, rng: np.random.Generator) -> str:
        """How this picture is answered; one draw a picture, as released."""
        if self.explanatory < 0 or not explanation_of(record):
            return "plain"
        if rng.random() < self.explanatory:
            return "text only"
        return "plain" if rng.random() < 0.5 else "explained"

    def _question(self, record: Record, target: Target, rng: np.random.Generator) -> str:
        """Sentences as they are; phrases lower-cased, without outer blanks but in reasoning data (lisa.md 4.4, 4.6)."""
        if is_sentence(record, target):
            return self.wording.sample("sentence", rng).format(sentence=target.phrase)
        template, phrase = self.wording.sample("phrase", rng), random_name(target, rng).lower()
        return template.format(phrase=phrase if record.kind in REASONING else phrase.strip())


def is_sentence(record: Record, target: Target) -> bool:
    """Whether a target is asked about in its own words, as a sentence, and not as a phrase inside a question."""
    return record.kind == "reason" if target.sentence is None else target.sentence


def explanation_of(record: Record) -> str:
    """The explanation that the dataset ships for a reasoning picture, "" where there is none."""
    if record.kind not in REASONING or not record.dialogues:
        return ""
    words = "".join(part for part in record.dialogues[0][-1].answer if isinstance(part, str))
    return words if words.strip() else ""


def single_query(prompt: str, record: Record, index: int) -> Query:
    """A published prompt about one target, with the published forced answer: the mask and a full stop."""
    phrase = asked_as(record, record.targets[index].phrase)
    forced: Script = (Mask(index), ".")
    return Query(about_picture(prompt.format(phrase)), forced, (index,), (phrase,))


def class_queries(record: Record) -> list[Query]:
    """No protocol for semantic sets was released: each class of the vocabulary is asked by the phrase prompt.

    The forced answer to an absent class, too, is a mask: its hole points at no target, the truth is empty.
    """
    names, present = label_set(record)
    queries = []
    for name in names:
        targets = (present[name],) if name in present else ()
        forced = (Mask(targets[0] if targets else ABSENT.target), ".")
        queries.append(Query(about_picture(PHRASE_PROMPT.format(name)), forced, targets, (name,)))
    return queries
