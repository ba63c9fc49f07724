"""The Python API: images with phrases, class lists or questions in, text and masks out.

    from evaluation.predictor import Predictor

    predictor = Predictor.from_pretrained("runs/mine")
    for segment in predictor("kitchen.jpg", ["the cup", "the unicorn"]):
        print(segment.phrase, segment.mask.sum() if segment.present else "is not there")
    for segment in predictor.classes("street.jpg", ["road", "car", "zebra"]):
        print(segment.phrase, segment.present, segment.score)
    answer = predictor.ask("street.jpg", "Where could I park?")
    print(answer.text, [segment.mask.shape for segment in answer.segments if segment.present])
    first, second = predictor.batch(["a.jpg", "b.jpg"], [["the dog"], ["the cat", "the mouse"]])  # in one batch
    conversation = predictor.chat("street.jpg")  # each question knows the earlier ones
    print(conversation.ask("Where could I park?").text, conversation.ask("And a bicycle?").text)

An image is a path, a PIL image (any mode with 8 or 16 bits per channel) or an (H, W, 3) uint8 RGB array. The words
around phrases are the system's own. `evaluation.export.coco.coco_results(segments)` makes COCO results of an answer;
`predictor.label_map(image, names)` gives a map of classes, which `evaluation.export.label_maps` writes as PNG files.
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
from evaluation.metrics.counts import class_map
from evaluation.metrics.matching import Names, assign_claims, bare, read_list
from evaluation.protocols import Reply, check_numbers, generate
from evaluation.session import Exchange, OnText, Session
from systems.assistant import Assistant, load
from utils.images import as_rgb, read_image
from utils.limits import PIXELS

ImageLike = str | Path | Image.Image | np.ndarray
NO_FILE = Path("image")  # in messages, the name of an image that has no file


@dataclass(frozen=True)
class Segment:
    """One object that was asked for, or that an answer mentions.

    phrase: what it was asked for as, or what the answer calls it. mask: (H, W) bool at the image's own size; None where
    the model says that the object is not there. score: the mask head's own confidence, 0 to 1, where it has one (sam2,
    sam3), else the mean probability of the mask's pixels, 0.5 to 1; 0 of an empty mask, None without a mask. text: the
    whole answer that mentions it.
    """

    phrase: str
    mask: np.ndarray | None
    score: float | None
    text: str

    @property
    def present(self) -> bool:
        """Whether the model gave it a mask."""
        return self.mask is not None


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to a question in free words.

    text: as generated, with mask tokens. segments: one per object that the answer marks or refuses, in its order.
    finished: the text ended by itself, not at the token limit. notes: of a conversation, sentences about what was
    dropped or cut.
    """

    text: str
    segments: list[Segment] = field(default_factory=list)
    finished: bool = True
    notes: list[str] = field(default_factory=list)


class Predictor:
    """Asks an assistant about images. Answers are generated greedily, each of at most `max_new_tokens` tokens.

    Every method raises ValueError for an image or a question that cannot be used, OSError for a file that cannot be
    read, and PIL's errors for a damaged one. Several threads may ask: they are answered one after another.
    """

    def __init__(self, assistant: Assistant, *, max_new_tokens: int = 512):
        self.assistant = assistant
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, *, max_new_tokens: int = 512, **load_options: Any) -> Predictor:
        """Loads an assistant.

        path: a run folder, a merged folder, a published checkpoint or its hub name. load_options: those of
        `systems.assistant.load`, such as device="cuda", checkpoint="last", system="lisa",
        model={"precision": "bf16"}.
        """
        return cls(load(path, **load_options), max_new_tokens=max_new_tokens)

    def __call__(self, image: ImageLike, phrases: Sequence[str]) -> list[Segment]:
        """One segment per phrase, in their order."""
        return self.batch([image], [phrases])[0]

    def batch(self, images: Sequence[ImageLike], phrases: Sequence[Sequence[str]]) -> list[list[Segment]]:
        """Asks for `phrases[b]` in `images[b]`, all in one batch. Returns one list of segments per image."""
        queries = [self.phrase_queries(group) for group in phrases]
        results = []
        for group, image_queries, replies in zip(phrases, queries, self.replies(images, queries), strict=True):
            segments: list[Segment] = []
            # A system may ask for all phrases in one question or for each in its own, and may change their wording;
            # across its questions the order is that of `group`.
            for query, reply in zip(image_queries, replies, strict=True):
                names = group[len(segments) : len(segments) + len(query.phrases)]
                for name, claim in zip(names, assign_claims(reply.claims, query.phrases), strict=True):
                    segments.append(_segment_of(name, claim.mask if claim else None, reply))
            results.append(segments)
        return results

    def classes(self, image: ImageLike, names: Sequence[str]) -> list[Segment]:
        """One segment per class of the list, in their order; of several masks of a class the highest logits count,
        and the highest score."""
        logits, scores, texts = self._class_logits(image, names)
        return [
            _segment(name, logits.get(index), texts.get(index, ""), scores.get(index))
            for index, name in enumerate(names)
        ]

    def label_map(self, image: ImageLike, names: Sequence[str]) -> np.ndarray:
        """(H, W) int64: the place in `names` of each pixel's class, -1 where the model marks none of them.

        `evaluation.export.label_maps` makes semantic and panoptic PNG files of it.
        """
        logits, _, _ = self._class_logits(image, names)
        if not logits:
            return np.full(self._sample(image).geometry.original, -1)
        first = next(iter(logits.values()))
        classes = class_map(logits, (first.shape[0], first.shape[1]), none=-1, device=first.device)
        return classes.cpu().numpy()

    def _class_logits(
        self, image: ImageLike, names: Sequence[str]
    ) -> tuple[dict[int, Tensor], dict[int, float], dict[int | None, str]]:
        """Of the classes that have a mask, (H, W) logits and the mask head's own score, if it has one; and the answer
        about each class, all by the place of the class."""
        if isinstance(names, str):
            raise ValueError(f"classes are a list of names, not one text: pass [{names!r}]")
        if not _are_names(names):
            raise ValueError(f"classes need at least one name and no empty one, not {list(names)}")
        queries = self.class_queries(names)
        (replies,) = self.replies([image], [queries])
        class_names = Names(names)
        logits: dict[int, Tensor] = {}
        scores: dict[int, float] = {}
        texts: dict[int | None, str] = {}
        for query, reply in zip(queries, replies, strict=True):
            for name in query.phrases:
                texts[class_names.exact(name)] = reply.text
            for index, mask in read_list(reply.claims, query.phrases, class_names).masks:
                new = reply.masks[mask]
                logits[index] = torch.maximum(logits[index], new) if index in logits else new
                if reply.scores is not None:
                    scores[index] = max(scores.get(index, 0.0), float(reply.scores[mask]))
        return logits, scores, texts

    def ask(self, image: ImageLike, question: str) -> ChatAnswer:
        """Asks a question in the user's own words, which follow the image as they are."""
        ((reply,),) = self.replies([image], [[free_query(question)]])
        return ChatAnswer(reply.text, segments_of(reply), reply.finished)

    def chat(self, image: ImageLike, *, most_positions: int | None = None) -> Conversation:
        """A conversation about an image. most_positions: see `Session`."""
        return Conversation(Session(self.assistant, self._sample(image), self.max_new_tokens, most_positions))

    def replies(self, images: Sequence[ImageLike], queries: Sequence[Sequence[Query]]) -> list[list[Reply]]:
        """The answers to `queries[b]` about `images[b]` with claims and mask logits; each image is encoded once."""
        if len(images) != len(queries):
            raise ValueError(f"{len(images)} images, but questions about {len(queries)}")
        samples = [self._sample(image) for image in images]
        with self.assistant.lock:
            replies = generate(self.assistant, samples, queries, self.max_new_tokens)
        for sample, group in zip(samples, replies, strict=True):
            check_numbers(self.assistant, sample, group)
        return replies

    def class_queries(self, names: Sequence[str]) -> list[Query]:
        """The system's own questions about a class list. ValueError where an answer could not tell two names apart."""
        first: dict[str, str] = {}
        for name in names:
            other = first.setdefault(bare(name), name)
            if other.lower() != name.lower():  # of the same name twice the system says so
                raise ValueError(f"answers cannot tell the classes {other!r} and {name!r} apart: rename one of them")
        return self.assistant.system.task.queries(Record(NO_FILE, "classes", vocabulary=tuple(names)))

    def phrase_queries(self, phrases: Sequence[str]) -> list[Query]:
        """The system's own questions about phrases."""
        if isinstance(phrases, str) or not _are_names(phrases):
            raise ValueError(f"phrases are a list of at least one and no empty one, not {phrases!r}")
        targets = tuple(Target(phrase, None) for phrase in phrases)
        return self.assistant.system.task.queries(Record(NO_FILE, "refer", targets))

    def _sample(self, image: ImageLike) -> Sample:
        if isinstance(image, (str, Path)):
            return make_views(read_image(image), self.assistant.views, str(image))
        if isinstance(image, Image.Image):
            PIXELS.check(image.width * image.height, f"an image of {image.width} x {image.height}")
            image = as_rgb(ImageOps.exif_transpose(image))
        if not isinstance(image, np.ndarray):
            raise ValueError(f"an image is a path, a PIL image or an (H, W, 3) uint8 array, not {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"an image is (H, W, 3) uint8 with at least one pixel, not {image.shape} {image.dtype}")
        PIXELS.check(image.shape[0] * image.shape[1], f"an image of shape {image.shape}")
        return make_views(image, self.assistant.views, str(NO_FILE))


def segments_of(reply: Reply) -> list[Segment]:
    """What an answer marks or refuses, one segment per claim, in its order."""
    return [_segment_of(claim.phrase, claim.mask, reply) for claim in reply.claims]


class Conversation:
    """Questions about one image, each answered with the earlier rounds before it; see `Session` for what is kept, what
    is dropped and what is raised. Its memory is freed with it."""

    def __init__(self, session: Session):
        self.session = session

    def ask(
        self,
        question: str | Sequence[str] | None = None,
        *,
        classes: Sequence[str] | None = None,
        on_text: OnText | None = None,
    ) -> ChatAnswer:
        """Asks a question in free words, or for a list of phrases, or for the classes of a list.

        A system that has a question per phrase or class asks them one after another, as rounds. Segments are those
        of `Predictor.ask`, of a call, and of `Predictor.classes`. on_text: called with the text so far as it grows.
        """
        if (question is None) == (classes is None):
            raise ValueError(
                "a conversation asks a question, a list of phrases, or a list of classes: one of the three"
            )
        asker = _Asker(self.session, on_text)
        if classes is not None:
            segments = asker.classes(NO_FILE, classes)
        elif isinstance(question, str):
            segments = asker.ask(NO_FILE, question).segments
        else:
            segments = asker(NO_FILE, question or ())
        (exchange,) = asker.exchanges
        finished = all(reply.finished for reply in exchange.replies)
        return ChatAnswer(exchange.text, segments, finished, exchange.notes)

    def forget(self) -> None:
        """Drops all rounds; the image stays read."""
        self.session.forget()


class _Asker(Predictor):
    """Asks in a session, whatever the image: what is asked and how answers are read is the same."""

    def __init__(self, session: Session, on_text: OnText | None):
        super().__init__(session.assistant, max_new_tokens=session.max_new_tokens)
        self.session, self.on_text = session, on_text
        self.exchanges: list[Exchange] = []

    def replies(self, images: Sequence[ImageLike], queries: Sequence[Sequence[Query]]) -> list[list[Reply]]:
        self.exchanges += [self.session.ask(group, self.on_text) for group in queries]
        return [exchange.replies for exchange in self.exchanges]


def free_query(question: str) -> Query:
    """A question in the user's own words. Raises ValueError for an empty one."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            "the question is empty" if isinstance(question, str) else f"a question is text, got {question!r}"
        )
    return Query(f"{IMAGE_PLACEHOLDER}\n{question.strip()}", ())


def _are_names(names: Sequence[str]) -> bool:
    """Whether there is a name, and none is empty or no text."""
    return len(names) > 0 and all(isinstance(name, str) and name.strip() for name in names)


def mask_score(logits: Tensor, confidence: float | None = None) -> float:
    """`Segment.score` of a mask (H, W). confidence: the mask head's own."""
    inside = logits > 0
    if not bool(inside.any()):
        return 0.0
    return float(logits[inside].sigmoid().mean()) if confidence is None else confidence


def _segment_of(phrase: str, mask: int | None, reply: Reply) -> Segment:
    """A claim of an answer. mask: its index among those of the answer, None of a refusal."""
    if mask is None:
        return Segment(phrase, None, None, reply.text)
    confidence = None if reply.scores is None else float(reply.scores[mask])
    return _segment(phrase, reply.masks[mask], reply.text, confidence)


def _segment(phrase: str, logits: Tensor | None, text: str, confidence: float | None) -> Segment:
    if logits is None:
        return Segment(phrase, None, None, text)
    return Segment(phrase, (logits > 0).cpu().numpy(), mask_score(logits, confidence), text)
