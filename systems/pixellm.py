"""PixelLM (arXiv 2312.02228): several targets per question, several tokens per mask, a mask decoder without SAM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record, Refuse, Script, Turn
from systems.base import SYSTEMS, Released, System, make_options, one_of
from systems.reading import read_claims
from systems.single import FIELDS, PHRASE_PROMPT, SENTENCE_PROMPT, SingleTarget, class_queries
from systems.targets import REASONING, evaluation_phrase, random_name, sample_items, shuffled
from systems.wording import (
    Wording,
    about_image,
    check_names,
    fill_template,
    load_wording,
    merge_text,
    pattern_after_masks,
    pattern_before_mask,
)

RENAMED = 0.9  # share of the targets of shipped questions that go by the name that the dataset rephrased
EXPANSIONS = {  # how often `*_more` joins its list; released: sem_seg, refer_seg and multi_reason_seg do it once each
    "released": {"phrase": 2, "sentence": 1},
    "once": {"phrase": 1, "sentence": 1},
}
LISTS = {
    **FIELDS,
    "phrase_more": "phrase",
    "sentence_more": "sentence",
    "each": "phrase? mask",
    "together": "phrases? masks",
    "each_named": "phrase mask",
    "together_named": "phrases masks",
}


@dataclass(frozen=True)
class Options:
    seg_token_num: int = 3  # mask tokens per scale
    image_feature_scale_num: int = 2  # scales; as released there are always two
    num_classes_per_sample: int = 3  # questions per image at most; reasoning: dialogues
    num_classes_per_question: int = 3  # targets in a question at most
    use_expand_question_list: bool = False  # also the questions of `*_more` of the wording
    expanded_lists: str = "released"  # these join once per dataset object: released (phrases: twice) | once
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all, as released
    # Expressions that an evaluation question asks for, in turn; (): one. multi-RefCOCO: (6, 5, 4)
    eval_targets: tuple[int, ...] = ()
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "pixellm"  # training templates: a name in systems/wording or a YAML path

    def __post_init__(self) -> None:
        one_of("image_feature_scale_num", self.image_feature_scale_num, (2,))
        one_of("expanded_lists", self.expanded_lists, EXPANSIONS)
        for name in ("seg_token_num", "num_classes_per_sample", "num_classes_per_question"):
            if getattr(self, name) < 1:
                raise ValueError(f"options.{name} must be 1 or more, got {getattr(self, name)}")
        if min(self.eval_targets, default=1) < 1:
            raise ValueError(f"options.eval_targets must be numbers from 1 on, got {self.eval_targets}")


@SYSTEMS.register("pixellm")
def pixellm(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, LISTS)
    check_names(wording, "phrase", "each", "each_named")
    check_names(wording, "phrases", "together", "together_named")
    if options.use_expand_question_list:
        lists = dict(wording.lists)
        for name, times in EXPANSIONS[options.expanded_lists].items():
            lists[name] += lists[f"{name}_more"] * times
        wording = replace(wording, lists=lists)
    names = tuple(f"[SEG{i}]" for i in range(options.seg_token_num * options.image_feature_scale_num))
    tokens = TokenSpec(added=names, mask=names)
    single = SingleTarget(wording, options.num_classes_per_sample, options.explanatory)
    task = PixelTask(options, single, DatasetQuestions(wording, options.questions_per_picture), wording)
    released = Released(
        architectures=("PixelLMForCausalLM",),
        vision_tower="openai/clip-vit-large-patch14-336",
    )
    return System("pixellm", tokens, task, "pixel", partial(read, tokens=tokens, wording=wording), released)


@dataclass(frozen=True)
class PixelTask:
    """Several classes or phrases per question; a dataset's own questions; reasoning with one target per dialogue."""

    options: Options
    single: SingleTarget
    dataset_questions: DatasetQuestions
    wording: Wording

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        if record.kind == "multi":
            return self.dataset_questions.converse(record, rng)
        if record.kind in (*REASONING, "vqa"):
            return self.single.converse(record, rng)
        return [(self._multi_target(record, indices, rng),) for indices in self._split_into_questions(record, rng)]

    def queries(self, record: Record) -> list[Query]:
        """The published prompts (pixellm.md 3.1), for a dataset's own questions with the first of their suffixes."""
        if record.kind == "classes":
            return class_queries(record)
        if record.kind == "multi":
            return self.dataset_questions.queries(record)
        if record.kind == "refer" and self.options.eval_targets:
            return self._multi_target_queries(record)
        return self.single.queries(record)

    def _split_into_questions(self, record: Record, rng: np.random.Generator) -> list[list[int]]:
        """Target indices per question: each question gets one present target, each further target joins a random
        question that is not full (pixellm.md 3.3)."""
        questions = self.options.num_classes_per_sample
        most = self.options.num_classes_per_question
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        indices = shuffled(sample_items(present, questions * most, rng), rng)
        groups = [[index] for index in indices[:questions]]
        for index in indices[questions:]:
            not_full = [group for group in groups if len(group) < most]
            not_full[rng.integers(len(not_full))].append(index)
        return groups

    def _multi_target(self, record: Record, indices: Sequence[int], rng: np.random.Generator) -> Turn:
        names = [random_name(record.targets[index], rng).strip() for index in indices]
        holes = [Mask(index) for index in indices]
        listing = list_words(names).lower()
        question = about_image(self.wording.sample("phrase", rng).format(phrase=listing))
        if len(holes) == 1:
            return Turn(question, fill_template(self.wording.sample("answer", rng), mask=holes))
        if rng.random() < 0.5:
            return Turn(question, one_by_one(self.wording.sample("each", rng), names, holes))
        return Turn(
            question,
            fill_template(self.wording.sample("together", rng), phrases=listing, masks=enumerate_with_and(holes)),
        )

    def _multi_target_queries(self, record: Record) -> list[Query]:
        """Consecutive expressions in groups of the sizes `eval_targets`, as in multi-RefCOCO (pixellm.md 6.2)."""
        queries = []
        start = 0
        sizes = cycle(self.options.eval_targets)
        while start < len(record.targets):
            targets = range(start, min(start + next(sizes), len(record.targets)))
            queries.append(multi_target_query(record, targets))
            start = targets.stop
        return queries


@dataclass(frozen=True)
class DatasetQuestions:
    """Questions that come with the dataset, each about several targets (pixellm.md 3.4).

    at_most: questions per image, 0: all. questions: the list of the wording. prompt: the evaluation question;
    phrase_prompt: that of questions which the dataset leaves to the system.
    """

    wording: Wording
    at_most: int
    questions: str = "sentence"
    prompt: str = SENTENCE_PROMPT.lstrip(" ")
    phrase_prompt: str = PHRASE_PROMPT

    def __post_init__(self) -> None:
        if self.at_most < 0:
            raise ValueError(f"options.questions_per_picture must be 0 (all) or more, got {self.at_most}")

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        dialogues = sample_items(record.dialogues, self.at_most or len(record.dialogues), rng)
        return [(self._turn(record, turn, rng),) for (turn,) in dialogues]

    def queries(self, record: Record) -> list[Query]:
        """The dataset's questions, with its answer as reference, or with the masks alone where it has no text."""
        return [self._query(record, turn) for (turn,) in record.dialogues]

    def _turn(self, record: Record, turn: Turn, rng: np.random.Generator) -> Turn:
        """The dataset's own answer; where that is masks without text, one that names the targets."""
        question = about_image(self.wording.sample(self.questions, rng).format(sentence=turn.question))
        holes = [part for part in turn.answer if not isinstance(part, str)]
        if len(holes) < len(turn.answer):
            return Turn(question, turn.answer)
        targets = [record.targets[hole.target] for hole in holes]
        names = [t.aliases[0] if t.aliases and rng.random() >= RENAMED else t.phrase for t in targets]
        if "together_named" not in self.wording.lists or rng.random() < 0.5:
            return Turn(question, one_by_one(self.wording.sample("each_named", rng), names, holes))
        template = self.wording.sample("together_named", rng)
        masks = enumerate_with_and(holes)
        return Turn(question, fill_template(template, phrases=", ".join(names).lower(), masks=masks))

    def _query(self, record: Record, turn: Turn) -> Query:
        targets = tuple(part.target for part in turn.answer if isinstance(part, Mask))
        if not turn.question:
            return multi_target_query(record, targets, self.phrase_prompt)
        has_text = any(isinstance(part, str) for part in turn.answer)
        answer = turn.answer if has_text else merge_text([*enumerate_with_and(turn.answer), "."])
        phrases = tuple(record.targets[index].phrase for index in targets)
        return Query(about_image(self.prompt.format(turn.question)), answer, targets, phrases)


def multi_target_query(record: Record, targets: Sequence[int], prompt: str = PHRASE_PROMPT) -> Query:
    """The phrase prompt about one or several targets by their names; several masks are followed by a full stop."""
    names = tuple(evaluation_phrase(record, record.targets[index].phrase) for index in targets)
    answer = enumerate_with_and([Mask(index) for index in targets])
    if len(targets) > 1:  # as released
        answer = merge_text([*answer, "."])
    return Query(about_image(prompt.format(list_words(names))), answer, tuple(targets), names)


def one_by_one(template: str, names: Sequence[str], holes: Sequence[Mask | Refuse]) -> Script:
    """The same template for every target: `The cat is {mask}, the dog is {mask}.`"""
    clause = template.removesuffix(".")
    clauses = [fill_template(clause, phrase=name, mask=(hole,)) for name, hole in zip(names, holes, strict=True)]
    return merge_text([*enumerate_with_and(clauses), "."])


def enumerate_with_and(parts: Sequence[str | Mask | Refuse | Script]) -> Script:
    """`a, b and c` of words, holes or pieces of answers."""
    script: list[str | Mask | Refuse] = []
    for separator, part in zip(_separators(len(parts)), parts, strict=True):
        script.append(separator)
        script += part if isinstance(part, tuple) else (part,)
    return merge_text(script)


def list_words(words: Sequence[str]) -> str:
    """`a, b and c` of words alone."""
    return "".join(separator + word for separator, word in zip(_separators(len(words)), words, strict=True))


def _separators(number: int) -> list[str]:
    """What stands before each of `number` parts of a list."""
    if number < 2:
        return [""] * number
    return ["", *[", "] * (number - 2), " and "]


def read(answer: str, tokens: TokenSpec, wording: Wording) -> list[Claim]:
    """The k-th complete group is the k-th mask. It has a name where the answer follows a template of ours:

    "The cat is (mask), the dog is (mask)."  ->  each mask with the name in its own clause (lists `each*`)
    "The cat, dog are (mask) and (mask)."    ->  the names stand before the first mask (lists `together*`) and are
                                                 given out in order, if there is one for each mask
    """
    claims = read_claims(answer, tokens)
    names = [_first_match(claim.phrase, _patterns(wording, "each", "phrase")) or "" for claim in claims]
    if claims and not any(names):
        listing = _first_match(claims[0].phrase, _patterns(wording, "together", "phrases"))
        listed_names = re.split(r", | and ", listing) if listing else []
        if len(listed_names) == len(claims):
            names = listed_names
    return [replace(claim, phrase=name) for claim, name in zip(claims, names, strict=True)]


def _patterns(wording: Wording, key: str, name_field: str) -> list[str]:
    """Patterns of the words before a mask, from those templates of a list that have a name there, the longest first."""
    templates = [template for name in (key, f"{key}_named") for template in wording.lists[name]]
    clauses, before = set(map(pattern_before_mask, templates)), pattern_after_masks(templates)
    named = sorted((clause for clause in clauses if f"<{name_field}>" in clause), key=len, reverse=True)
    return [f"{before}(?:and )?{clause}" for clause in named]


def _first_match(words: str, patterns: Sequence[str]) -> str | None:
    matches = (re.fullmatch(pattern, words, re.IGNORECASE) for pattern in patterns)
    return next((match[1] for match in matches if match), None)
