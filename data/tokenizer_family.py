"""What the tokenizers of one family of language models have in common; which family it is, a folder's files say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

Loader = Callable[[Path, int, str | None, bool | None], PreTrainedTokenizerBase]


class TextIds(Protocol):
    """Ids of the stretches of text between added tokens: `tokenizer.pieces`.

    strips: whether added tokens strip the white space next to them. file: a vocabulary file of the folder that the
    library does not save; None if there is none.
    """

    @property
    def strips(self) -> bool: ...

    @property
    def file(self) -> Path | None: ...

    def plain(self, text: str) -> str:
        """The text to cut at added tokens."""
        ...

    def stretch(self, text: str, *, opens: bool, continues: bool) -> list[int]:
        """Ids of a text without added tokens. opens: it begins a prompt or follows the image. continues: text that was
        encoded apart precedes it. Raises ValueError for a text that has no ids."""
        ...


@dataclass(frozen=True)
class TokenizerFamily:
    """The policy of a family: all that the project does with its tokenizers and with no other's.

    reads: whether a folder's tokenizer files are of this family.
    load: (folder, longest text, release, legacy) -> the folder's tokenizer with BOS, pad and EOS as the family has
        them, and with `pieces` (TextIds). release and legacy: see `load_tokenizer`; families without them ignore both.
    stop: the token that ends an answer, the tokenizer's EOS.
    wrap: the tokens around the image.
    adds_wrap: a system adds these tokens, if its `TokenSpec.wrap_image` says so; else the base has them, and they
        always stand there.
    template: the conversation template where the recipe names none (data/templates.py).
    padded: the vocabulary matrices of its models may have more rows than the tokenizer has ids.
    verbatim: blanks next to added tokens are text like any other.
    control: added tokens that the tokenizer of every base model has.
    optional: those that some have. Neither says anything about the system.
    """

    name: str
    reads: Callable[[Path], bool]
    load: Loader
    stop: str
    wrap: tuple[str, str]
    adds_wrap: bool
    template: str
    padded: bool
    verbatim: bool
    control: frozenset[str]
    optional: frozenset[str]


def check_characters(text: str) -> None:
    """ValueError for half a surrogate pair, which is no character."""
    if not text.isascii() and (broken := re.search("[\ud800-\udfff]", text)):
        raise ValueError(f"{broken[0]!r} at position {broken.start()} is half a surrogate pair: {text[:160]!r}")
