"""Sa2VA (arXiv 2501.04001): a Qwen-VL that writes `[SEG]`, whose own state prompts SAM 2; several objects per dialogue.

What differs from LISA: the state is read at the mask token, not before it; referring questions about an image are turns
of one dialogue; the caption format `<p> a boy </p> [SEG]` names a mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.templates import template
from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record, Turn
from systems.base import SYSTEMS, Released, System, make_options, one_of
from systems.pixellm import DatasetQuestions
from systems.single import FIELDS, SENTENCE_PROMPT, SingleTarget, class_queries, is_sentence, single_query
from systems.targets import REASONING, random_name, sample_items
from systems.wording import Wording, about_image, fill_answer, load_wording

# <vp> and </vp> stand around region prompts, which the Qwen models have tokens for, but no use (sa2va.md 4.1).
TOKENS = TokenSpec(("[SEG]", "<p>", "</p>", "<vp>", "</vp>"), ("[SEG]",), wrap_image=False, read="at")
PHRASE_PROMPT = " Please segment {} in this image."  # the blank in front is published (sa2va.md 4.3)
LISTS = {**FIELDS, "several": "sentence", "each_named": "phrase mask"}
# by the backbone of a released folder: which state is read, and the template of its answers (sa2va.md 2.3, 4.3)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"norm": "after", "prompt_template": "qwen_system"},
    "qwen3_vl": {"norm": "before"},
}
# what the released programs do and no file of a folder says, as fields of a recipe (sa2va.md 2.4, 3.1, 4.2)
RELEASED: dict[str, Any] = {
    "use_mm_start_end": False,
    "conv_type": "qwen_chat",
    "model_max_length": 8192,
    "tower": {"min_pixels": 512 * 28**2, "max_pixels": 2048 * 28**2, "resize": "twice"},
    "head_options": {
        "masks": "best_of_three",
        "not_a_point_tokens": 2,
        "resize": "two_step",
        "resample": "pil_bicubic",
    },
}
MASK = re.compile(r"(?:<p>(?P<phrase>(?:(?!</?p>|\[SEG\]).)*)</p>\s*)?\[SEG\]", re.DOTALL)


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 5  # questions about an image, turns of one dialogue; expressions may repeat
    norm: str = "after"  # the state is read after (Qwen2.5-VL) or before (Qwen3-VL) the final norm, see sa2va.md 2.3
    # conversation template of generated answers, where it is not the one of training (released on Qwen2.5-VL)
    prompt_template: str | None = None
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "sa2va"  # training templates: a name in systems/wording or a YAML path

    def __post_init__(self) -> None:
        one_of("norm", self.norm, ("after", "before"))
        if self.prompt_template is not None:
            template(self.prompt_template)  # raises with the choices


@SYSTEMS.register("sa2va")
def sa2va(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, LISTS)
    task = Sa2vaTask(
        wording,
        options.num_classes_per_sample,
        reasoning=SingleTarget(wording, options.num_classes_per_sample, options.explanatory),
        dataset_questions=DatasetQuestions(
            wording, options.questions_per_picture, "several", phrase_prompt=PHRASE_PROMPT
        ),
    )
    released = Released(
        architectures=("Sa2VAChatModelQwen",),
        settings=released_settings,
        prompt_template=options.prompt_template,
    )
    return System("sa2va", replace(TOKENS, norm=options.norm), task, "sam2", read, released)


def released_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Both families have one architecture: the kind of the vision part tells them apart, as it does the backbones."""
    kind = str(values.get("vision_config", {}).get("model_type", ""))
    options = next((choices for family, choices in FAMILIES.items() if kind.startswith(family)), {})
    return {"options": dict(options), "model": RELEASED}


@dataclass(frozen=True)
class Sa2vaTask:
    """Expressions and classes as turns of one dialogue (sa2va.md 5.3). Sa2VA trains on no reasoning data and no label
    sets; they are worded here as LISA words them. Absent targets are not asked about."""

    wording: Wording
    turns: int
    reasoning: SingleTarget
    dataset_questions: DatasetQuestions

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        if record.kind == "multi":
            return self.dataset_questions.converse(record, rng)
        if record.kind in (*REASONING, "vqa"):
            return self.reasoning.converse(record, rng)
        present = [index for index, target in enumerate(record.targets) if target.mask is not None]
        if not present:
            return []
        if record.kind == "classes":
            return [self._dialogue(record, sample_items(present, self.turns, rng), rng)]
        drawn = [present[number] for number in rng.integers(len(present), size=self.turns)]  # with replacement
        return [self._dialogue(record, drawn, rng)]

    def queries(self, record: Record) -> list[Query]:
        """The published prompt of its referring evaluation, also for classes; no prompt for sentences is published, so
        that is LISA's. Absence is an answer without `[SEG]`."""
        if record.kind == "classes":
            return class_queries(record, PHRASE_PROMPT)
        if record.kind == "multi":
            return self.dataset_questions.queries(record)
        prompts = [SENTENCE_PROMPT if is_sentence(record, target) else PHRASE_PROMPT for target in record.targets]
        return [single_query(prompt, record, index) for index, prompt in enumerate(prompts)]

    def _dialogue(self, record: Record, indices: Sequence[int], rng: np.random.Generator) -> Dialogue:
        return tuple(self._turn(record, index, rng, first=number == 0) for number, index in enumerate(indices))

    def _turn(self, record: Record, index: int, rng: np.random.Generator, *, first: bool) -> Turn:
        """Expressions in lower case, without a full stop at the end, as released."""
        phrase = random_name(record.targets[index], rng).strip().lower().removesuffix(".")
        question = self.wording.sample("phrase", rng).format(phrase=phrase)
        answer = fill_answer(self.wording.sample("answer", rng), Mask(index))
        return Turn(about_image(question) if first else question, answer)


def read(answer: str) -> list[Claim]:
    """The k-th `[SEG]` is the k-th mask; directly after `<p> phrase </p>` it has that name, else none."""
    return [
        Claim(" ".join((match["phrase"] or "").split()), number) for number, match in enumerate(MASK.finditer(answer))
    ]
