"""Dialogue to token ids: the one place where holes become tokens, so tokens and masks agree by construction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data.dialogue import Template
from data.dialogue import template as find_template
from data.tokens import IMAGE_END, IMAGE_START, TokenSpec, mask_ids
from data.types import IGNORE_ID, IMAGE_ID, IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Turn
from utils.limits import PROMPT

HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # of JSON escapes, and of arguments that are not UTF-8


class SequenceTooLong(ValueError):
    """A row does not fit in `model_max_length`; it is never cut, for a cut could take a mask token away."""


@dataclass(frozen=True)
class Encoded:
    """One row, with the picture still a single IMAGE_ID.

    holes: the target of each mask, in answer order. mask_positions: for each, the K indices of the tokens *before*
    its mask tokens, i.e. of the states that predict them (lisa.md 1.5). refused: the number of refusals beside them.
    """

    ids: list[int]
    labels: list[int]
    holes: tuple[int, ...]
    mask_positions: tuple[tuple[int, ...], ...]
    refused: int = 0


class Encoder:
    """Renders dialogues through a template and a TokenSpec, with the ids that tokenising the whole text would give.

    prompt_template: that of open prompts where it is another (one published system answers in words it never trained).
    max_length limits a row after the picture has become `image_tokens` positions; 0: no limit. As released, LISA cut
    at `max_length - 255` unexpanded ids, the same length; here a longer row is an error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: TokenSpec,
        template: str = "llava_v1",
        max_length: int = 0,
        image_tokens: int = 256,
        prompt_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.spec = spec
        self.template = find_template(template)
        self.prompt_template = find_template(prompt_template or template)
        self.max_length = max_length
        self.image_tokens = image_tokens
        self._mask_ids = mask_ids(tokenizer, spec)
        self._special = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted((*self._special, IMAGE_PLACEHOLDER), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        typable = set(spec.added) - {*spec.mask, spec.refuse}
        self._reserved = sorted(set(self._special) - typable)

    def __call__(self, dialogue: Dialogue) -> Encoded:
        """A supervised training row. Raises SequenceTooLong, or ValueError naming the text that cannot be encoded."""
        row = self.encode(dialogue)
        length = len(row.ids) - 1 + self.image_tokens
        if self.max_length and length > self.max_length:
            raise SequenceTooLong(
                f"a row of {length} positions ({self.image_tokens} for the picture) does not fit in "
                f"model_max_length {self.max_length}: {_shorten(dialogue[0].question)}"
            )
        return row

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
        parts.append((self._prefix(question, self.prompt_template, first=not history), False))
        return self._encode(parts)[0]

    def _round(self, turn: Turn, template: Template, *, first: bool) -> list[tuple[str, bool]]:
        prefix = self._prefix(turn.question, template, first=first)
        return [(prefix, False), (self._answer(turn) + template.close, True)]

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

    def _encode(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids and labels of (text, supervised) parts, starting with BOS."""
        pieces = self._pieces(parts)
        plain = [piece.text for piece in pieces if piece.index is None]
        encoded = iter(self.tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else ())
        ids, labels = [self.tokenizer.bos_token_id], [IGNORE_ID]
        for piece in pieces:
            new = next(encoded) if piece.index is None else [piece.index]
            ids += new
            labels += new if piece.supervised else [IGNORE_ID] * len(new)
        return ids, labels

    def _pieces(self, parts: list[tuple[str, bool]]) -> list[_Piece]:
        """Cuts the parts at special tokens; white space goes where a neighbouring token strips it.

        The blank between a prefix and its answer is not written out: the tokenizer gives each text a leading one, and
        a token that opens the answer would strip it.
        """
        raw = [(text, supervised) for part, supervised in parts for text in self._split.split(part) if text]
        pieces = []
        for position, (text, supervised) in enumerate(raw):
            if text == IMAGE_PLACEHOLDER:
                pieces.append(_Piece(text, supervised, IMAGE_ID))
            elif text in self._special:
                pieces.append(_Piece(text, supervised, self._special[text][0]))
            else:
                before = self._special.get(raw[position - 1][0]) if position else None
                after = self._special.get(raw[position + 1][0]) if position + 1 < len(raw) else None
                text = text.lstrip() if before and before[1].rstrip else text
                text = text.rstrip() if after and after[1].lstrip else text
                if text:
                    pieces.append(_Piece(text, supervised, None))
        return pieces

    def _mask_positions(self, ids: list[int], count: int) -> tuple[tuple[int, ...], ...]:
        width = len(self._mask_ids)
        before = [index - 1 for index, token in enumerate(ids) if token in self._mask_ids]
        assert len(before) == count * width, "typed mask tokens are refused, so every one comes from a hole"
        return tuple(tuple(before[start : start + width]) for start in range(0, len(before), width))


class _Piece(NamedTuple):
    text: str
    supervised: bool
    index: int | None  # id of a special token or of the picture, None: plain text


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
