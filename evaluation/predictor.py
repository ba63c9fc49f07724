"""An assistant for use from Python: pictures with phrases, class lists or questions in, text and masks out.

    from evaluation.predictor import Predictor

    predictor = Predictor.from_pretrained("runs/mine")
    for thing in predictor("kitchen.jpg", ["the cup", "the unicorn"]):
        print(thing.phrase, thing.mask.sum() if thing.present else "is not there")
    for thing in predictor.classes("street.jpg", ["road", "car", "zebra"]):
        print(thing.phrase, thing.present, thing.score)
    answer = predictor.ask("street.jpg", "Where could I park?")
    print(answer.text, [thing.mask.shape for thing in answer.things])
    pages = predictor.batch(["a.jpg", "b.jpg"], [["the dog"], ["the cat", "the mouse"]])  # several pictures at once

A picture is a path, a PIL image (any mode with 8 or 16 bits a channel) or an (H, W, 3) uint8 RGB array. The words
around phrases are the system's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.collate import Sample, make_views
from data.types import IMAGE_PLACEHOLDER, Query, Record, Target
from data.views import read_image
from evaluation.metrics.matching import Names, assign_claims, read_list
from evaluation.protocols import Reply, generate
from systems.assistant import Assistant, load
from utils.limits import PIXELS

Picture = str | Path | Image.Image | np.ndarray
NO_FILE = Path("picture")  # stands for the file of a picture that has none


@dataclass(frozen=True)
class Segment:
    """One thing that was asked for, or that an answer speaks of. Without a mask it is not there, says the model."""

    phrase: str
    mask: np.ndarray | None  # (H, W) bool, the picture's own size
    score: float | None  # mean probability of the mask's pixels, 0.5 to 1; 0 of an empty mask, None without one
    text: str  # the answer that speaks of it

    @property
    def present(self) -> bool:
        return self.mask is not None


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to a question in free words. `finished`: it ended by itself, not at the token limit."""

    text: str
    segments: list[Segment] = field(default_factory=list)
    finished: bool = True


class Predictor:
    """Answers with `assistant`, greedily, each answer at most `max_new_tokens` long."""

    def __init__(self, assistant: Assistant, *, max_new_tokens: int = 512):
        self.assistant = assistant
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, *, max_new_tokens: int = 512, **how: Any) -> Predictor:
        """path: a run folder, a merged folder, a published checkpoint or its hub name. how: as `load` takes it, such as
        device="cuda", checkpoint="last", system="lisa", model={"precision": "bf16"}."""
        return cls(load(path, **how), max_new_tokens=max_new_tokens)

    def __call__(self, picture: Picture, phrases: Sequence[str]) -> list[Segment]:
        """One thing a phrase, in order."""
        return self.batch([picture], [phrases])[0]

    def batch(self, pictures: Sequence[Picture], phrases: Sequence[Sequence[str]]) -> list[list[Segment]]:
        """`phrases[b]` about `pictures[b]`, all in one batch."""
        queries = [self._phrase_queries(group) for group in phrases]
        found = []
        for group, asked, replies in zip(phrases, queries, self.replies(pictures, queries), strict=True):
            things: list[Segment] = []
            for query, reply in zip(asked, replies, strict=True):
                names = group[len(things) : len(things) + len(query.phrases)]
                for name, claim in zip(names, assign_claims(reply.claims, query.phrases), strict=True):
                    things.append(_thing(name, reply.masks, claim.mask if claim else None, reply.text))
            found.append(things)
        return found

    def classes(self, picture: Picture, names: Sequence[str]) -> list[Segment]:
        """One thing a class of the list, in order; of several masks of a class the highest logits count."""
        if not names or any(not name.strip() for name in names):
            raise ValueError(f"classes need at least one name and no empty one, not {list(names)}")
        queries = self.class_queries(names)
        (replies,) = self.replies([picture], [queries])
        known, masks, texts = Names(names), {}, {}
        for query, reply in zip(queries, replies, strict=True):
            for index in (known.exact(name) for name in query.phrases):
                texts[index] = reply.text
            for index, number in read_list(reply.claims, query.phrases, known).masks:
                new = reply.masks[number]
                masks[index] = torch.maximum(masks[index], new) if index in masks else new
        return [
            _thing(name, [masks[index]] if index in masks else (), 0 if index in masks else None, texts.get(index, ""))
            for index, name in enumerate(names)
        ]

    def ask(self, picture: Picture, question: str) -> ChatAnswer:
        """Free words, put behind the picture as they are."""
        ((reply,),) = self.replies([picture], [[free_query(question)]])
        things = [_thing(claim.phrase, reply.masks, claim.mask, reply.text) for claim in reply.claims]
        return ChatAnswer(reply.text, things, reply.finished)

    def replies(self, pictures: Sequence[Picture], queries: Sequence[Sequence[Query]]) -> list[list[Reply]]:
        """The bare answers to `queries[b]` about `pictures[b]`; each picture is encoded once."""
        if len(pictures) != len(queries):
            raise ValueError(f"{len(pictures)} pictures, but questions about {len(queries)}")
        samples = [self._look(picture) for picture in pictures]
        return generate(self.assistant, samples, queries, self.max_new_tokens)

    def class_queries(self, names: Sequence[str]) -> list[Query]:
        """The system's own questions about a class list."""
        return self.assistant.system.task.queries(Record(NO_FILE, "classes", vocabulary=tuple(names)))

    def _phrase_queries(self, phrases: Sequence[str]) -> list[Query]:
        if isinstance(phrases, str) or not phrases or any(not phrase.strip() for phrase in phrases):
            raise ValueError(f"phrases are a list of at least one and no empty one, not {phrases!r}")
        targets = tuple(Target(phrase, None) for phrase in phrases)
        return self.assistant.system.task.queries(Record(NO_FILE, "refer", targets))

    def _look(self, picture: Picture) -> Sample:
        if isinstance(picture, (str, Path)):
            return make_views(read_image(picture), self.assistant.views, str(picture))
        if isinstance(picture, Image.Image):
            PIXELS.check(picture.width * picture.height, f"a picture of {picture.width} x {picture.height}")
            picture = as_rgb(ImageOps.exif_transpose(picture))
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
        PIXELS.check(picture.shape[0] * picture.shape[1], f"a picture of shape {picture.shape}")
        return make_views(picture, self.assistant.views, str(NO_FILE))


def as_rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a PIL image, as `read_image` has it of the same file: 16 bits lose their lower half, where
    PIL alone would make white of everything above 255. What has no agreed range is refused."""
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"a picture of PIL mode {picture.mode!r} has no agreed range of values; bring it to 0 .. 255 and uint8 "
            "first, or give the path of its file"
        )
    return np.asarray(picture.convert("RGB"))


def free_query(question: str) -> Query:
    """A question in the user's own words."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            "the question is empty" if isinstance(question, str) else f"a question is text, got {question!r}"
        )
    return Query(f"{IMAGE_PLACEHOLDER}\n{question.strip()}", ())


def _thing(phrase: str, masks: Tensor | Sequence[Tensor], index: int | None, text: str) -> Segment:
    if index is None:
        return Segment(phrase, None, None, text)
    logits = masks[index]
    inside = logits > 0
    score = float(logits[inside].sigmoid().mean()) if bool(inside.any()) else 0.0
    return Segment(phrase, inside.cpu().numpy(), score, text)
