"""Dialogue to token ids: the one place where holes become tokens, so tokens and masks agree by construction.

A worked example, with LaSagnA's tokens and the ids of the toy base (docs/method.md prints the full row). The targets of
the record are 0 road, 1 sky and, absent, 2 dog:

    Turn("<image>\\n<semantic>Segment this image.<cat_start> sky, dog, road <cat_end>",
         ("sky", Mask(1), "dog", Refuse(2), "road", Mask(0)))

The template puts its words around the question; the holes become the system's tokens:

    A chat ... questions. USER: <im_start><image><im_end>
    <semantic>Segment this image.<cat_start> sky, dog, road <cat_end> ASSISTANT: sky<ins>dog<no_ins>road<ins></s>

The text is cut at added tokens, and each stretch between them becomes ids on its own. White space next to an added
token goes, as in the published stacks. The question is not supervised, the answer is:

    position    0   1 ...         32    33       34 ...   49   50    51   52       53    54    55   56
    token     <s>  ▁A ... <im_start> image <im_end> ...    : ▁sky <ins> ▁dog <no_ins> ▁road <ins> </s>
    id          1 322 ...       1793  -200     1794 ... 1777  339  1798 1276     1799   356  1798    2
    label       -   - ...          -     -        - ...    -  339  1798 1276     1799   356  1798    2

A causal language model predicts token t from the state at t - 1, so the query of the mask whose token is at 51 is the
state at 50, and that of the mask at 55 is the state at 54:

    Encoded(holes=(1, 0), mask_positions=((50,), (54,)), refused=1)

A system that reads the state at the mask token itself (TokenSpec.read) has ((51,), (55,)) instead. Positions count the
image as one id here. `data.collate` expands it to `image_tokens` positions and shifts them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data.pieces import Pieces
from data.templates import Template
from data.templates import template as find_template
from data.tokens import IMAGE_END, IMAGE_START, TokenSpec, mask_ids, token_id
from data.types import IGNORE_ID, IMAGE_ID, IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Turn
from utils.limits import PROMPT

LONG_ROWS = {  # choices of data.long_rows -> why a row can still be too long under it
    "error": "data.long_rows says what may be cut",
    "cut": "a cut would take a mask, a refusal or the whole answer away",
    "cut_rounds": "its first round is too long, or a round with a mask or a refusal would go",
    "keep": "",
}
HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # surrogates, from JSON escapes and arguments that are not UTF-8


class SequenceTooLong(ValueError):
    """A row does not fit in `model_max_length`, and `data.long_rows` does not let it be cut to fit."""


@dataclass(frozen=True)
class Encoded:
    """One row, with the image still a single IMAGE_ID.

    ids, labels: L token ids, and the same ids where they are supervised, IGNORE_ID elsewhere.
    holes: the target of each mask, in answer order.
    mask_positions: for each mask, the K indices of the states that prompt it: those of the tokens *before* its K mask
        tokens, which predict them (lisa.md 1.5), or of these tokens themselves, as `TokenSpec.read` says.
    refused: number of refusals in the answers.
    cut: number of ids at the end of the dialogue that the row leaves out.
    """

    ids: list[int]
    labels: list[int]
    holes: tuple[int, ...]
    mask_positions: tuple[tuple[int, ...], ...]
    refused: int = 0
    cut: int = 0


class Encoder:
    """Renders dialogues through a template and a TokenSpec, with the ids that tokenising the whole text would give.

    tokenizer: from `load_tokenizer`; its `pieces` encode the text between added tokens.
    prompt_template: template for generation, if it differs from training (SESAME evaluates with a template that it was
        not trained on).
    max_length: limit of a training row after the image has become `image_tokens` positions; 0: no limit.
    long_rows: what becomes of a longer row (lisa.md 3.2, pixellm.md 5.5, lasagna.md 3):

        error       SequenceTooLong
        cut         the ids beyond the limit go, even in mid-sentence (released LISA, GSVA, PixelLM, SESAME)
        cut_rounds  the last rounds go, as many as needed for the rest to fit
        keep        the limit is ignored (released LaSagnA)

    A cut may never remove a mask token, a refusal or all supervised tokens: such a row is SequenceTooLong (the releases
    crash).
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
        self._text: Pieces = tokenizer.pieces
        self._mask_ids = mask_ids(tokenizer, spec)
        self._verdicts = set(self._mask_ids)  # ids of the tokens that say present or absent
        if spec.refuse:
            self._verdicts.add(token_id(tokenizer, spec.refuse))
        self._special = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        # Longest first: an alternation takes the first branch that matches, which may be a prefix of the right one.
        longest_first = sorted((*self._special, IMAGE_PLACEHOLDER), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # Templates may spell structural tokens (<cat_start>), but verdicts come from holes only and </s> from the
        # template: typed into a text, they would claim masks that no target belongs to.
        typable = set(spec.added) - {*spec.mask, spec.refuse}
        self._reserved = sorted(set(self._special) - typable)

    def __call__(self, dialogue: Dialogue) -> Encoded:
        """A supervised training row; SequenceTooLong, or a ValueError that names the text that cannot be encoded."""
        row = self.encode(dialogue)
        room = self.max_length - self.image_tokens + 1  # ids that fit; one of them stands for the whole image
        if not self.max_length or self.long_rows == "keep" or len(row.ids) <= room:
            return row
        short = self._cut_row(dialogue, row, room)
        if short is not None:
            return replace(short, cut=len(row.ids) - len(short.ids))
        raise SequenceTooLong(
            f"a row of {len(row.ids) - 1 + self.image_tokens} positions ({self.image_tokens} for the image) does not "
            f"fit in model_max_length {self.max_length} ({LONG_ROWS[self.long_rows]}): {_quote(dialogue[0].question)}"
        )

    def _cut_row(self, dialogue: Dialogue, row: Encoded, room: int) -> Encoded | None:
        """The beginning of the row in at most `room` ids with all of its masks and refusals; None if there is none."""
        if self.long_rows == "cut":
            # The last verdict must lie inside: the masks of a row belong one to one to its mask tokens, and without
            # its token a mask would have no query. What stays keeps its place, so holes and mask_positions are valid.
            last = max((index for index, token in enumerate(row.ids) if token in self._verdicts), default=0)
            supervised = any(label != IGNORE_ID for label in row.labels[: max(room, 0)])
            if last < room and supervised:
                return replace(row, ids=row.ids[:room], labels=row.labels[:room])
        if self.long_rows == "cut_rounds":
            rows = (self.encode(dialogue[:rounds]) for rounds in range(len(dialogue) - 1, 0, -1))
            longest = next((short for short in rows if len(short.ids) <= room), None)
            # Fewer verdicts than the full row: a dropped round held a mask or a refusal.
            if longest and (len(longest.holes), longest.refused) == (len(row.holes), row.refused):
                return longest
        return None

    def encode(self, dialogue: Dialogue) -> Encoded:
        """The row, whatever its length; evaluation never cuts."""
        _check_placeholder([turn.question for turn in dialogue])
        parts = []
        for index, turn in enumerate(dialogue):
            parts += self._round(turn, self.template, first=index == 0)
        ids, labels = self._encode(parts)
        items = [item for turn in dialogue for item in turn.answer]
        holes = tuple(item.target for item in items if isinstance(item, Mask))
        refused = sum(isinstance(item, Refuse) for item in items)
        return Encoded(ids, labels, holes, self._mask_positions(ids, len(holes)), refused)

    def prompt(self, question: str, history: Dialogue = ()) -> list[int]:
        """Ids of an open prompt: earlier rounds, then `question`, ending where the answer begins.

        ValueError if the questions have more characters than ASSISTANT_MAX_PROMPT.
        """
        _check_placeholder([*(turn.question for turn in history), question])
        PROMPT.check(len(question) + sum(len(turn.question) for turn in history), f"the prompt {_quote(question, 60)}")
        parts = []
        for index, turn in enumerate(history):
            parts += self._round(turn, self.prompt_template, first=index == 0)
        parts.append(_Part(self._prefix(question, self.prompt_template, first=not history), False))
        return self._encode(parts)[0]

    def check_text(self, text: str) -> None:
        """ValueError if a dataset's own text holds a reserved token or the image placeholder."""
        self._check_plain(text)
        if IMAGE_PLACEHOLDER in text:
            raise ValueError(f"the text contains {IMAGE_PLACEHOLDER}, which stands for the image: {_quote(text)}")

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
            raise ValueError(f"empty answer to {_quote(turn.question)}")
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
            raise ValueError(f"{IMAGE_PLACEHOLDER} in an answer: {_quote(item)}")
        return item

    def _check_plain(self, text: str) -> None:
        if half := HALF_CHARACTERS.search(text):
            raise ValueError(
                f"the text holds {half[0]!a} at character {half.start()}, which is no character: give it as UTF-8 "
                f"({_quote(text, 60)})"
            )
        for token in self._reserved:
            if token in text:
                raise ValueError(f"the text contains the token {token!r}, which may not be typed: {_quote(text)}")

    def _encode(self, parts: list[_Part]) -> tuple[list[int], list[int]]:
        """Ids and labels, starting with BOS."""
        ids, labels = [self.tokenizer.bos_token_id], [IGNORE_ID]
        for piece in self._pieces(parts):
            ids += piece.ids
            labels += piece.ids if piece.supervised else [IGNORE_ID] * len(piece.ids)
        return ids, labels

    def _pieces(self, parts: list[_Part]) -> list[_Piece]:
        """Cuts the parts at added tokens and encodes each stretch; the ids are those of the text tokenised as a whole.

        Blanks are what makes this hard: a vocabulary writes a blank as the first character of the next piece ("▁sky"),
        so each stretch must be encoded with a blank in front exactly where the published tokenizer has one.

            start of the prompt, after the image   one is added: "A chat" is "▁A", "▁chat"
            "ASSISTANT:" then " sky"               question and answer: the blank between them belongs to "▁sky"
            "[SEG] ." and a token that strips      the blank goes before "." is encoded
            "[SEG]." and "road[SEG]"               `Pieces` decides about text after a token (its `legacy`)
        """
        stretches = [(text, part.supervised) for part in parts for text in self._split_at_tokens(part.text) if text]
        pieces = []
        after_text = False  # whether the previous stretch is text, no token
        for position, (text, supervised) in enumerate(stretches):
            # Beyond both ends stands the placeholder: no blank is stripped there, and the prompt begins with one.
            before = stretches[position - 1][0] if position else IMAGE_PLACEHOLDER
            after = stretches[position + 1][0] if position + 1 < len(stretches) else IMAGE_PLACEHOLDER
            if text == IMAGE_PLACEHOLDER:
                pieces.append(_Piece([IMAGE_ID], supervised))
            elif text in self._special:
                pieces.append(_Piece([self._special[text][0]], supervised))
            else:
                text = text.lstrip() if before in self._special and self._special[before][1].rstrip else text
                text = text.rstrip() if after in self._special and self._special[after][1].lstrip else text
                if text:
                    # The blank between a prefix and its answer: no piece of the vocabulary has a blank inside, so the
                    # text may be cut here; the blank is given to the encoder as that of the next piece.
                    continues = after_text and text.startswith(" ")
                    blank = continues or before == IMAGE_PLACEHOLDER
                    words = text[1:] if continues else text
                    pieces.append(_Piece(self._text.encode(words, blank=blank), supervised))
            after_text = text != IMAGE_PLACEHOLDER and text not in self._special
        return pieces

    def _split_at_tokens(self, text: str) -> list[str]:
        return self._split.split(self._text.plain(text))

    def _mask_positions(self, ids: list[int], count: int) -> tuple[tuple[int, ...], ...]:
        """For each of `count` masks, the K positions whose states prompt it."""
        width = len(self._mask_ids)
        # The state at t - 1 predicts the token at t, and it is also the state at hand in generation when the mask token
        # has just been sampled: the same query in training and in generation, without a second forward pass.
        shift = 1 if self.spec.read == "before" else 0
        places = [index - shift for index, token in enumerate(ids) if token in self._mask_ids]
        assert len(places) == count * width, "typed mask tokens are refused, so every one comes from a hole"
        return tuple(tuple(places[start : start + width]) for start in range(0, len(places), width))


class _Part(NamedTuple):
    """A question with the words around it, or an answer with the blank in front of it."""

    text: str
    supervised: bool


class _Piece(NamedTuple):
    """Ids of a stretch of text, or of one token."""

    ids: list[int]
    supervised: bool


def _check_placeholder(questions: list[str]) -> None:
    """ValueError unless the image placeholder stands once in the first question and in no other."""
    if not questions:
        raise ValueError("an empty dialogue cannot be encoded")
    counts = [question.count(IMAGE_PLACEHOLDER) for question in questions]
    if counts[0] != 1 or any(counts[1:]):
        raise ValueError(
            f"{IMAGE_PLACEHOLDER} must stand once in the first question and in no other: {_quote(questions[0])}"
        )


def _quote(text: str, limit: int = 160) -> str:
    shown = text if len(text) <= limit else text[:limit] + " ..."
    return ascii(shown) if HALF_CHARACTERS.search(shown) else repr(shown)
