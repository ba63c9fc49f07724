"""Dialogue to token ids: the one place where holes become tokens, so tokens and masks agree by construction."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data.templates import Template
from data.templates import template as find_template
from data.tokens import IMAGE_END, IMAGE_START, TokenSpec, mask_ids, token_id
from data.types import IGNORE_ID, IMAGE_ID, IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Turn
from utils.limits import PROMPT

LONG_ROWS = {  # choices of data.long_rows -> why a row is too long all the same
    "error": "data.long_rows says what may be cut",
    "cut": "a cut would take a mask, a refusal or the whole answer away",
    "cut_rounds": "its first round is too long, or a round with a mask or a refusal would go",
    "keep": "",
}
HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # of JSON escapes, and of arguments that are not UTF-8


class SequenceTooLong(ValueError):
    """A row does not fit in `model_max_length`, and cutting it is not allowed or would take a mask token away."""


@dataclass(frozen=True)
class Encoded:
    """One row, with the picture still a single IMAGE_ID.

    holes: the target of each mask, in answer order. mask_positions: for each, the K indices of the tokens *before*
    its mask tokens, i.e. of the states that predict them (lisa.md 1.5). refused: the number of refusals beside them.
    cut: the number of ids at the end of the dialogue that the row leaves out.
    """

    ids: list[int]
    labels: list[int]
    holes: tuple[int, ...]
    mask_positions: tuple[tuple[int, ...], ...]
    refused: int = 0
    cut: int = 0


class Encoder:
    """Renders dialogues through a template and a TokenSpec, with the ids that tokenising the whole text would give.

    tokenizer: of `load_tokenizer`; its `pieces` encode the text between tokens, its added tokens know what they strip.
    prompt_template: that of open prompts where it is another (one published system answers in words it never trained).
    max_length limits a training row after the picture has become `image_tokens` positions; 0: no limit. What becomes of
    a longer one is said by long_rows (lisa.md 3.2, pixellm.md 5.5, lasagna.md 3):

        error       SequenceTooLong
        cut         as LISA, GSVA, PixelLM and SESAME were released: the ids beyond the limit go, in mid-sentence
        cut_rounds  whole rounds go, until the rest fits
        keep        as LaSagnA was released: the limit does not hold

    No cut takes a mask or a refusal away, nor all that is supervised: that is SequenceTooLong (the releases crash).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: TokenSpec,
        template: str = "llava_v1",
        max_length: int = 0,
        image_tokens: int = 256,
        prompt_template: str | None = None,
        long_rows: str = "error",
    ):
        self.tokenizer = tokenizer
        self.spec = spec
        self.template = find_template(template)
        self.prompt_template = find_template(prompt_template or template)
        self.max_length = max_length
        self.image_tokens = image_tokens
        self.long_rows = long_rows
        self._plain = tokenizer.pieces
        self._mask_ids = mask_ids(tokenizer, spec)
        self._verdicts = {*self._mask_ids, *([token_id(tokenizer, spec.refuse)] if spec.refuse else [])}
        self._special = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted((*self._special, IMAGE_PLACEHOLDER), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        typable = set(spec.added) - {*spec.mask, spec.refuse}
        self._reserved = sorted(set(self._special) - typable)

    def __call__(self, dialogue: Dialogue) -> Encoded:
        """A supervised training row. Raises SequenceTooLong, or ValueError naming the text that cannot be encoded."""
        row = self.encode(dialogue)
        room = self.max_length - self.image_tokens + 1  # ids that fit, of which one stands for the picture
        if not self.max_length or self.long_rows == "keep" or len(row.ids) <= room:
            return row
        short = self._shortened(dialogue, row, room)
        if short is not None:
            return replace(short, cut=len(row.ids) - len(short.ids))
        raise SequenceTooLong(
            f"a row of {len(row.ids) - 1 + self.image_tokens} positions ({self.image_tokens} for the picture) does not "
            f"fit in model_max_length {self.max_length} ({LONG_ROWS[self.long_rows]}): {_shorten(dialogue[0].question)}"
        )

    def _shortened(self, dialogue: Dialogue, row: Encoded, room: int) -> Encoded | None:
        """The beginning of the row in at most `room` ids with all of its masks and refusals; None if there is none."""
        if self.long_rows == "cut":
            last = max((index for index, token in enumerate(row.ids) if token in self._verdicts), default=0)
            supervised = any(label != IGNORE_ID for label in row.labels[: max(room, 0)])
            fits = last < room and supervised
            return replace(row, ids=row.ids[:room], labels=row.labels[:room]) if fits else None
        if self.long_rows == "cut_rounds":
            rows = (self.encode(dialogue[:rounds]) for rounds in range(len(dialogue) - 1, 0, -1))
            short = next((short for short in rows if len(short.ids) <= room), None)
            if short and (len(short.holes), short.refused) == (len(row.holes), row.refused):
                return short
        return None

    def encode(self, dialogue: Dialogue) -> Encoded:
        """The row whatever its length (evaluation never cuts either)."""
        _check_picture([turn.question for turn in dialogue])
        parts = []
        for index, turn in enumerate(dialogue):
            parts += self._round(turn, self.template, first=index == 0)
        ids, labels = self._encode(parts)
        items = [item for turn in dialogue for item in turn.answer]
        holes = tuple(item.target for item in items if isinstance(item, Mask))
        refused = sum(isinstance(item, Refuse) for item in items)
        return Encoded(ids, labels, holes, self._mask_positions(ids, len(holes)), refused)

    def prompt(self, question: str, history: Dialogue = ()) -> list[int]:
        """Ids of an open prompt: earlier rounds, then `question`, ending where the answer begins. Of questions that are
        longer than ASSISTANT_MAX_PROMPT a ValueError."""
        _check_picture([*(turn.question for turn in history), question])
        PROMPT.check(
            len(question) + sum(len(turn.question) for turn in history), f"the prompt {_shorten(question, 60)}"
        )
        parts = []
        for index, turn in enumerate(history):
            parts += self._round(turn, self.prompt_template, first=index == 0)
        parts.append(_Part(self._prefix(question, self.prompt_template, first=not history), False))
        return self._encode(parts)[0]

    def check_text(self, text: str) -> None:
        """Raises ValueError where a dataset's own text holds a token that may not be typed, or the picture's place."""
        self._check_plain(text)
        if IMAGE_PLACEHOLDER in text:
            raise ValueError(f"the text contains {IMAGE_PLACEHOLDER}, which stands for the picture: {_shorten(text)}")

    def _round(self, turn: Turn, template: Template, *, first: bool) -> list[_Part]:
        prefix = self._prefix(turn.question, template, first=first)
        return [_Part(prefix, False), _Part(f" {self._answer(turn)}{template.close}", True)]

    def _prefix(self, question: str, template: Template, *, first: bool) -> str:
        self._check_plain(question)
        if self.spec.wrap_image:
            question = question.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_PLACEHOLDER + IMAGE_END)
        return template.prefix(question, first=first)

    def _answer(self, turn: Turn) -> str:
        text = "".join(map(self._render, turn.answer))
        if not text.strip():
            raise ValueError(f"empty answer to {_shorten(turn.question)}")
        return text

    def _render(self, item: str | Mask | Refuse) -> str:
        if isinstance(item, Mask):
            return "".join(self.spec.mask)
        if isinstance(item, Refuse):
            if self.spec.refuse is None:
                raise ValueError(f"{item} in an answer, but the system has no token for absent targets")
            return self.spec.refuse
        self._check_plain(item)
        if IMAGE_PLACEHOLDER in item:
            raise ValueError(f"{IMAGE_PLACEHOLDER} in an answer: {_shorten(item)}")
        return item

    def _check_plain(self, text: str) -> None:
        if half := HALF_CHARACTERS.search(text):
            raise ValueError(
                f"the text holds {half[0]!a} at character {half.start()}, which is no character: give it as UTF-8 "
                f"({_shorten(text, 60)})"
            )
        for token in self._reserved:
            if token in text:
                raise ValueError(f"the text contains the token {token!r}, which may not be typed: {_shorten(text)}")

    def _encode(self, parts: list[_Part]) -> tuple[list[int], list[int]]:
        """Ids and labels, starting with BOS."""
        ids, labels = [self.tokenizer.bos_token_id], [IGNORE_ID]
        for piece in self._pieces(parts):
            ids += piece.ids
            labels += piece.ids if piece.supervised else [IGNORE_ID] * len(piece.ids)
        return ids, labels

    def _pieces(self, parts: list[_Part]) -> list[_Piece]:
        """Cuts the parts at special tokens; white space goes where a neighbouring token strips it.

        An answer begins with the blank that follows its prefix. No piece of the vocabulary has one inside, so the
        ids are those of the text as a whole; where a token opens the answer and strips nothing, the blank stays alone.
        """
        raw = [(text, part.supervised) for part in parts for text in self._cut(part.text) if text]
        pieces, plain = [], False  # plain: whether the piece before is text
        for position, (text, supervised) in enumerate(raw):
            before = raw[position - 1][0] if position else IMAGE_PLACEHOLDER
            after = raw[position + 1][0] if position + 1 < len(raw) else IMAGE_PLACEHOLDER
            if text == IMAGE_PLACEHOLDER:
                pieces.append(_Piece([IMAGE_ID], supervised))
            elif text in self._special:
                pieces.append(_Piece([self._special[text][0]], supervised))
            else:
                text = text.lstrip() if before in self._special and self._special[before][1].rstrip else text
                text = text.rstrip() if after in self._special and self._special[after][1].lstrip else text
                if text:
                    goes_on = plain and text.startswith(" ")
                    blank = goes_on or before == IMAGE_PLACEHOLDER
                    pieces.append(_Piece(self._plain.encode(text[goes_on:], blank=blank), supervised))
            plain = text != IMAGE_PLACEHOLDER and text not in self._special
        return pieces

    def _cut(self, text: str) -> list[str]:
        return self._split.split(self._plain.plain(text))

    def _mask_positions(self, ids: list[int], count: int) -> tuple[tuple[int, ...], ...]:
        width = len(self._mask_ids)
        before = [index - 1 for index, token in enumerate(ids) if token in self._mask_ids]
        assert len(before) == count * width, "typed mask tokens are refused, so every one comes from a hole"
        return tuple(tuple(before[start : start + width]) for start in range(0, len(before), width))


class _Part(NamedTuple):
    """A question with the words around it, or an answer with the blank in front of it."""

    text: str
    supervised: bool


class _Piece(NamedTuple):
    ids: list[int]
    supervised: bool


def _check_picture(questions: list[str]) -> None:
    """A row is about one picture, shown in its first question."""
    if not questions:
        raise ValueError("an empty dialogue cannot be encoded")
    counts = [question.count(IMAGE_PLACEHOLDER) for question in questions]
    if counts[0] != 1 or any(counts[1:]):
        raise ValueError(
            f"{IMAGE_PLACEHOLDER} must stand once in the first question and in no other: {_shorten(questions[0])}"
        )


def _shorten(text: str, limit: int = 160) -> str:
    shown = text if len(text) <= limit else text[:limit] + " ..."
    return ascii(shown) if HALF_CHARACTERS.search(shown) else repr(shown)
