"""One dialogue per target: what most papers make of refer and reason data, explanations and shipped dialogues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.types import Dialogue, Mask, Query, Record, Script, Target, Turn
from systems.targets import ABSENT, REASONING, evaluation_phrase, label_set, random_name, sample_items
from systems.wording import Wording, about_image, fill_answer

FIELDS = {"phrase": "phrase", "sentence": "sentence", "explain": "", "answer": "mask"}
PHRASE_PROMPT = " What is {} in this image? Please output segmentation mask."  # the blank in front is published
SENTENCE_PROMPT = " {} Please output segmentation mask."


@dataclass(frozen=True)
class SingleTarget:
    """Up to `at_most` targets of an image, each in its own dialogue (lisa.md 3.4, 4.3 to 4.6).

    explanatory: share of the images with an explanation that are trained as text only, without masks. Of the others,
    half ignore the explanation, half are asked for mask and explanation. Below 0, explanations are not used. Absent
    targets are not asked about.
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
        style = self._style(record, rng)
        explanation = explanation_of(record)
        dialogues: list[Dialogue] = []
        for index in sample_items(present, self.at_most, rng):
            target = record.targets[index]
            # Sampled for text-only answers too, which do not use it: their random numbers follow the other styles'.
            answer = fill_answer(self.wording.sample("answer", rng), Mask(index))
            if style == "plain":
                turn = Turn(about_image(self._question(record, target, rng)), answer)
            elif style == "explained":
                question = about_image(f"{target.phrase} {self.wording.sample('explain', rng)}")
                turn = Turn(question, (*answer, f" {explanation}"))
            else:
                turn = Turn(about_image(target.phrase), (explanation,))
            dialogues.append((turn,))
        return dialogues

    def queries(self, record: Record) -> list[Query]:
        """The published prompts (lisa.md 3.3), one query per target. Which targets count is the benchmark's choice."""
        prompts = [SENTENCE_PROMPT if is_sentence(record, target) else PHRASE_PROMPT for target in record.targets]
        return [single_query(prompt, record, index) for index, prompt in enumerate(prompts)]

    def _style(self, record: Record, rng: np.random.Generator) -> str:
        """How this image is answered: "plain", "explained" or "text only"; sampled once per image, as released."""
        if self.explanatory < 0 or not explanation_of(record):
            return "plain"
        if rng.random() < self.explanatory:
            return "text only"
        return "plain" if rng.random() < 0.5 else "explained"

    def _question(self, record: Record, target: Target, rng: np.random.Generator) -> str:
        """Sentences stay as they are; phrases are lower-cased and, except in reasoning data, stripped of outer blanks
        (lisa.md 4.4, 4.6)."""
        if is_sentence(record, target):
            return self.wording.sample("sentence", rng).format(sentence=target.phrase)
        template = self.wording.sample("phrase", rng)
        phrase = random_name(target, rng).lower()
        return template.format(phrase=phrase if record.kind in REASONING else phrase.strip())


def is_sentence(record: Record, target: Target) -> bool:
    """Whether a target is asked about in its own words, as a sentence, and not as a phrase inside a question."""
    return record.kind == "reason" if target.sentence is None else target.sentence


def explanation_of(record: Record) -> str:
    """The explanation that the dataset ships for a reasoning image, "" where there is none."""
    if record.kind not in REASONING or not record.dialogues:
        return ""
    words = "".join(part for part in record.dialogues[0][-1].answer if isinstance(part, str))
    return words if words.strip() else ""


def single_query(prompt: str, record: Record, index: int) -> Query:
    """A published prompt about one target, with the published reference answer: the mask and a full stop."""
    phrase = evaluation_phrase(record, record.targets[index].phrase)
    answer: Script = (Mask(index), ".")
    return Query(about_image(prompt.format(phrase)), answer, (index,), (phrase,))


def class_queries(record: Record, prompt: str = PHRASE_PROMPT) -> list[Query]:
    """No protocol for semantic sets was released: each class of the vocabulary is asked for by the phrase prompt.

    The reference answer for an absent class is a mask as well: its hole points at no target, its truth is empty.
    """
    names, present = label_set(record)
    queries = []
    for name in names:
        targets = (present[name],) if name in present else ()
        answer: Script = (Mask(targets[0] if targets else ABSENT.target), ".")
        queries.append(Query(about_image(prompt.format(name)), answer, targets, (name,)))
    return queries
