"""SESAME (arXiv 2312.08366): see whether it is there, say so (deny, correct), segment it; absence is told in words."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.templates import template
from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record, Refuse, Script, Target, Turn
from systems.base import (
    ABSENT,
    SYSTEMS,
    ReleasedTruth,
    System,
    Wording,
    about_picture,
    absent_classes,
    asked_as,
    fill_answer,
    fill_template,
    label_set,
    load_wording,
    make_options,
    one_of,
    random_name,
    read_claims,
    sample_items,
)
from systems.single import PHRASE_PROMPT, REASONING, SENTENCE_PROMPT, is_sentence

TOKENS = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
RELEASED_BATCH = 5  # questions about a picture that the released evaluation answers together
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
    num_classes_per_sample: int = 1  # dialogues a picture at most
    false_denial: float = 0.07  # label sets: share of pictures asked about absent classes, which are denied
    false_correction: float = 0.08  # ... or denied with a present class named instead
    false_reason: float = 0.15  # reasoning: share of pictures with false premises that are asked about these
    segment_correction: bool = False  # a correction also segments what was meant; published: words only
    eval_prompt: str = "random"  # random (a keyed draw a query; published: unseeded) | first (template) | lisa
    eval_seed: int = 0  # of eval_prompt: random
    masks: str = "first"  # of an answer with several masks: first (published) | all
    prompt_template: str = "vicuna_v1"  # conversation template of generated answers, as released; training: conv_type
    pad_compat: str = "masked"  # padding of generated answers: masked | released (visible, in batches of 5)
    wording: str = "sesame"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("sesame")
def sesame(**values: Any) -> System:
    options = check(make_options(Options, values))
    task = SesameTask(options, load_wording(options.wording, LISTS))
    return System(
        "sesame",
        TOKENS,
        task,
        "sam",
        partial(read, only_first=options.masks == "first"),
        published=("SESAMEForCausalLM",),
        prompt_template=options.prompt_template,
        visible_padding=RELEASED_BATCH if options.pad_compat == "released" else 0,
        released_truth=ReleasedTruth(parts="union", ignored="background"),
    )


def check(options: Options) -> Options:
    one_of("eval_prompt", options.eval_prompt, ("random", "first", "lisa"))
    one_of("masks", options.masks, ("first", "all"))
    one_of("pad_compat", options.pad_compat, ("masked", "released"))
    template(options.prompt_template)  # raises with the choices
    if options.num_classes_per_sample < 1:
        raise ValueError(f"options.num_classes_per_sample must be 1 or more, got {options.num_classes_per_sample}")
    false = options.false_denial, options.false_correction, options.false_reason
    if min(false) < 0 or max(sum(false[:2]), false[2]) > 1:
        raise ValueError(f"options: false_denial + false_correction and false_reason are shares of 1, got {false}")
    return options


@dataclass(frozen=True)
class SesameTask:
    """One dialogue a query, true or false; which of the two is the dataset's choice, or the recipe's for label sets.

    A wording may put a token where it denies: the slot `refuse` of its templates.
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
        """One query a target, or a class of the label set. Forced: the mask, or the denial of what is not there."""
        if record.kind == "classes":
            names, present = label_set(record)
            here = {name: replace(record.targets[index], phrase=name) for name, index in present.items()}
            asked = [(here.get(name, Target(name, None)), present.get(name)) for name in names]
        else:
            asked = [(target, index) for index, target in enumerate(record.targets)]
        return [self._query(record, target, () if index is None else (index,)) for target, index in asked]

    def _classes(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """All true, all denied, or all corrected: one draw per picture (sesame.md 4.4).

        Every annotation can be asked about, also several of one name. A picture has as many false questions as it
        would have true ones, and each corrects to another of the things that these would be about.
        """
        options, chance = self.options, rng.random()
        denied = chance < options.false_denial
        corrected = not denied and chance < options.false_denial + options.false_correction
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        here = sample_items(present, options.num_classes_per_sample, rng)
        absent = sample_items(absent_classes(record), len(here), rng)
        names = {index: random_name(record.targets[index], rng).lower() for index in here}
        if not absent or not (denied or corrected):
            return [self._dialogue("phrase", names[i], self._confirm(names[i], i, rng), rng) for i in here]
        dialogues = []
        for target, index in zip(absent, here, strict=False):  # fewer questions where fewer classes are absent
            wrong = random_name(target, rng).lower()
            instead, meant = (names[index], index) if corrected else (None, None)
            dialogues.append(self._dialogue("phrase", wrong, self._deny(wrong, ABSENT, instead, meant, rng), rng))
        return dialogues

    def _premise(self, record: Record, rng: np.random.Generator) -> list[int]:
        """The true queries of a reasoning picture, or as many of its false ones: one draw per picture."""
        true = [index for index, target in enumerate(record.targets) if target.mask is not None]
        false = [index for index in range(len(record.targets)) if index not in true]
        asked_false = bool(false) and (not true or rng.random() < self.options.false_reason)
        return sample_items(false, len(true) or len(false), rng) if asked_false else true

    def _about(self, record: Record, index: int, rng: np.random.Generator) -> Dialogue:
        """A question about one target and its answer: confirmed, denied, or corrected."""
        target, reasoning = record.targets[index], record.kind in REASONING
        text, list_name = self._worded(record, target)
        if target.mask is None:
            answer = self._refuse(record, index, text.strip(), rng)
        elif reasoning:
            answer = fill_answer(self.wording.sample("answer", rng), Mask(index))
        else:
            answer = self._confirm(text.strip(), index, rng)
        return self._dialogue(list_name, text, answer, rng)

    @staticmethod
    def _worded(record: Record, target: Target) -> tuple[str, str]:
        """(text, list of question templates). Phrases are in lower case, but the false ones of reasoning data stay as
        the dataset has them, as released."""
        if is_sentence(record, target):
            return target.phrase, "sentence"
        own_words = record.kind in REASONING and target.mask is None
        return target.phrase if own_words else target.phrase.lower(), "phrase"

    def _dialogue(self, list_name: str, text: str, answer: Script, rng: np.random.Generator) -> Dialogue:
        question = self.wording.sample(list_name, rng).format(**{list_name: text})
        return (Turn(about_picture(question), answer),)

    def _confirm(self, name: str, index: int, rng: np.random.Generator) -> Script:
        return fill_template(self.wording.sample("confirm", rng), phrase=name, mask=(Mask(index),))

    def _refuse(self, record: Record, index: int, text: str, rng: np.random.Generator) -> Script:
        """What the dataset says to a false question, or a denial of ours."""
        correction, hole = record.targets[index].correction, Refuse(index)
        if record.kind not in REASONING:
            return self._deny(text, hole, correction, substitute_name(record, correction), rng)
        if correction:
            return fill_template(self.wording.sample("told", rng), answer=correction, refuse=(hole,))
        return self._deny(text, hole, None, None, rng)

    def _deny(
        self, name: str, hole: Refuse, instead: str | None, meant: int | None, rng: np.random.Generator
    ) -> Script:
        """Words, and where the wording has it a refusal; with `segment_correction` also the mask of target `meant`."""
        slots = {"phrase": name, "refuse": (hole,)}
        if instead is None:
            return fill_template(self.wording.sample("deny", rng), **slots)
        slots["instead"] = instead.lower()
        if self.options.segment_correction and meant is not None:
            return fill_template(self.wording.sample("correct_and_mask", rng), **slots, mask=(Mask(meant),))
        return fill_template(self.wording.sample("correct", rng), **slots)

    def _query(self, record: Record, target: Target, targets: tuple[int, ...]) -> Query:
        phrase = target.phrase.strip()
        hole = Refuse(targets[0]) if targets else ABSENT
        denial = fill_template(self.wording.lists["deny"][0], phrase=phrase.lower(), refuse=(hole,))
        forced = denial if target.mask is None else (Mask(targets[0]), ".")
        return Query(about_picture(self._prompt(record, target)), forced, targets, (phrase,))

    def _prompt(self, record: Record, target: Target) -> str:
        """The evaluation question. A random template depends on seed, picture and phrase alone (sesame.md 6.3)."""
        phrase = target.phrase.strip()
        text, list_name = self._worded(record, target)
        if self.options.eval_prompt == "lisa":
            return (SENTENCE_PROMPT if list_name == "sentence" else PHRASE_PROMPT).format(asked_as(record, phrase))
        templates = self.wording.lists[list_name]
        key = zlib.crc32(f"{self.options.eval_seed}|{record.image.name}|{phrase}".encode())
        chosen = templates[key % len(templates) if self.options.eval_prompt == "random" else 0]
        return chosen.format(**{list_name: text.strip()})


def substitute_name(record: Record, correction: str | None) -> int | None:
    """The target that a correction names, where the record has it with a mask."""
    name = (correction or "").strip().lower()
    there = (i for i, t in enumerate(record.targets) if t.mask is not None and t.phrase.strip().lower() == name)
    return next(there, None)


def read(text: str, only_first: bool = True) -> list[Claim]:
    """The mask of an answer, or its refusal where it has none; the words name nothing that could be trusted."""
    claims = [Claim("", claim.mask) for claim in read_claims(text, TOKENS)] or [Claim("", None)]
    return claims[:1] if only_first else claims
