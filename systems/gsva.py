"""GSVA (arXiv 2312.10103): all phrases in one question, each accepted with `[SEG]` or rejected with `[REJ]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.pieces import KEEP
from data.tokens import TokenSpec
from data.types import Claim, Dialogue, EmptyMask, Mask, MaskFn, Query, Record, Refuse, Script, Turn
from systems.base import SYSTEMS, Released, ReleasedTruth, System, make_options, one_of
from systems.reading import MARKS, read_claims
from systems.single import FIELDS, SingleTarget
from systems.targets import ABSENT, REASONING, label_set, random_name, sample_items
from systems.wording import (
    Wording,
    about_image,
    check_names,
    fill_template,
    load_wording,
    merge_text,
    pattern_after_masks,
    pattern_before_mask,
    wording_file,
)

TOKENS = TokenSpec(added=("[SEG]", "[REJ]"), mask=("[SEG]",), refuse="[REJ]")
# By options.blanks: what the published program writes, and the same with a blank after every comma and word.
LIST_PROMPTS = {
    "released": " What are {list}in this image? Please output segmentation masks.",
    "all": " What are {list} in this image? Please output segmentation masks.",
}
LIST_STARTS = {"released": "Sure,", "all": "Sure, "}  # of the reference answer
CLASS_SEPARATORS = {"released": ",", "all": ", "}  # between the classes of a training answer
LIST_PART = "{phrase}:{mask}"
SEPARATOR = ", "  # between phrases, and between the parts of a reference answer
FLAGS = ("mllm_model_path", "segmentation_model_path", "val_refzom")


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 3  # phrases or classes in a question; reasoning: dialogues per image
    all_absent: str = "skip"  # a question whose phrases are all absent: skip (published: never trained on) | train
    phrases_per_query: int = 0  # evaluation: phrases in one question; 0: all of the image's, as published
    # Published without some: between the classes of a training answer (",road") and after the phrases of an evaluation
    # question ("skyin"). A large language model reads that; for a small one, whose vocabulary has whole words with the
    # blank before them, the answer names a class by other tokens than the question.
    blanks: str = "released"  # released | all
    empty_mask: str = "error"  # a mask without a pixel of what is there: error | refuse (published: as if absent)
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "gsva"  # training templates: a name in systems/wording or a YAML path

    def __post_init__(self) -> None:
        one_of("all_absent", self.all_absent, ("skip", "train"))
        one_of("empty_mask", self.empty_mask, ("error", "refuse"))
        one_of("blanks", self.blanks, LIST_PROMPTS)
        if self.phrases_per_query < 0:
            raise ValueError(f"options.phrases_per_query must be 0 (all) or more, got {self.phrases_per_query}")


@SYSTEMS.register("gsva")
def gsva(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, {**FIELDS, "list": "list", "start": "", "part": "phrase mask"})
    single = SingleTarget(wording, options.num_classes_per_sample, options.explanatory)
    task = GsvaTask(single, PhraseList(options, wording))
    released = Released(
        architectures=("LisaGSVAForCausalLM",),
        tokenization=KEEP,
        flags=FLAGS,
        truth=ReleasedTruth(parts="union", ignored="object"),
    )
    return System("gsva", TOKENS, task, "sam", partial(read_phrase_list, wording=wording), released)


@dataclass(frozen=True)
class GsvaTask:
    """Phrases and classes in lists; reasoning in single-target dialogues (gsva.md 3)."""

    single: SingleTarget
    lists: PhraseList

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        single = record.kind in (*REASONING, "vqa")
        return (self.single if single else self.lists).converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        """Reasoning as published: the answer is the mask without a full stop."""
        if record.kind not in REASONING:
            return self.lists.queries(record)
        return [replace(query, reference_answer=query.reference_answer[:1]) for query in self.single.queries(record)]


@dataclass(frozen=True)
class PhraseList:
    """One question that lists phrases, one answer that gives each its mask or its rejection."""

    options: Options
    wording: Wording

    def __post_init__(self) -> None:
        starts, parts = (len(self.wording.lists[key]) for key in ("start", "part"))
        if starts != parts:
            raise ValueError(
                f"{wording_file(self.wording.name)}: start and part belong together, they must be equally many, not "
                f"{starts} and {parts}"
            )
        check_names(self.wording, "phrase", "part")

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """One dialogue about a sample of the targets. None where all of them are absent, unless they are to train."""
        indices = sample_items(range(len(record.targets)), self.options.num_classes_per_sample, rng)
        holes = [self._hole(record, index) for index in indices]
        accepted = any(isinstance(hole, Mask) for hole in holes)
        if not holes or (not accepted and self.options.all_absent == "skip"):
            return []
        names = [clean(random_name(record.targets[index], rng)) for index in indices]
        question = self.wording.sample("list", rng).format(list=SEPARATOR.join(names).lower())
        style = int(rng.integers(len(self.wording.lists["start"])))  # the k-th start belongs to the k-th part
        start, part = (self.wording.lists[key][style] for key in ("start", "part"))
        separator = CLASS_SEPARATORS[self.options.blanks] if record.kind == "classes" else SEPARATOR
        return [(Turn(about_image(question), answer_of(f"{start} ", part, separator, names, holes)),)]

    def queries(self, record: Record) -> list[Query]:
        """The fixed prompt about every target, or every class of the label set, in order, with the true
        answer."""
        if record.kind == "classes":
            names, present = label_set(record)
            targets = [present.get(name, ABSENT.target) for name in names]
        else:
            names = [clean(target.phrase.lower()) for target in record.targets]
            targets = list(range(len(names)))
        size = self.options.phrases_per_query or max(1, len(names))
        starts = range(0, len(names), size)
        return [self._query(record, names[at : at + size], targets[at : at + size]) for at in starts]

    def _query(self, record: Record, names: Sequence[str], targets: Sequence[int]) -> Query:
        holes = [self._hole(record, index) for index in targets]
        prompt, start = LIST_PROMPTS[self.options.blanks], LIST_STARTS[self.options.blanks]
        return Query(
            question=about_image(prompt.format(list=SEPARATOR.join(names))),
            reference_answer=answer_of(start, LIST_PART, SEPARATOR, names, holes),
            targets=tuple(index for index in targets if index >= 0),
            phrases=tuple(names),
        )

    def _hole(self, record: Record, index: int) -> Mask | Refuse:
        """What stands for a target: a mask, or a rejection where it is not in the image."""
        mask = record.targets[index].mask if index >= 0 else None
        if mask is None or (self.options.empty_mask == "refuse" and is_empty(mask)):
            return Refuse(index)
        return Mask(index)


def clean(phrase: str) -> str:
    """Without outer blanks and full stops, as released."""
    return phrase.strip().strip(".")


def is_empty(mask: MaskFn) -> bool:
    """Whether a target that is listed as present has no pixel, e.g. because all its polygons are broken."""
    try:
        return not mask().any()
    except EmptyMask:  # some sources raise it themselves
        return True


def answer_of(start: str, part: str, separator: str, names: Sequence[str], holes: Sequence[Mask | Refuse]) -> Script:
    """`start`, the parts in the order of the names, a full stop.

    >>> answer_of("Sure, ", "{phrase}:{mask}", ", ", ["cat", "dog"], [Mask(0), Refuse(1)])
    ('Sure, cat:', Mask(target=0), ', dog:', Refuse(target=1), '.')
    """
    script: list[str | Mask | Refuse] = [start]
    for position, (name, hole) in enumerate(zip(names, holes, strict=True)):
        if position:
            script.append(separator)
        script += fill_template(part, phrase=name, mask=(hole,))
    return merge_text([*script, "."])


def read_phrase_list(answer: str, wording: Wording, tokens: TokenSpec = TOKENS) -> list[Claim]:
    """Each mask and refusal with the name before it, without the words that the templates put around names."""
    starts = {" ".join(start.split()) for start in (*wording.lists["start"], LIST_STARTS["released"])}
    opening = "|".join(map(re.escape, sorted(starts, key=len, reverse=True)))
    alone = "|".join(re.escape(start.strip(MARKS)) for start in starts)  # where no name follows
    lead = re.compile(rf"{pattern_after_masks(wording.lists['part'])}(?:(?:{alone})$|(?:{opening})\s*)?")
    around = sorted(map(pattern_before_mask, wording.lists["part"]), key=len, reverse=True)  # the most specific first
    return [replace(claim, phrase=_name(claim.phrase, lead, around)) for claim in read_claims(answer, tokens)]


def _name(words: str, lead: re.Pattern[str], around: Sequence[str]) -> str:
    """The name in the words before a token: `Sure, the red car is` -> `red car`, where a template reads so."""
    words = lead.sub("", words, count=1)
    match = next((match for pattern in around if (match := re.fullmatch(pattern, words))), None)
    return match["phrase"].strip() if match else words
