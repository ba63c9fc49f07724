"""The types that carry everything: facts (Record), words (Script, Turn, Dialogue), tensors (Batch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MaskFn = Callable[[], np.ndarray]  # draws a (H, W) bool mask when asked, not before


@dataclass(frozen=True)
class Target:
    """One thing the text may talk about. `mask` None: it is not in the picture. A mask that is there has a pixel; one
    without is a fault of the data (`EmptyMask`), never an absent thing.

    `phrase`: as the data set spells it, outer blanks included; the task strips and lower-cases as the release does.
    `released_mask`: the mask as the released readers that sum an object's parts have it, where it differs: pixels under
    several parts are outside. Only the as-released scoring looks at it; it may be empty.
    `correction`: what is there instead (false premise); for a reason query the whole answer that the data set gives.
    `aliases`: other names of the same thing that the data set has, for tasks that vary names: "the wheel of the car"
    beside the phrase "car wheel", the category beside MUSE's rephrased name.
    `sentence`: whether a reasoning query is a sentence or a phrase, where the data set says so of each query; None: as
    the kind of the record says.
    """

    phrase: str
    mask: MaskFn | None
    correction: str | None = None
    aliases: tuple[str, ...] = ()
    released_mask: MaskFn | None = None
    sentence: bool | None = None


@dataclass(frozen=True)
class Mask:
    """Hole in an answer: the mask tokens of `targets[target]` go here."""

    target: int


@dataclass(frozen=True)
class Refuse:
    """Hole in an answer: the token that says `targets[target]` is absent goes here."""

    target: int


Script = tuple["str | Mask | Refuse", ...]  # an answer: text with typed holes


@dataclass(frozen=True)
class Turn:
    question: str  # holds IMAGE_PLACEHOLDER once in the first turn of a dialogue about a picture
    answer: Script


Dialogue = tuple[Turn, ...]  # one row for the language model

IMAGE_PLACEHOLDER = "<image>"
IMAGE_ID = -200  # stands for the picture in token ids; never an embedding row
IGNORE_ID = -100  # label that takes no part in the text loss


@dataclass(frozen=True)
class Record:
    """What a source yields for one picture: facts; no wording, no tensors, no chance.

    kind: "classes" (targets are the present classes, `vocabulary` the label set in dataset order), "refer" (targets
    are phrases, asked alone or together), "reason" (targets are sentences that call for reasoning), "phrase" (short
    phrases that do), "multi" (several targets belong in one answer), "vqa" (no targets).
    `asked`: dialogues that the dataset itself ships (VQA rounds; for "reason" and "phrase" the explanations; for
    "multi" one a question, without the picture's line, whose answer holds a Mask a target; an answer of holes only has
    no text in the dataset, and the task words it from the targets' phrases; so it does with a question that is "").
    `vocabulary_aliases`: other names of each class of `vocabulary`, absent ones included; (): there are none.
    `ignore`: pixels that no metric may count, (H, W) bool.
    `accepted`: for "vqa" with short answers, all that count as right for each of `asked`, which holds the first.
    """

    image: Path
    kind: str
    targets: tuple[Target, ...] = ()
    vocabulary: tuple[str, ...] = ()
    dialogues: tuple[Dialogue, ...] = ()
    ignore: MaskFn | None = None
    accepted: tuple[tuple[str, ...], ...] = ()
    vocabulary_aliases: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Query:
    """One evaluation question about a record: fixed words, the answer that teacher forcing feeds, what it asks about.

    `targets` indexes `Record.targets`; `asked` holds the phrases or class names in the order of the question.
    """

    question: str
    reference_answer: Script
    targets: tuple[int, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What an answer says of one thing: `mask` is the index of its mask in the answer, None if it was refused.

    withheld: of a refused thing, the mask that a protocol drew all the same. instead: it is not what was asked about
    but what the answer offers in its place.
    """

    phrase: str
    mask: int | None
    withheld_mask: int | None = None
    is_substitute: bool = False


@dataclass(frozen=True)
class Geometry:
    """Where the picture lies in the mask-side view: `original` (H, W), `resized` (h, w) before zero padding."""

    original: tuple[int, int]
    resized: tuple[int, int]


@dataclass
class Batch:
    """A batch of B pictures with R rows (dialogues), L positions a row after image expansion, Q masks of K tokens.

    Rows of one picture stand together. `mask_rows`/`mask_positions` point at the states that *predict* the mask tokens,
    in row order and then in answer order; `masks[b]` holds the truth in that same order (empty in generation).
    """

    pixels: Tensor  # (B, 3, h, w) language-side view, one a picture, never one a row
    seg_pixels: Tensor | None  # (B, 3, S, S) mask-side view, None for heads that reuse the language-side features
    ids: Tensor  # (R, L) long, IMAGE_ID at every image position
    labels: Tensor  # (R, L) long, IGNORE_ID where unsupervised
    attention: Tensor  # (R, L) bool, True at real tokens
    row_image: Tensor  # (R,) long, picture of each row
    mask_rows: Tensor  # (Q,) long
    mask_positions: Tensor  # (Q, K) long
    masks: list[Tensor]  # B x (N_b, H_b, W_b) float32 in {0, 1}
    geometry: list[Geometry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # picture paths, for messages
    ignore: list[Tensor | None] = field(default_factory=list)  # B x (H_b, W_b) bool: pixels the mask loss leaves out
    refused: list[int] = field(default_factory=list)  # refusals in the answers about each picture
    skipped: list[str] = field(default_factory=list)  # what was left out while drawing this batch, and why
    cut_rows: int = 0  # rows that lack their end, which did not fit in model_max_length
    cut_tokens: int = 0  # ids of these ends

    def __len__(self) -> int:
        return len(self.geometry)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Moves every tensor; only the two picture views take `dtype`, over there: a cast on this side would have to
        be waited for, where a page-locked tensor travels by itself."""

        def move(name: str, x: Tensor) -> Tensor:
            moved = x.to(device, non_blocking=True)
            return moved.to(dtype) if name in ("pixels", "seg_pixels") else moved

        return self._each(move)

    def pin_memory(self) -> Batch:
        """Page-locked copies, for loaders that feed a GPU."""
        return self._each(lambda name, x: x.pin_memory())

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed, alone or in a list."""

        def apply(name: str, value):
            if isinstance(value, list):
                return [apply(name, item) for item in value]
            return change(name, value) if isinstance(value, Tensor) else value

        return replace(self, **{name: apply(name, getattr(self, name)) for name in self.__dataclass_fields__})
