"""One model for the tasks of all five papers: class lists, phrases, reasoning, several objects, false premises.

Its parts are the papers' own. New are one vocabulary and one rule for its answers: a thing's verdict, `[SEG]` or
`[REJ]`, comes before any words that would give it away, so that a single token decides between present and absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Query, Record
from systems import gsva, lasagna, pixellm, sesame
from systems.base import SYSTEMS, SegTask, System, make_options
from systems.reading import MARKS
from systems.single import FIELDS, SingleTarget, explanation_of
from systems.targets import REASONING
from systems.wording import Wording, check_names, load_wording, pattern_before_mask, wording_file

TOKENS = TokenSpec(("[SEG]", "[REJ]", "<semantic>", "<cat_start>", "<cat_end>"), ("[SEG]",), "[REJ]")
CLASSES = lasagna.Format(
    TOKENS, separator="", questions="classes", prompt="<semantic>Segment this image.<cat_start> {list} <cat_end>"
)
SEVERAL_PROMPT = "{} Please name each one and output segmentation masks."
EXPLAINED = 0.5  # share of the images with explanations that are asked for them, or answered by them alone
LISTS = {
    **FIELDS,
    "classes": "list",
    "list": "list",
    "start": "",
    "part": "phrase mask",
    "several": "sentence",
    "each_named": "phrase mask",
    "confirm": "phrase? mask",
    "deny": "phrase refuse",
    "correct": "phrase instead refuse",
    "correct_and_mask": "phrase instead refuse mask",
    "told": "answer refuse",
}


@dataclass(frozen=True)
class Options(lasagna.ListOptions):
    num_classes_per_sample: int = 3  # questions per image at most, where each is about one thing
    num_classes_per_question: int = 5  # phrases in one question at most
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all
    listed_classes: float = 0.7  # label sets: share of images with a class list; the others go class by class
    listed_phrases: float = 0.3  # share of images whose phrases stand in one question; the others one by one
    false_denial: float = 0.3  # class by class: share of images asked about absent classes, which are denied
    false_correction: float = 0.1  # ... or denied with a present class segmented instead
    false_reason: float = 0.15  # reasoning: share of images with false premises that are asked about these
    explanatory: float = 0.1  # share of those with explanations answered in text only; below 0: no explanations
    phrases_per_query: int = 1  # evaluation: phrases in one question; 0: all of the image's
    wording: str = "unified"  # training templates: a name in systems/wording or a YAML path

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("listed_classes", "listed_phrases"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"options.{name} is a share of 1, got {getattr(self, name)}")
        if self.num_classes_per_question < 1:
            raise ValueError(f"options.num_classes_per_question must be 1 or more, got {self.num_classes_per_question}")


@SYSTEMS.register("unified")
def unified(**values: Any) -> System:
    options = lasagna.with_preset(make_options(Options, values))
    wording = load_wording(options.wording, LISTS)
    check_names(wording, "phrase", "each_named")
    check_names(wording, "instead", "correct_and_mask")
    for template in wording.lists["correct_and_mask"]:
        if template.partition("{refuse}")[0].strip(MARKS):
            raise ValueError(
                f"{wording_file(options.wording)}: correct_and_mask: {template!r} must begin with {{refuse}}: only "
                "after an opening refusal is a mask read as that of what is there instead"
            )
    task = UnifiedTask(
        options,
        classes=lasagna.ClassList(options, CLASSES, wording),
        phrases=gsva.PhraseList(_list_options(options), wording),
        premise=sesame.SesameTask(_premise_options(options), wording),
        explanations=SingleTarget(wording, options.num_classes_per_sample, options.explanatory),
        dataset_questions=pixellm.DatasetQuestions(wording, options.questions_per_picture, "several", SEVERAL_PROMPT),
    )
    return System("unified", TOKENS, task, "sam", partial(read, wording=wording))


def _list_options(options: Options) -> gsva.Options:
    return gsva.Options(
        num_classes_per_sample=options.num_classes_per_question,
        all_absent="train",
        phrases_per_query=options.phrases_per_query,
        blanks="all",
    )


def _premise_options(options: Options) -> sesame.Options:
    """Corrections come with a mask; evaluation questions are the ones that most papers share."""
    return sesame.Options(
        num_classes_per_sample=options.num_classes_per_sample,
        false_denial=options.false_denial,
        false_correction=options.false_correction,
        false_reason=options.false_reason,
        segment_correction=True,
        eval_prompt="lisa",
    )


@dataclass(frozen=True)
class UnifiedTask:
    """Sends each image to one paper's part; where two fit, to either of them at random."""

    options: Options
    classes: lasagna.ClassList
    phrases: gsva.PhraseList
    premise: sesame.SesameTask
    explanations: SingleTarget
    dataset_questions: pixellm.DatasetQuestions

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        return self._part(record, rng).converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        only_phrases = record.kind == "multi" and not any(turn.question for (turn,) in record.dialogues)
        if record.kind == "refer" or only_phrases:
            return (self.premise if self.options.phrases_per_query == 1 else self.phrases).queries(record)
        parts: dict[str, SegTask] = {"classes": self.classes, "multi": self.dataset_questions}
        return parts.get(record.kind, self.premise).queries(record)

    def _part(self, record: Record, rng: np.random.Generator) -> SegTask:
        if record.kind == "multi":
            return self.dataset_questions
        if record.kind == "classes":
            return self.classes if rng.random() < self.options.listed_classes else self.premise
        if record.kind == "refer":
            return self.phrases if rng.random() < self.options.listed_phrases else self.premise
        explained = record.kind in REASONING and explanation_of(record) != ""
        return self.explanations if explained and rng.random() < EXPLAINED else self.premise


def read(answer: str, wording: Wording) -> list[Claim]:
    """Each `[SEG]` and `[REJ]` with the name before it.

    An answer that opens with a refusal is about the one thing of the question; the one mask that follows is of what is
    there instead of it:

        "[REJ]. There is no sea here, but there is red car: [SEG]."
        ->  [Claim("", None), Claim("red car", 0, is_substitute=True)]
    """
    claims = gsva.read_phrase_list(answer, wording, TOKENS)
    claims = [replace(claim, phrase=claim.phrase.removeprefix("and ")) for claim in claims]
    if len(claims) != 2 or claims[0].phrase or claims[0].mask is not None:
        return claims
    refusal, other = claims
    return [refusal, replace(other, phrase=_substitute_name(other.phrase, wording), is_substitute=True)]


def _substitute_name(words: str, wording: Wording) -> str:
    """The name in a correction, or all its words where they follow no template of ours."""
    clauses = [template.partition("{refuse}")[2].strip(" .") for template in wording.lists["correct_and_mask"]]
    matches = (re.fullmatch(pattern_before_mask(clause), words) for clause in clauses)
    return next((match["instead"] for match in matches if match), words)
