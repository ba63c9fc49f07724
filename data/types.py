"""The types that everything is passed in: facts (Record), words (Script, Turn, Dialogue), tensors (Batch).

A source yields a `Record`; a task turns it into `Dialogue`s, whose answers hold a `Mask(i)` or `Refuse(i)` wherever
tokens about target i belong; the encoder turns these holes into token ids; `collate` stacks the rows of several images
into a `Batch`. `Query` and `Claim`, which only evaluation uses, come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MaskFn = Callable[[], np.ndarray]  # lazy: rasterizes a (H, W) bool mask when it is called, not before


class EmptyMask(ValueError):
    """The mask of a thing that the data call present has no pixel: a fault of the data, not an absent thing."""


@dataclass(frozen=True)
class Target:
    """One thing that the text may talk about.

    phrase: its name or expression as the data set spells it, outer blanks included; the task strips and lower-cases
        it as the release does.
    mask: None if the thing is not in the image. A mask that is not None has at least one pixel; an empty one is a
        fault of the data (`EmptyMask`) and never means an absent thing.
    correction: what is there instead (false premise); for a reasoning query, the whole answer that the data set gives.
    aliases: other names of the same thing in the data set, for tasks that vary names: "the wheel of the car" for the
        phrase "car wheel", or the category for MUSE's rephrased name.
    released_mask: the mask as the released readers compute it that sum an object's parts, where it differs: pixels
        under several parts are outside. Only the as-released scoring reads it; it may be empty.
    sentence: whether a reasoning query is a sentence or a phrase, where the data set says so for each query; None: as
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
    """A question and its answer. The first question of a dialogue about an image holds IMAGE_PLACEHOLDER once."""

    question: str
    answer: Script


Dialogue = tuple[Turn, ...]  # one row for the language model

IMAGE_PLACEHOLDER = "<image>"
IMAGE_ID = -200  # stands for the image in token ids; never an embedding row
IGNORE_ID = -100  # label that takes no part in the text loss


@dataclass(frozen=True)
class Record:
    """What a source yields for one image: facts, without wording, tensors or randomness.

    What the fields hold depends on `kind` (-: empty):

    | kind    | targets                                | vocabulary    | dialogues                         | accepted |
    | ------- | -------------------------------------- | ------------- | --------------------------------- | -------- |
    | classes | the classes that are present           | the label set | -                                 | -        |
    | refer   | referring expressions, present or not  | -             | -                                 | -        |
    | reason  | sentences that call for reasoning      | -             | one: a query and its explanation  | -        |
    | phrase  | short phrases that call for reasoning  | -             | one: a query and its explanation  | -        |
    | multi   | the objects of all questions, in order | -             | one per question, see below       | -        |
    | vqa     | -                                      | -             | those of the data set, in full    | answers  |

    vocabulary: in dataset order; absent classes are those that no target names.
    dialogues: those that ship with the dataset. Of "reason" and "phrase" only where there is an explanation. Those of
        "multi" have one turn each, without the image placeholder, and their answers hold one Mask per object. An
        answer that is holes only has no text in the dataset, so the task words it from the targets' phrases;
        the same holds for a question that is "".
    ignore: pixels that no metric may count, (H, W) bool.
    accepted: all short answers that count as right, one tuple per dialogue, the dialogue's own answer first; (): the
        dialogues are free text.
    vocabulary_aliases: other names of each class of `vocabulary`, absent ones included; (): there are none.
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
class Geometry:
    """Where the image lies in the mask-side view: `original` (H, W), `resized` (h, w) before zero padding."""

    original: tuple[int, int]
    resized: tuple[int, int]


@dataclass
class Batch:
    """B images with R rows (dialogues) of L positions each after image expansion, and Q masks of K tokens each.

    Rows about one image are consecutive. `mask_rows` and `mask_positions` point at the states that prompt the masks (of
    most systems those that *predict* the mask tokens), in row order and within a row in answer order; `masks[b]` holds
    the ground truth of image b in the same order (empty in generation).
    """

    # Language-side view, one per image, however many rows ask about it: (B, 3, h, w), or the patches of all images one
    # after another (sum of n, C), or their tiles (sum of n, 3, s, s). Views are bytes that SegModel normalises on its
    # device, or floats.
    pixels: Tensor
    seg_pixels: Tensor | None  # (B, 3, S, S) mask-side view, None for heads that reuse the language-side features
    ids: Tensor  # (R, L) long, IMAGE_ID at every image position
    labels: Tensor  # (R, L) long, IGNORE_ID where unsupervised
    attention: Tensor  # (R, L) bool, True at real tokens
    row_image: Tensor  # (R,) long, index of the image that each row is about
    mask_rows: Tensor  # (Q,) long
    mask_positions: Tensor  # (Q, K) long
    masks: list[Tensor]  # B x (N_b, H_b, W_b) bool, or numbers in {0, 1}
    geometry: list[Geometry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # image paths, for messages
    ignore: list[Tensor | None] = field(default_factory=list)  # B x (H_b, W_b) bool: pixels the mask loss leaves out
    refused: list[int] = field(default_factory=list)  # refusals in the answers about each image
    skipped: list[str] = field(default_factory=list)  # what was left out while sampling this batch, and why
    cut_rows: int = 0  # rows without their end, which did not fit in model_max_length
    cut_tokens: int = 0  # ids of these ends

    def __len__(self) -> int:
        return len(self.geometry)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Moves every tensor to `device`, without waiting for it; image views that are floats also take `dtype`."""

        def move(name: str, x: Tensor) -> Tensor:
            # The cast comes after the move: on the host it would make an unpinned copy, and the transfer would block.
            moved = x.to(device, non_blocking=True)
            return moved.to(dtype) if name in ("pixels", "seg_pixels") and x.is_floating_point() else moved

        return self.map_tensors(move)

    def pin_memory(self) -> Batch:
        """Page-locked copies, for loaders that feed a GPU."""
        return self.map_tensors(lambda name, x: x.pin_memory())

    def map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """A copy with `change(field name, tensor)` applied to every tensor, also to those in lists."""

        def apply(name: str, value):
            if isinstance(value, list):
                return [apply(name, item) for item in value]
            return change(name, value) if isinstance(value, Tensor) else value

        return replace(self, **{name: apply(name, getattr(self, name)) for name in self.__dataclass_fields__})


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: what is asked about a record, and what an answer says. Training uses neither.


@dataclass(frozen=True)
class Query:
    """One evaluation question about a record: fixed words, and what they ask about.

    question: as the model gets it, with the image placeholder.
    reference_answer: the answer that teacher forcing feeds.
    targets: indices into `Record.targets`.
    phrases: the phrases or class names that the question asks about, in its order.
    """

    question: str
    reference_answer: Script
    targets: tuple[int, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What an answer says about one thing.

    phrase: the name that the answer gives it, "" if it gives none.
    mask: index of its mask among those of the answer; None if the answer refuses it.
    withheld_mask: for a refused thing, the mask that a protocol decoded although the answer refuses.
    is_substitute: the thing was not asked about; the answer offers it in place of what is absent.
    """

    phrase: str
    mask: int | None
    withheld_mask: int | None = None
    is_substitute: bool = False
