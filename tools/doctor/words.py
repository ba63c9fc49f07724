"""The exact words that a system trains on: a dialogue through its tokens and its conversation template."""

from __future__ import annotations

from data.templates import Template
from data.tokens import IMAGE_END, IMAGE_START, TokenSpec
from data.types import IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Script


def row_text(dialogue: Dialogue, tokens: TokenSpec, template: Template) -> str:
    """A training row as text: what the encoder turns into ids."""
    rounds = []
    for index, turn in enumerate(dialogue):
        question = turn.question
        if tokens.wrap_image:
            question = question.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_PLACEHOLDER + IMAGE_END)
        prefix = template.prefix(question, first=index == 0)
        rounds.append(f"{prefix} {answer_text(turn.answer, tokens)}{template.close}")
    return "".join(rounds)


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
