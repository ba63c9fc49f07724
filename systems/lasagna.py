"""LaSagnA (arXiv 2404.08506): a class list in, every class answered present (a mask) or absent.

Three strategies make training on long lists work, each a switch of its own:

    random_list            the question lists a random sample of the label set
    sequence_augmentation  absent classes join the answer
    order_following        the answer keeps the question's order

For a label set (sky, car, dog, bus) and an image of a car under the sky, `strategies: paper`, which turns all three on,
may ask "Can you segment the bus, sky, car in this image?" and answer "bus <no_ins> sky <ins> car <ins>".
`strategies: released` does what the released code does: every class of a closed label set is listed, absent classes
join the answer, and question and answer are shuffled independently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from data.tokens import TokenSpec
from data.types import Dialogue, Mask, Query, Record, Refuse, Script, Turn
from systems.base import SYSTEMS, Released, System, make_options, one_of
from systems.reading import read_claims
from systems.single import FIELDS, SingleTarget
from systems.targets import ABSENT, label_set, sample_items, shuffled
from systems.wording import Wording, about_image, load_wording

PRESETS = {
    "paper": {"random_list": "sampled", "sequence_augmentation": True, "order_following": True},
    "released": {"random_list": "released", "sequence_augmentation": True, "order_following": False},
}
SomeListOptions = TypeVar("SomeListOptions", bound="ListOptions")
OPEN_LABEL_SET = 200  # label sets beyond this (OpenImages: 350) do not fit a question; the release lists the sample


@dataclass(frozen=True)
class Format:
    """A way to write class lists and their answers."""

    tokens: TokenSpec
    separator: str  # between two names of an answer
    questions: str  # of training: a list of the wording
    prompt: str  # the question of evaluation


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
    """A strategy of None is the preset's, see `with_preset`."""

    strategies: str = "paper"  # paper | released
    random_list: str | None = None  # sampled | all (dataset order) | released (all, shuffled; open sets sampled)
    sequence_augmentation: bool | None = None
    order_following: bool | None = None
    num_all_classes: int = 80  # classes in a sample: all present ones, filled up with absent ones
    min_all_classes: int = 0  # above 0: that number is sampled per image from min_all_classes to num_all_classes
    classes_per_query: int = 0  # evaluation: classes in one question; 0: the whole label set

    def __post_init__(self) -> None:
        one_of("strategies", self.strategies, PRESETS)
        one_of("random_list", self.random_list, (None, "sampled", "all", "released"))
        if not 0 <= self.min_all_classes <= self.num_all_classes or self.num_all_classes < 1:
            raise ValueError("options: 0 <= min_all_classes <= num_all_classes and 1 <= num_all_classes must hold")
        if self.classes_per_query < 0:
            raise ValueError(f"options.classes_per_query must be 0 (all) or more, got {self.classes_per_query}")


@dataclass(frozen=True)
class Options(ListOptions):
    tokens: str = "released"  # released (<ins>, <no_ins>, ...) | paper ([SEG], [NEG])
    num_classes_per_sample: int = 5  # refer and reason: dialogues per image at most
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "lasagna"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("lasagna")
def lasagna(**values: Any) -> System:
    options = with_preset(make_options(Options, values))
    one_of("tokens", options.tokens, FORMATS)
    list_format = FORMATS[options.tokens]
    question_lists = {each.questions: "list" for each in FORMATS.values()}  # a wording has those of all formats
    wording = load_wording(options.wording, {**FIELDS, **question_lists})
    single = SingleTarget(wording, options.num_classes_per_sample, options.explanatory)
    task = LasagnaTask(single, ClassList(options, list_format, wording))
    read = partial(read_claims, tokens=list_format.tokens)
    released = Released(architectures=("LaSagnAForCausalLM",))
    return System("lasagna", list_format.tokens, task, "sam", read, released)


def with_preset(options: SomeListOptions) -> SomeListOptions:
    """The options with the strategies that are None taken from the preset `strategies`."""
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
        """One dialogue: sample classes, write the list, answer the sample. [] where nothing is left to answer; an
        image without a labelled pixel raises NothingToAsk, and the mixture takes another, as released."""
        names, present = label_set(record)
        sample = sample_classes(names, present, self._sample_size(rng), rng)
        question_names = self._question_list(names, sample, rng)
        to_answer = set(sample) if self.options.sequence_augmentation else set(sample) & set(present)
        if not to_answer:
            return []
        answer_names = [name for name in question_names if name in to_answer]
        if not self.options.order_following:
            answer_names = shuffled(answer_names, rng)
        template = self.wording.sample(self.format.questions, rng)
        return [(Turn(self._question(template, question_names), self._answer(answer_names, present)),)]

    def queries(self, record: Record) -> list[Query]:
        """The whole label set in dataset order, in one question or in pieces, with the true answer in that order."""
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
        options = self.options
        if options.min_all_classes == 0:
            return options.num_all_classes
        return int(rng.integers(options.min_all_classes, options.num_all_classes + 1))

    def _question_list(self, names: list[str], sample: list[str], rng: np.random.Generator) -> list[str]:
        if self.options.random_list == "all":
            return names
        sampled = self.options.random_list == "sampled" or len(names) > OPEN_LABEL_SET
        return shuffled(sample if sampled else names, rng)

    def _question(self, template: str, names: list[str]) -> str:
        return about_image(template.format(list=", ".join(names)))

    def _answer(self, names: list[str], present: dict[str, int]) -> Script:
        parts: list[str | Mask | Refuse] = []
        for name in names:
            parts.append(self.format.separator + name if parts else name)
            parts.append(Mask(present[name]) if name in present else ABSENT)
        return tuple(parts)


def sample_classes(names: list[str], present: dict[str, int], size: int, rng: np.random.Generator) -> list[str]:
    """The classes of one sample (lasagna.md 4.4): all present ones, filled up to `size` with absent ones.

    A label set below `size` is taken as it is. Where `size` or more are present, half of `size` is sampled from them
    and a quarter from the absent ones: the published 40 and 20 at the default 80.
    """
    present_names = [name for name in names if name in present]
    absent_names = [name for name in names if name not in present]
    if len(names) < size:
        return names
    if len(present_names) >= size:
        return sample_items(present_names, max(1, size // 2), rng) + sample_items(absent_names, size // 4, rng)
    return present_names + sample_items(absent_names, size - len(present_names), rng)
