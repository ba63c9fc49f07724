"""SESAME (arXiv 2312.08366): see whether it is there, say so (deny, correct), segment it; absence is put in words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.templates import template
from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record, Refuse, Script, Target, Turn
from systems.base import SYSTEMS, Released, ReleasedTruth, System, make_options, one_of
from systems.reading import read_claims
from systems.single import PHRASE_PROMPT, SENTENCE_PROMPT, is_sentence
from systems.targets import (
    ABSENT,
    REASONING,
    absent_classes,
    evaluation_phrase,
    label_set,
    random_name,
    sample_items,
)
from systems.wording import (
    Wording,
    about_image,
    check_names,
    fill_answer,
    fill_template,
    load_wording,
    pattern_before_mask,
)

TOKENS = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
RELEASED_BATCH = 5  # questions about an image that the released evaluation answers together
LISTS = {
    "phrase": "phrase",
    "sentence": "sentence",
    "confirm": "phrase? mask",
    "answer": "mask",
    "deny": "phrase?",
    "correct": "phrase instead",
    "correct_and_mask": "phrase instead mask",
    "told": "answer",
}


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 1  # dialogues per image at most
    false_denial: float = 0.07  # label sets: share of images asked about absent classes, which are denied
    false_correction: float = 0.08  # ... or denied with a present class named instead
    false_reason: float = 0.15  # reasoning: share of images with false premises that are asked about these
    segment_correction: bool = False  # a correction also segments what was meant; published: words only
    eval_prompt: str = "random"  # random (keyed by the query; published: unseeded) | first (template) | lisa
    eval_seed: int = 0  # of eval_prompt: random
    masks: str = "first"  # of an answer with several masks: first (published) | all
    prompt_template: str = "vicuna_v1"  # conversation template of generated answers, as released; training: conv_type
    pad_compat: str = "masked"  # padding of generated answers: masked | released (visible, in batches of 5)
    wording: str = "sesame"  # training templates: a name in systems/wording or a YAML path

    def __post_init__(self) -> None:
        one_of("eval_prompt", self.eval_prompt, ("random", "first", "lisa"))
        one_of("masks", self.masks, ("first", "all"))
        one_of("pad_compat", self.pad_compat, ("masked", "released"))
        template(self.prompt_template)  # raises with the choices
        if self.num_classes_per_sample < 1:
            raise ValueError(f"options.num_classes_per_sample must be 1 or more, got {self.num_classes_per_sample}")
        false = self.false_denial, self.false_correction, self.false_reason
        if min(false) < 0 or max(sum(false[:2]), false[2]) > 1:
            raise ValueError(f"options: false_denial + false_correction and false_reason are shares of 1, got {false}")


@SYSTEMS.register("sesame")
def sesame(**values: Any) -> System:
    options = make_options(Options, values)
    task = SesameTask(options, load_wording(options.wording, LISTS))
    corrections: list[str] = []
    if options.segment_correction:
        check_names(task.wording, "instead", "correct_and_mask")
        corrections = [pattern_before_mask(template) for template in task.wording.lists["correct_and_mask"]]
    reader = partial(read, only_first=options.masks == "first", corrections=corrections)
    released = Released(
        architectures=("SESAMEForCausalLM",),
        prompt_template=options.prompt_template,
        visible_padding=RELEASED_BATCH if options.pad_compat == "released" else 0,
        truth=ReleasedTruth(parts="union", ignored="background"),
    )
    return System("sesame", TOKENS, task, "sam", reader, released)


@dataclass(frozen=True)
class SesameTask:
    """One dialogue per query, true or false; which of the two is the dataset's choice, or the recipe's for label sets.

    A wording may put a token where it denies: the field `refuse` of its templates.
    """

    options: Options
    wording: Wording

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        if record.kind == "vqa":
            return list(record.dialogues)
        if record.kind == "classes":
            return self._classes(record, rng)
        targets = range(len(record.targets))
        if record.kind in REASONING:
            targets = self._premise(record, rng)
        return [
            self._about(record, index, rng) for index in sample_items(targets, self.options.num_classes_per_sample, rng)
        ]

    def queries(self, record: Record) -> list[Query]:
        """One query per target, or per class of the label set. The reference answer is the mask, or the denial of
        what is absent."""
        if record.kind == "classes":
            names, present = label_set(record)
            by_name = {name: replace(record.targets[index], phrase=name) for name, index in present.items()}
            pairs = [(by_name.get(name, Target(name, None)), present.get(name)) for name in names]
        else:
            pairs = [(target, index) for index, target in enumerate(record.targets)]
        return [self._query(record, target, () if index is None else (index,)) for target, index in pairs]

    def _classes(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """All true, all denied, or all corrected, decided once per image (sesame.md 4.4).

        Every annotation can be asked about, also several of one name. An image has as many false questions as it
        would have true ones, and each corrects to another of the things that these would be about.
        """
        options = self.options
        number = rng.random()
        denied = number < options.false_denial
        corrected = not denied and number < options.false_denial + options.false_correction
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        # Everything is sampled before the answers are worded, whether this image needs it or not: the order of the
        # random numbers is the same for true and false questions.
        sample = sample_items(present, options.num_classes_per_sample, rng)
        absent = sample_items(absent_classes(record), len(sample), rng)
        names = {index: random_name(record.targets[index], rng).lower() for index in sample}
        if not absent or not (denied or corrected):
            return [self._dialogue("phrase", names[i], self._confirm(names[i], i, rng), rng) for i in sample]
        dialogues = []
        for target, index in zip(absent, sample, strict=False):  # fewer questions where fewer classes are absent
            wrong = random_name(target, rng).lower()
            if corrected:
                answer = self._deny(wrong, ABSENT, names[index], index, rng)
            else:
                answer = self._deny(wrong, ABSENT, None, None, rng)
            dialogues.append(self._dialogue("phrase", wrong, answer, rng))
        return dialogues

    def _premise(self, record: Record, rng: np.random.Generator) -> list[int]:
        """The true queries of a reasoning image, or as many of its false ones, decided once per image."""
        true = [index for index, target in enumerate(record.targets) if target.mask is not None]
        false = [index for index in range(len(record.targets)) if index not in true]
        if false and (not true or rng.random() < self.options.false_reason):
            return sample_items(false, len(true) or len(false), rng)
        return true

    def _about(self, record: Record, index: int, rng: np.random.Generator) -> Dialogue:
        """A question about one target and its answer: confirmed, denied, or corrected."""
        target = record.targets[index]
        text, list_name = self._question_text(record, target)
        if target.mask is None:
            answer = self._refuse(record, index, text.strip(), rng)
        elif record.kind in REASONING:
            answer = fill_answer(self.wording.sample("answer", rng), Mask(index))
        else:
            answer = self._confirm(text.strip(), index, rng)
        return self._dialogue(list_name, text, answer, rng)

    @staticmethod
    def _question_text(record: Record, target: Target) -> tuple[str, str]:
        """(text, list of question templates). Phrases are in lower case, except the false ones of reasoning data, which
        stay as the dataset has them, as released."""
        if is_sentence(record, target):
            return target.phrase, "sentence"
        own_words = record.kind in REASONING and target.mask is None
        return target.phrase if own_words else target.phrase.lower(), "phrase"

    def _dialogue(self, list_name: str, text: str, answer: Script, rng: np.random.Generator) -> Dialogue:
        question = self.wording.sample(list_name, rng).format(**{list_name: text})
        return (Turn(about_image(question), answer),)

    def _confirm(self, name: str, index: int, rng: np.random.Generator) -> Script:
        return fill_template(self.wording.sample("confirm", rng), phrase=name, mask=(Mask(index),))

    def _refuse(self, record: Record, index: int, text: str, rng: np.random.Generator) -> Script:
        """The dataset's answer to a false question, or a denial of ours."""
        correction = record.targets[index].correction
        hole = Refuse(index)
        if record.kind not in REASONING:
            return self._deny(text, hole, correction, substitute_name(record, correction), rng)
        if correction:
            return fill_template(self.wording.sample("told", rng), answer=correction, refuse=(hole,))
        return self._deny(text, hole, None, None, rng)

    def _deny(
        self, name: str, hole: Refuse, instead: str | None, meant: int | None, rng: np.random.Generator
    ) -> Script:
        """A denial of `name`, which offers `instead` if there is such a thing.

        It holds a refusal where the wording has one, and with `segment_correction` the mask of target `meant`.
        """
        if instead is None:
            return fill_template(self.wording.sample("deny", rng), phrase=name, refuse=(hole,))
        with_mask = self.options.segment_correction and meant is not None
        correction = self.wording.sample("correct_and_mask" if with_mask else "correct", rng)
        masks = (Mask(meant),) if meant is not None else ()  # a template without the field takes no notice
        return fill_template(correction, phrase=name, refuse=(hole,), instead=instead.lower(), mask=masks)

    def _query(self, record: Record, target: Target, targets: tuple[int, ...]) -> Query:
        phrase = target.phrase.strip()
        hole = Refuse(targets[0]) if targets else ABSENT
        denial = fill_template(self.wording.lists["deny"][0], phrase=phrase.lower(), refuse=(hole,))
        answer = denial if target.mask is None else (Mask(targets[0]), ".")
        return Query(about_image(self._prompt(record, target)), answer, targets, (phrase,))

    def _prompt(self, record: Record, target: Target) -> str:
        """The evaluation question. A random template depends on seed, image and phrase alone (sesame.md 6.3)."""
        phrase = target.phrase.strip()
        text, list_name = self._question_text(record, target)
        if self.options.eval_prompt == "lisa":
            return (SENTENCE_PROMPT if list_name == "sentence" else PHRASE_PROMPT).format(
                evaluation_phrase(record, phrase)
            )
        templates = self.wording.lists[list_name]
        number = 0
        if self.options.eval_prompt == "random":
            number = zlib.crc32(f"{self.options.eval_seed}|{record.image.name}|{phrase}".encode()) % len(templates)
        return templates[number].format(**{list_name: text.strip()})


def substitute_name(record: Record, correction: str | None) -> int | None:
    """The target that a correction names, where the record has it with a mask."""
    name = (correction or "").strip().lower()
    for index, target in enumerate(record.targets):
        if target.mask is not None and target.phrase.strip().lower() == name:
            return index
    return None


def read(answer: str, only_first: bool = True, corrections: Sequence[str] = ()) -> list[Claim]:
    """The masks of an answer (or only the first), or a refusal where it has none; no words name a mask reliably.

    corrections: patterns of the words before a mask that is of what is there instead (`segment_correction`):

        "There is no sea here. Do you mean red car? It is [SEG]."
        ->  [Claim("", None), Claim("red car", 0, is_substitute=True)]
    """
    found = read_claims(answer, TOKENS)
    for claim in found[:1]:
        matches = (re.fullmatch(pattern, claim.phrase) for pattern in corrections)
        if match := next(filter(None, matches), None):
            return [Claim("", None), Claim(match["instead"], claim.mask, is_substitute=True)]
    claims = [Claim("", claim.mask) for claim in found] or [Claim("", None)]
    return claims[:1] if only_first else claims
