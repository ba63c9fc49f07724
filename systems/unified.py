"""One model for the tasks of all five papers: class lists, phrases, reasoning, several objects, false premises.

Its parts are the papers' own; new are the one vocabulary and the one rule of its answers: a thing's verdict, `[SEG]` or
`[REJ]`, comes before any words that would give it away, so that present and absent part at a single token.
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
from systems.base import SYSTEMS, SegTask, System, Wording, load_wording, make_options, pattern_before_mask
from systems.single import REASONING, SLOTS, SingleTarget, explanation_of

TOKENS = TokenSpec(("[SEG]", "[REJ]", "<semantic>", "<cat_start>", "<cat_end>"), ("[SEG]",), "[REJ]")
CLASSES = lasagna.Format(
    TOKENS, separator="", questions="classes", prompt="<semantic>Segment this image.<cat_start> {list} <cat_end>"
)
LIST_PROMPT = " What are {list} in this image? Please output segmentation masks."
SEVERAL_PROMPT = "{} Please name each one and output segmentation masks."
EXPLAINED = 0.5  # share of the pictures with explanations that are asked for them, or answered by them alone
LISTS = {
    **SLOTS,
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
    num_classes_per_sample: int = 3  # questions a picture at most, where each is about one thing
    num_classes_per_question: int = 5  # phrases in one question at most
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all
    listed_classes: float = 0.7  # label sets: share of pictures asked by a class list; the others class by class
    listed_phrases: float = 0.3  # share of pictures whose phrases stand in one question; the others one by one
    false_denial: float = 0.3  # class by class: share of pictures asked about absent classes, which are denied
    false_correction: float = 0.1  # ... or denied with a present class segmented instead
    false_reason: float = 0.15  # reasoning: share of pictures with false premises that are asked about these
    explanatory: float = 0.1  # share of those with explanations answered in text only; below 0: no explanations
    phrases_per_query: int = 1  # evaluation: phrases in one question; 0: all of the picture's
    wording: str = "unified"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("unified")
def unified(**values: Any) -> System:
    options = lasagna.resolve(make_options(Options, values))
    for name in ("listed_classes", "listed_phrases"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"options.{name} is a share of 1, got {getattr(options, name)}")
    if options.num_classes_per_question < 1:
        raise ValueError(f"options.num_classes_per_question must be 1 or more, got {options.num_classes_per_question}")
    wording = load_wording(options.wording, LISTS)
    task = UnifiedTask(
        options,
        classes=lasagna.ClassList(options, CLASSES, wording),
        phrases=gsva.PhraseList(_list_options(options), wording, prompt=LIST_PROMPT, start="Sure, "),
        premise=sesame.SesameTask(_premise_options(options), wording),
        reasons=SingleTarget(wording, options.num_classes_per_sample, options.explanatory),
        shipped=pixellm.DatasetQuestions(wording, options.questions_per_picture, "several", SEVERAL_PROMPT),
    )
    return System("unified", TOKENS, task, "sam", partial(read, wording=wording))


def _list_options(options: Options) -> gsva.Options:
    values = {"num_classes_per_sample": options.num_classes_per_question, "all_absent": "train"}
    return gsva.check(gsva.Options(**values, phrases_per_query=options.phrases_per_query))


def _premise_options(options: Options) -> sesame.Options:
    """Corrections come with a mask; evaluation questions are the ones that most papers share."""
    shared = ("num_classes_per_sample", "false_denial", "false_correction", "false_reason")
    values = {name: getattr(options, name) for name in shared}
    return sesame.check(sesame.Options(**values, segment_correction=True, eval_prompt="lisa"))


@dataclass(frozen=True)
class UnifiedTask:
    """Which paper's part a picture goes to; where two fit, chance decides."""

    options: Options
    classes: lasagna.ClassList
    phrases: gsva.PhraseList
    premise: sesame.SesameTask
    reasons: SingleTarget
    shipped: pixellm.DatasetQuestions

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        return self._part(record, rng).converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        named = record.kind == "multi" and not any(turn.question for (turn,) in record.dialogues)
        if record.kind == "refer" or named:
            return (self.premise if self.options.phrases_per_query == 1 else self.phrases).queries(record)
        return {"classes": self.classes, "multi": self.shipped}.get(record.kind, self.premise).queries(record)

    def _part(self, record: Record, rng: np.random.Generator) -> SegTask:
        if record.kind == "multi":
            return self.shipped
        if record.kind == "classes":
            return self.classes if rng.random() < self.options.listed_classes else self.premise
        if record.kind == "refer":
            return self.phrases if rng.random() < self.options.listed_phrases else self.premise
        explained = record.kind in REASONING and explanation_of(record) != ""
        return self.reasons if explained and rng.random() < EXPLAINED else self.premise


def read(text: str, wording: Wording) -> list[Claim]:
    """Each `[SEG]` and `[REJ]` with the name before it. Behind a refusal that opens an answer comes what is there
    instead of the one thing that was asked about."""
    claims = gsva.read_list(text, wording, TOKENS)
    claims = [replace(claim, phrase=claim.phrase.removeprefix("and ")) for claim in claims]
    if not claims or claims[0].phrase or claims[0].mask is not None:
        return claims
    return claims[:1] + [
        replace(claim, phrase=_is_offer(claim.phrase, wording), is_substitute=True) for claim in claims[1:]
    ]


def _is_offer(words: str, wording: Wording) -> str:
    """The name in a correction, or all its words where they are none of ours."""
    behind = [template.partition("{refuse}")[2].strip(" .") for template in wording.lists["correct_and_mask"]]
    matches = (re.fullmatch(pattern_before_mask(clause), words) for clause in behind)
    return next((match["instead"] for match in matches if match), words)
