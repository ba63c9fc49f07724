"""The exact words that a system trains on: a dialogue through its tokens and its conversation template."""

from __future__ import annotations

from data.templates import Template
from data.tokenizer_family import TokenizerFamily
from data.tokens import TokenSpec, image_wrap
from data.types import IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Script


def row_text(dialogue: Dialogue, tokens: TokenSpec, template: Template, family: TokenizerFamily) -> str:
    """A training row as text: what the encoder turns into ids, with a tokenizer of that family."""
    rounds = [(turn.question, answer_text(turn.answer, tokens)) for turn in dialogue]
    text = "".join(part.text for part in template.parts(rounds))
    return text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.join(image_wrap(family, tokens)))


def answer_text(answer: Script, tokens: TokenSpec) -> str:
    """An answer with its holes filled by the system's tokens."""
    parts = []
    for part in answer:
        if isinstance(part, Mask):
            parts += tokens.mask
        elif isinstance(part, Refuse):
            parts.append(str(tokens.refuse))
        else:
            parts.append(part)
    return "".join(parts)
