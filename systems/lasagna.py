"""LaSagnA (arXiv 2404.08506): a class list in, every class answered present (a mask) or absent.

Three strategies make training on long lists work, each a switch of its own:

    random_list            the question lists a random sample of the label set
    sequence_augmentation  absent classes join the answer
    order_following        the answer keeps the question's order

`strategies: paper` turns all three on. `strategies: released` does what the released code does: every class of a closed
label set is listed, absent classes join the answer, and question and answer are shuffled independently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from data.tokens import TokenSpec
from data.types import Dialogue, Mask, Query, Record, Script, Turn
from systems.base import (
    ABSENT,
    SYSTEMS,
    System,
    Wording,
    about_picture,
    label_set,
    load_wording,
    make_options,
    one_of,
    read_claims,
    sample_items,
    shuffled,
)
from systems.single import SLOTS, SingleTarget

PRESETS = {
    "paper": {"random_list": "sampled", "sequence_augmentation": True, "order_following": True},
    "released": {"random_list": "released", "sequence_augmentation": True, "order_following": False},
}
Lists = TypeVar("Lists", bound="ListOptions")
OPEN_LABEL_SET = 200  # label sets beyond this (OpenImages: 350) do not fit a question; the release lists the sample


@dataclass(frozen=True)
class Format:
    """A way to write lists and answers: tokens, what stands between two names, questions of training (a list of the
    wording) and of evaluation."""

    tokens: TokenSpec
    separator: str
    questions: str
    prompt: str


FORMATS = {
    "released": Format(
        TokenSpec(("<cat_start>", "<cat_end>", "<semantic>", "<ins>", "<no_ins>"), ("<ins>",), "<no_ins>"),
        separator="",
        questions="classes_released",
        prompt="<semantic>Segment this image.<cat_start> {list} <cat_end>",
    ),
    "paper": Format(
        TokenSpec(("[SEG]", "[NEG]"), ("[SEG]",), "[NEG]"),
        separator=", ",
        questions="classes_paper",
        prompt="Can you segment the {list} in this image?",
    ),
}


@dataclass(frozen=True)
class ListOptions:
    """None at a strategy means: what the preset `strategies` says."""

    strategies: str = "paper"  # paper | released
    random_list: str | None = None  # sampled | all (dataset order) | released (all, shuffled; open sets sampled)
    sequence_augmentation: bool | None = None
    order_following: bool | None = None
    num_all_classes: int = 80  # classes in a sample: all present ones, filled up with absent ones
    min_all_classes: int = 0  # above 0: that number is drawn from min_all_classes..num_all_classes a picture
    classes_per_query: int = 0  # evaluation: classes in one question; 0: the whole label set


@dataclass(frozen=True)
class Options(ListOptions):
    tokens: str = "released"  # released (<ins>, <no_ins>, ...) | paper ([SEG], [NEG])
    num_classes_per_sample: int = 5  # refer and reason: dialogues a picture at most
    explanatory: float = 0.1  # share of explained pictures answered in text only; below 0: no explanations
    wording: str = "lasagna"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("lasagna")
def lasagna(**values: Any) -> System:
    options = resolve(make_options(Options, values))
    one_of("tokens", options.tokens, FORMATS)
    form = FORMATS[options.tokens]
    lists = {form.questions: "list" for form in FORMATS.values()}
    wording = load_wording(options.wording, {**SLOTS, **lists})
    single = SingleTarget(wording, options.num_classes_per_sample, options.explanatory)
    read = partial(read_claims, tokens=form.tokens)
    task = LasagnaTask(single, ClassList(options, form, wording))
    return System("lasagna", form.tokens, task, "sam", read, published=("LaSagnAForCausalLM",))


def resolve(options: Lists) -> Lists:
    """Checks the choices and fills the strategies that were left to the preset."""
    one_of("strategies", options.strategies, PRESETS)
    one_of("random_list", options.random_list, (None, "sampled", "all", "released"))
    if not 0 <= options.min_all_classes <= options.num_all_classes or options.num_all_classes < 1:
        raise ValueError("options: 0 <= min_all_classes <= num_all_classes and 1 <= num_all_classes must hold")
    if options.classes_per_query < 0:
        raise ValueError(f"options.classes_per_query must be 0 (all) or more, got {options.classes_per_query}")
    preset = PRESETS[options.strategies]
    return replace(options, **{name: value for name, value in preset.items() if getattr(options, name) is None})


@dataclass(frozen=True)
class LasagnaTask:
    """Label sets as class lists; everything else as single-target dialogues (lasagna.md 4.3)."""

    single: SingleTarget
    lists: ClassList

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        return (self.lists if record.kind == "classes" else self.single).converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        return (self.lists if record.kind == "classes" else self.single).queries(record)


@dataclass(frozen=True)
class ClassList:
    """One question that lists classes, one answer that gives each its mask or its absence."""

    options: ListOptions
    format: Format
    wording: Wording

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """One dialogue: sample classes, write the list, answer the sample. None where nothing is left to answer; a
        picture without a labelled pixel raises NothingToAsk, so that another is drawn, as released."""
        names, present = label_set(record)
        sample = sample_classes(names, present, self._sample_size(rng), rng)
        asked = self._question_list(names, sample, rng)
        answered = set(sample) if self.options.sequence_augmentation else set(sample) & set(present)
        if not answered:
            return []
        order = [name for name in asked if name in answered]
        if not self.options.order_following:
            order = shuffled(order, rng)
        template = self.wording.sample(self.format.questions, rng)
        return [(Turn(self._question(template, asked), self._answer(order, present)),)]

    def queries(self, record: Record) -> list[Query]:
        """The whole label set in dataset order, in one question or in pieces; forced: the true answer in that order."""
        names, present = label_set(record)
        size = self.options.classes_per_query or len(names)
        pieces = [names[start : start + size] for start in range(0, len(names), size)]
        return [
            Query(
                question=self._question(self.format.prompt, piece),
                reference_answer=self._answer(piece, present),
                targets=tuple(present[name] for name in piece if name in present),
                phrases=tuple(piece),
            )
            for piece in pieces
        ]

    def _sample_size(self, rng: np.random.Generator) -> int:
        most, least = self.options.num_all_classes, self.options.min_all_classes
        return int(rng.integers(least, most + 1)) if least else most

    def _question_list(self, names: list[str], sample: list[str], rng: np.random.Generator) -> list[str]:
        if self.options.random_list == "all":
            return names
        sampled = self.options.random_list == "sampled" or len(names) > OPEN_LABEL_SET
        return shuffled(sample if sampled else names, rng)

    def _question(self, template: str, names: list[str]) -> str:
        return about_picture(template.format(list=", ".join(names)))

    def _answer(self, names: list[str], present: dict[str, int]) -> Script:
        parts: list = []
        for name in names:
            hole = Mask(present[name]) if name in present else ABSENT
            parts += [self.format.separator + name if parts else name, hole]
        return tuple(parts)


def sample_classes(names: list[str], present: dict[str, int], size: int, rng: np.random.Generator) -> list[str]:
    """The classes of one sample (lasagna.md 4.4): all present ones, filled up to `size` with absent ones.

    A label set below `size` is taken whole. Where `size` or more are present, half of it is drawn from them and a
    quarter from the absent ones: the published 40 and 20 at the default 80.
    """
    here = [name for name in names if name in present]
    absent = [name for name in names if name not in present]
    if len(names) < size:
        return names
    if len(here) >= size:
        return sample_items(here, max(1, size // 2), rng) + sample_items(absent, size // 4, rng)
    return here + sample_items(absent, size - len(here), rng)
