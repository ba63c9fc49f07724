"""PixelLM (arXiv 2312.02228): several targets a question, a codebook of tokens a mask, a mask decoder without SAM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record, Script, Turn
from systems.base import (
    REASONING,
    SYSTEMS,
    System,
    Wording,
    about_picture,
    asked_as,
    fill_template,
    load_wording,
    make_options,
    merge_text,
    one_of,
    pattern_before_mask,
    random_name,
    read_claims,
    sample_items,
    shuffled,
)
from systems.single import PHRASE_PROMPT, SENTENCE_PROMPT, SLOTS, SingleTarget, class_queries

RENAMED = 0.9  # share of the targets of shipped questions that go by the name that the dataset rephrased
EXPANSIONS = {  # how often `*_more` joins its list; released: sem_seg, refer_seg and multi_reason_seg do it once each
    "released": {"phrase": 2, "sentence": 1},
    "once": {"phrase": 1, "sentence": 1},
}
LISTS = {
    **SLOTS,
    "phrase_more": "phrase",
    "sentence_more": "sentence",
    "each": "phrase? mask",
    "together": "phrases? masks",
    "each_named": "phrase mask",
    "together_named": "phrases masks",
}


@dataclass(frozen=True)
class Options:
    seg_token_num: int = 3  # mask tokens a scale
    image_feature_scale_num: int = 2  # scales; as released there are always two
    num_classes_per_sample: int = 3  # questions a picture at most; reasoning: dialogues
    num_classes_per_question: int = 3  # targets in a question at most
    use_expand_question_list: bool = False  # also the questions of `*_more` of the wording
    expanded_lists: str = "released"  # these join once a data set object: released (phrases: twice) | once
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all, as released
    eval_targets: tuple[
        int, ...
    ] = ()  # expressions an evaluation question asks for, in turn; none: one (6, 5, 4: multi)
    explanatory: float = 0.1  # share of explained pictures answered in text only; below 0: no explanations
    wording: str = "pixellm"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("pixellm")
def pixellm(**values: Any) -> System:
    options = check(make_options(Options, values))
    wording = load_wording(options.wording, LISTS)
    if options.use_expand_question_list:
        lists, times = wording.lists, EXPANSIONS[options.expanded_lists]
        more = {name: lists[name] + lists[f"{name}_more"] * number for name, number in times.items()}
        wording = replace(wording, lists={**lists, **more})
    names = tuple(f"[SEG{i}]" for i in range(options.seg_token_num * options.image_feature_scale_num))
    tokens = TokenSpec(added=names, mask=names)
    single = SingleTarget(wording, options.num_classes_per_sample, options.explanatory)
    task = PixelTask(options, single, DatasetQuestions(wording, options.questions_per_picture), wording)
    return System(
        "pixellm",
        tokens,
        task,
        "pixel",
        partial(read, tokens=tokens, wording=wording),
        published=("PixelLMForCausalLM",),
        published_tower="openai/clip-vit-large-patch14-336",
    )


def check(options: Options) -> Options:
    one_of("image_feature_scale_num", options.image_feature_scale_num, (2,))
    one_of("expanded_lists", options.expanded_lists, EXPANSIONS)
    for name in ("seg_token_num", "num_classes_per_sample", "num_classes_per_question"):
        if getattr(options, name) < 1:
            raise ValueError(f"options.{name} must be 1 or more, got {getattr(options, name)}")
    if options.questions_per_picture < 0 or min(options.eval_targets, default=1) < 1:
        raise ValueError("options: questions_per_picture must be 0 (all) or more, eval_targets numbers from 1 on")
    return options


@dataclass(frozen=True)
class PixelTask:
    """Classes and phrases several to a question; a dataset's own questions; reasoning one target a dialogue."""

    options: Options
    single: SingleTarget
    shipped: DatasetQuestions
    wording: Wording

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        if record.kind == "multi":
            return self.shipped.converse(record, rng)
        if record.kind in (*REASONING, "vqa"):
            return self.single.converse(record, rng)
        return [(self._multi_target(record, indices, rng),) for indices in self._split_into_questions(record, rng)]

    def queries(self, record: Record) -> list[Query]:
        """The published prompts (pixellm.md 3.1); of several suffixes for shipped questions the first."""
        if record.kind == "classes":
            return class_queries(record)
        if record.kind == "multi":
            return self.shipped.queries(record)
        if record.kind == "refer" and self.options.eval_targets:
            return self._multi_target_queries(record)
        return self.single.queries(record)

    def _split_into_questions(self, record: Record, rng: np.random.Generator) -> list[list[int]]:
        """Present targets, dealt to the questions: one to each, the rest to any that has room (pixellm.md 3.3)."""
        questions, room = self.options.num_classes_per_sample, self.options.num_classes_per_question
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        items = shuffled(sample_items(present, questions * room, rng), rng)
        hands = [[item] for item in items[:questions]]
        for item in items[questions:]:
            free = [hand for hand in hands if len(hand) < room]
            free[rng.integers(len(free))].append(item)
        return hands

    def _multi_target(self, record: Record, indices: Sequence[int], rng: np.random.Generator) -> Turn:
        names = [random_name(record.targets[index], rng).strip() for index in indices]
        holes = [Mask(index) for index in indices]
        listing = "".join(enumerate_with_and(names)).lower()
        question = about_picture(self.wording.sample("phrase", rng).format(phrase=listing))
        if len(holes) == 1:
            return Turn(question, fill_template(self.wording.sample("answer", rng), mask=holes))
        if rng.random() < 0.5:
            return Turn(question, one_by_one(self.wording.sample("each", rng), names, holes))
        return Turn(
            question,
            fill_template(self.wording.sample("together", rng), phrases=listing, masks=enumerate_with_and(holes)),
        )

    def _multi_target_queries(self, record: Record) -> list[Query]:
        """Consecutive expressions in groups of the sizes asked, as in multi-RefCOCO (pixellm.md 6.2)."""
        queries, start, sizes = [], 0, cycle(self.options.eval_targets)
        while start < len(record.targets):
            targets = range(start, min(start + next(sizes), len(record.targets)))
            queries.append(multi_target_query(record, targets))
            start = targets.stop
        return queries


@dataclass(frozen=True)
class DatasetQuestions:
    """Questions that come with the dataset, each about several targets (pixellm.md 3.4).

    at_most: a picture, 0: all. questions, prompt: the list of the wording, and the evaluation question.
    """

    wording: Wording
    at_most: int
    questions: str = "sentence"
    prompt: str = SENTENCE_PROMPT.lstrip(" ")

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        chosen = sample_items(record.dialogues, self.at_most or len(record.dialogues), rng)
        return [(self._turn(record, turn, rng),) for (turn,) in chosen]

    def queries(self, record: Record) -> list[Query]:
        """The dataset's questions; forced: its answer, or its masks alone where it has no text."""
        return [self._query(record, turn) for (turn,) in record.dialogues]

    def _turn(self, record: Record, turn: Turn, rng: np.random.Generator) -> Turn:
        """Where the dataset has no text to answer with, the targets are named."""
        question = about_picture(self.wording.sample(self.questions, rng).format(sentence=turn.question))
        if any(isinstance(part, str) for part in turn.answer):
            return Turn(question, turn.answer)
        targets = [record.targets[hole.target] for hole in turn.answer]
        names = [t.aliases[0] if t.aliases and rng.random() >= RENAMED else t.phrase for t in targets]
        if "together_named" not in self.wording.lists or rng.random() < 0.5:
            return Turn(question, one_by_one(self.wording.sample("each_named", rng), names, turn.answer))
        template = self.wording.sample("together_named", rng)
        return Turn(
            question, fill_template(template, phrases=", ".join(names).lower(), masks=enumerate_with_and(turn.answer))
        )

    def _query(self, record: Record, turn: Turn) -> Query:
        targets = tuple(part.target for part in turn.answer if isinstance(part, Mask))
        if not turn.question:
            return multi_target_query(record, targets)
        worded = any(isinstance(part, str) for part in turn.answer)
        forced = turn.answer if worded else merge_text([*enumerate_with_and(turn.answer), "."])
        asked = tuple(record.targets[index].phrase for index in targets)
        return Query(about_picture(self.prompt.format(turn.question)), forced, targets, asked)


def multi_target_query(record: Record, targets: Sequence[int]) -> Query:
    """The phrase prompt about several targets, by their names; of several the forced answer ends in a full stop."""
    names = tuple(asked_as(record, record.targets[index].phrase) for index in targets)
    end = (".",) if len(targets) > 1 else ()  # as released
    question = about_picture(PHRASE_PROMPT.format("".join(enumerate_with_and(names))))
    return Query(
        question, merge_text([*enumerate_with_and([Mask(index) for index in targets]), *end]), tuple(targets), names
    )


def one_by_one(template: str, names: Sequence[str], holes: Sequence[Mask]) -> Script:
    """One template for all: every target gets its clause."""
    clause = template.removesuffix(".")
    clauses = [fill_template(clause, phrase=name, mask=(hole,)) for name, hole in zip(names, holes, strict=True)]
    return merge_text([*enumerate_with_and(clauses), "."])


def enumerate_with_and(parts: Sequence[Any]) -> Script:
    """`a, b and c` of words, holes or pieces of answers."""
    script: list[Any] = []
    for index, part in enumerate(parts):
        script.append("" if not index else " and " if index == len(parts) - 1 else ", ")
        script += part if isinstance(part, tuple) else (part,)
    return merge_text(script)


def read(text: str, tokens: TokenSpec, wording: Wording) -> list[Claim]:
    """The k-th complete group is the k-th mask; its name, where our wording gives it one, alone or in a list."""
    claims = read_claims(text, tokens)
    names = [_found(claim.phrase, _patterns(wording, "each", "phrase")) or "" for claim in claims]
    if claims and not any(names):
        listing = _found(claims[0].phrase, _patterns(wording, "together", "phrases"))
        split = re.split(r", | and ", listing) if listing else []
        names = split if len(split) == len(claims) else names
    return [replace(claim, phrase=name) for claim, name in zip(claims, names, strict=True)]


def _patterns(wording: Wording, key: str, slot: str) -> list[str]:
    """What stands before a mask in the templates of a list that name something there, the longest first."""
    clauses = {pattern_before_mask(template) for name in (key, f"{key}_named") for template in wording.lists[name]}
    return [f"(?:and )?{clause}" for clause in sorted(clauses, key=len, reverse=True) if f"<{slot}>" in clause]


def _found(words: str, patterns: Sequence[str]) -> str | None:
    matches = (re.fullmatch(pattern, words, re.IGNORECASE) for pattern in patterns)
    return next((match[1] for match in matches if match), None)
