"""Dialogue to token ids: the one place where holes become tokens, so tokens and masks agree by construction.

A worked example, with LaSagnA's tokens and the ids of the toy base (docs/method.md prints the full row). The targets of
the record are 0 road, 1 sky and, absent, 2 dog:

    Turn("<image>\\n<semantic>Segment this image.<cat_start> sky, dog, road <cat_end>",
         ("sky", Mask(1), "dog", Refuse(2), "road", Mask(0)))

The template puts its words around the question; the holes become the system's tokens:

    A chat ... questions. USER: <im_start><image><im_end>
    <semantic>Segment this image.<cat_start> sky, dog, road <cat_end> ASSISTANT: sky<ins>dog<no_ins>road<ins></s>

The text is cut at added tokens, and each stretch between them becomes ids on its own. White space next to an added
token goes, as in the published stacks of LLaMA (Qwen's tokens strip nothing). The question is not supervised, the
answer is:

    position    0   1 ...         32    33       34 ...   49   50    51   52       53    54    55   56
    token     <s>  ▁A ... <im_start> image <im_end> ...    : ▁sky <ins> ▁dog <no_ins> ▁road <ins> </s>
    id          1 322 ...       1793  -200     1794 ... 1777  339  1798 1276     1799   356  1798    2
    label       -   - ...          -     -        - ...    -  339  1798 1276     1799   356  1798    2

A causal language model predicts token t from the state at t - 1, so the query of the mask whose token is at 51 is the
state at 50, and that of the mask at 55 is the state at 54:

    Encoded(holes=(1, 0), mask_positions=((50,), (54,)), refused=1)

A system that reads the state at the mask token itself (TokenSpec.read) has ((51,), (55,)) instead. Positions count the
image as one id here. `data.collate` expands it to the image's tokens and shifts them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data.templates import TEMPLATES, Part, Template
from data.templates import template as find_template
from data.tokenizer_family import TextIds
from data.tokens import TokenSpec, image_wrap, mask_ids, token_id
from data.types import IGNORE_ID, IMAGE_ID, IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Turn
from utils.limits import PROMPT
from utils.log import log
from utils.registry import unknown

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
    template: ValueError for one that is for tokenizers with another stop token. None: the tokenizer's family's own.
    prompt_template: template for generation, if it differs from training (SESAME evaluates with a template that it was
        not trained on). It is released with a base model, so it does not count for a tokenizer that it is not for.
    max_length: limit of a training row after the image has become image tokens; 0: no limit.
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
        template: str | None = None,
        max_length: int = 0,
        prompt_template: str | None = None,
        long_rows: str = "error",
    ):
        self.tokenizer = tokenizer
        self.spec = spec
        self.template = self._fitting(template or tokenizer.family.template)
        self.prompt_template = self._prompt_template(prompt_template)
        self.max_length = max_length
        self.long_rows = long_rows
        self._wrap = image_wrap(tokenizer.family, spec)
        self._text: TextIds = tokenizer.pieces
        self._mask_ids = mask_ids(tokenizer, spec)
        self._verdicts = set(self._mask_ids)  # ids of the tokens that say present or absent
        if spec.refuse:
            self._verdicts.add(token_id(tokenizer, spec.refuse))
        # A llava-hf folder has the placeholder among its tokens. Here it stands for the image, and is no id.
        added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._special = {text: entry for text, entry in added.items() if text != IMAGE_PLACEHOLDER}
        # Longest first: an alternation takes the first branch that matches, which may be a prefix of the right one.
        longest_first = sorted((*self._special, IMAGE_PLACEHOLDER), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # Templates may spell structural tokens (<cat_start>), but verdicts come from holes only and </s> from the
        # template: typed into a text, they would claim masks that no target belongs to.
        typable = set(spec.added) - {*spec.mask, spec.refuse}
        self._reserved = sorted(set(self._special) - typable)

    def __call__(self, dialogue: Dialogue, image_tokens: int = 1) -> Encoded:
        """A supervised training row whose image will take `image_tokens` positions; SequenceTooLong, or a ValueError
        that names the text that cannot be encoded."""
        row = self.encode(dialogue)
        room = self.max_length - image_tokens + 1  # ids that fit; one of them stands for the whole image
        if not self.max_length or self.long_rows == "keep" or len(row.ids) <= room:
            return row
        short = self._cut_row(dialogue, row, room)
        if short is not None:
            return replace(short, cut=len(row.ids) - len(short.ids))
        raise SequenceTooLong(
            f"a row of {len(row.ids) - 1 + image_tokens} positions ({image_tokens} for the image) does not "
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
        ids, labels = self._encode(self.template.parts(self._rounds(dialogue)))
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
        return self._encode(self.prompt_template.parts(self._rounds(history), self._question(question)))[0]

    def continued(self, rounds: Sequence[tuple[str, Sequence[int]]], question: str) -> list[int]:
        """Ids of an open prompt after rounds of (question, ids of its answer as they were generated).

        Equal to `prompt` where these ids are those of the answers' texts. A model may write a text in other ids than
        the tokenizer; it has read its own. An answer without its end token, which was cut, is closed. Each question
        holds the image placeholder, as if it were the first; in later ones it is left out. ValueError as of `prompt`.
        """
        questions = [*(asked for asked, _ in rounds), question]
        ids = self.prompt(questions[0])
        for (_, answer), following in zip(rounds, questions[1:], strict=True):
            ids += answer
            if not answer or answer[-1] != self.tokenizer.eos_token_id:
                ids += self._close
            ids += self._after_answer(following)
        return ids

    @property
    def _close(self) -> list[int]:
        """Ids of the close of an answer, after a text."""
        _, labels = self._encode([Part("a", False), Part(self.prompt_template.close, True)])
        return [label for label in labels if label != IGNORE_ID]

    def _after_answer(self, question: str) -> list[int]:
        """Ids of what stands between a closed answer and the next: a later question in the words of the template.

        Found in the ids of a whole dialogue, because what a text becomes depends on what stands before it."""
        _check_placeholder([question])
        PROMPT.check(len(question), f"the prompt {_quote(question, 60)}")
        ids, labels = self._encode(self.prompt_template.parts([("", "a")], self._question(without_image(question))))
        end = max(index for index, label in enumerate(labels) if label != IGNORE_ID)
        return ids[end + 1 :]

    def check_text(self, text: str) -> None:
        """ValueError if a dataset's own text holds a reserved token or the image placeholder."""
        self._check_plain(text)
        if IMAGE_PLACEHOLDER in text:
            raise ValueError(f"the text contains {IMAGE_PLACEHOLDER}, which stands for the image: {_quote(text)}")

    def _fitting(self, name: str) -> Template:
        """The template of this name, if its answers end in the tokenizer's EOS: generation stops at nothing else."""
        layout, stop = find_template(name), self.tokenizer.eos_token
        if stop in layout.close:
            return layout
        fitting = [other for other, candidate in TEMPLATES.items() if stop in candidate.close]
        kind = f"conversation template for a {self.tokenizer.family.name} tokenizer, whose answers end in {stop}"
        raise ValueError(unknown(kind, name, fitting))

    def _prompt_template(self, name: str | None) -> Template:
        if name is None:
            return self.template
        if self.tokenizer.eos_token in find_template(name).close:
            return find_template(name)
        log.info("the template %s of prompts is not for this tokenizer: prompts have that of training", name)
        return self.template

    def _rounds(self, dialogue: Dialogue) -> list[tuple[str, str]]:
        return [(self._question(turn.question), self._answer(turn)) for turn in dialogue]

    def _question(self, text: str) -> str:
        self._check_plain(text)
        return text

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

    def _encode(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Ids and labels, starting with BOS where the tokenizer has one."""
        bos = self.tokenizer.bos_token_id
        ids, labels = ([], []) if bos is None else ([bos], [IGNORE_ID])
        for piece in self._pieces(parts):
            ids += piece.ids
            labels += piece.ids if piece.supervised else [IGNORE_ID] * len(piece.ids)
        return ids, labels

    def _pieces(self, parts: list[Part]) -> list[_Piece]:
        """Cuts the parts at added tokens and encodes each stretch; with LLaMA, the ids are those of the text tokenised
        as a whole, with a byte-level vocabulary those of each part.

        Blanks are what makes LLaMA hard: its vocabulary writes a blank as the first character of the next piece
        ("▁sky"), so each stretch must be encoded with a blank in front exactly where the published tokenizer has one.

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
                    opens = before == IMAGE_PLACEHOLDER
                    pieces.append(_Piece(self._text.stretch(text, opens=opens, continues=after_text), supervised))
            after_text = text != IMAGE_PLACEHOLDER and text not in self._special
        return pieces

    def _split_at_tokens(self, text: str) -> list[str]:
        wrapped = text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.join(self._wrap))
        return self._split.split(self._text.plain(wrapped))

    def _mask_positions(self, ids: list[int], count: int) -> tuple[tuple[int, ...], ...]:
        """For each of `count` masks, the K positions whose states prompt it."""
        width = len(self._mask_ids)
        # The state at t - 1 predicts the token at t, and it is also the state at hand in generation when the mask token
        # has just been sampled: the same query in training and in generation, without a second forward pass.
        shift = 1 if self.spec.read == "before" else 0
        places = [index - shift for index, token in enumerate(ids) if token in self._mask_ids]
        assert len(places) == count * width, "typed mask tokens are refused, so every one comes from a hole"
        return tuple(tuple(places[start : start + width]) for start in range(0, len(places), width))


class _Piece(NamedTuple):
    """Ids of a stretch of text, or of one token."""

    ids: list[int]
    supervised: bool


def without_image(question: str) -> str:
    """A question in its own words."""
    return question.replace(IMAGE_PLACEHOLDER, "").strip()


def _check_placeholder(questions: list[str]) -> None:
    """ValueError unless the image placeholder stands once in the first question and in no other."""
    if not questions:
        raise ValueError("an empty dialogue cannot be encoded")
    counts = [question.count(IMAGE_PLACEHOLDER) for question in questions]
    if counts[0] != 1 or any(counts[1:]):
        raise ValueError(
            f"{IMAGE_PLACEHOLDER} must stand once in the first question and in no other; it stands for the image, and "
            f"no phrase, class or question of one's own may hold it: {_quote(questions[0])}"
        )


def _quote(text: str, limit: int = 160) -> str:
    shown = text if len(text) <= limit else text[:limit] + " ..."
    return ascii(shown) if HALF_CHARACTERS.search(shown) else repr(shown)
