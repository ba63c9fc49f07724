"""The exact words that a system trains on: a dialogue through its tokens and its conversation template."""

from __future__ import annotations

from data.templates import Template
from data.tokens import IMAGE_END, IMAGE_START, TokenSpec
from data.types import IMAGE_PLACEHOLDER, Dialogue, Mask, Refuse, Script


def spoken(dialogue: Dialogue, tokens: TokenSpec, template: Template) -> str:
    """The row as text, as the encoder puts it together before it becomes ids."""
    rounds = []
    for index, turn in enumerate(dialogue):
        question = turn.question
        if tokens.wrap_image:
            question = question.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_PLACEHOLDER + IMAGE_END)
        prefix = template.prefix(question, first=index == 0)
        rounds.append(f"{prefix} {answered(turn.answer, tokens)}{template.close}")
    return "".join(rounds)


def answered(answer: Script, tokens: TokenSpec) -> str:
    """An answer with its holes filled by the system's tokens."""
    return "".join(
        "".join(tokens.mask) if isinstance(part, Mask) else str(tokens.refuse) if isinstance(part, Refuse) else part
        for part in answer
    )
