"""UniPixel (NeurIPS 2025), for images: a Qwen2.5-VL whose state before `<|seg|>` gives SAM 2.1 two prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import IMAGE_PLACEHOLDER, Claim, Dialogue, Query, Record
from systems.base import SYSTEMS, Released, System, make_options
from systems.pixellm import DatasetQuestions
from systems.reading import read_claims
from systems.single import FIELDS, SingleTarget, class_queries, is_sentence, single_query
from systems.wording import about_image, load_wording

# <|ref|> and <|mem|> belong to region prompts, which are not here (unipixel.md 2).
TOKENS = TokenSpec(("<|ref|>", "<|seg|>", "<|mem|>"), ("<|seg|>",), wrap_image=False, norm="before")
PHRASE_PROMPT = "Please segment the {} in this image."
SENTENCE_PROMPT = "{} Please answer the question and provide the segmentation mask."
# what the released programs do and no file of a folder says, as fields of a recipe (unipixel.md 2 to 4)
RELEASED: dict[str, Any] = {
    "use_mm_start_end": False,
    "conv_type": "chatml",
    "model_max_length": 8192,
    "text_projection": "norm_mlp",
    # an image is a video of one frame, and has the pixels of 16 (unipixel.md 3)
    "tower": {"min_pixels": 128 * 28**2, "max_pixels": 16 * 256 * 28**2},
    "head_options": {"masks": "best_of_three", "not_a_point_tokens": 2, "reject": "object"},
}
LISTS = {**FIELDS, "several": "sentence", "each_named": "phrase mask"}


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 5  # dialogues per image at most
    questions_per_picture: int = 0  # of datasets that ship their questions, at most; 0: all
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "unipixel"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("unipixel")
def unipixel(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, LISTS)
    task = UniPixelTask(
        SingleTarget(wording, options.num_classes_per_sample, options.explanatory),
        DatasetQuestions(wording, options.questions_per_picture, "several", SENTENCE_PROMPT, PHRASE_PROMPT),
    )
    released = Released(architectures=("PixelQwen2_5_VLForConditionalGeneration",), settings=released_settings)
    return System("unipixel", TOKENS, task, "sam2", read, released)


def released_settings(values: dict[str, Any]) -> dict[str, Any]:
    sizes = {"prompts_per_token": values.get("sam2_hidden_tokens", 2), "image_size": values.get("sam2_image_size", 768)}
    return {"model": {**RELEASED, **sizes}}


@dataclass(frozen=True)
class UniPixelTask:
    """One target per dialogue, as in LISA; no line break follows the image (unipixel.md 2)."""

    single: SingleTarget
    dataset_questions: DatasetQuestions

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        part = self.dataset_questions if record.kind == "multi" else self.single
        return [
            tuple(replace(turn, question=_without_break(turn.question)) for turn in dialogue)
            for dialogue in part.converse(record, rng)
        ]

    def queries(self, record: Record) -> list[Query]:
        return [replace(query, question=_without_break(query.question)) for query in self._queries(record)]

    def _queries(self, record: Record) -> list[Query]:
        if record.kind == "classes":
            return class_queries(record, PHRASE_PROMPT)
        if record.kind == "multi":
            return self.dataset_questions.queries(record)
        prompts = [SENTENCE_PROMPT if is_sentence(record, target) else PHRASE_PROMPT for target in record.targets]
        return [single_query(prompt, record, index) for index, prompt in enumerate(prompts)]


def _without_break(question: str) -> str:
    return question.replace(about_image(""), IMAGE_PLACEHOLDER)


def read(answer: str) -> list[Claim]:
    """The k-th `<|seg|>` is the k-th mask; the words around it name nothing."""
    return [Claim("", claim.mask) for claim in read_claims(answer, TOKENS)]
