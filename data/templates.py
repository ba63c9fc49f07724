"""Conversation templates: the fixed words around questions and answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.types import IMAGE_PLACEHOLDER
from utils.registry import unknown


class Part(NamedTuple):
    """A stretch of a conversation that becomes ids on its own: a question with the words around it, an answer, or what
    follows it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Template:
    """Layout of a conversation (lisa.md 3.1, sa2va.md 4.2). A round is: prefix, separator, answer, `close`, `after`.

    first, later: the prefix of the first and of every later round, with `{question}`. It ends where the answer begins,
        so the last prefix of an open conversation is the generation prompt. The encoder adds BOS.
    close: what ends an answer; it holds the EOS of the tokenizers that the template is for.
    separator: what stands between a prefix and its answer, and is supervised with it.
    after: what follows the close; no part of the answer, so not supervised.
    ends_after: the last round has its `after`, too.
    breaks_after_image: white space between the image and its question stays (data sets write a line break there).
    """

    first: str
    later: str
    close: str
    separator: str = " "
    after: str = ""
    ends_after: bool = True
    breaks_after_image: bool = True

    def prefix(self, question: str, *, first: bool) -> str:
        if not self.breaks_after_image:
            question = re.sub(re.escape(IMAGE_PLACEHOLDER) + r"\s+", IMAGE_PLACEHOLDER, question)
        return (self.first if first else self.later).replace("{question}", question)

    def parts(self, rounds: Sequence[tuple[str, str]], question: str | None = None) -> list[Part]:
        """The text of (question, answer) rounds, then of an open `question` that is to be answered."""
        parts: list[Part] = []
        for index, (asked, answer) in enumerate(rounds):
            parts.append(Part(self.prefix(asked, first=index == 0), False))
            parts.append(Part(f"{self.separator}{answer}{self.close}", True))
            if self.after and (self.ends_after or question is not None or index < len(rounds) - 1):
                parts.append(Part(self.after, False))
        if question is not None:
            parts.append(Part(self.prefix(question, first=not rounds), False))
        return parts


def template(name: str) -> Template:
    """The template called `name`; ValueError with the existing names if there is none."""
    if name not in TEMPLATES:
        raise ValueError(unknown("conversation template", name, TEMPLATES))
    return TEMPLATES[name]


def _vicuna(person: str) -> Template:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    return Template(f"{system} USER: {{question}} ASSISTANT:", "USER: {question} ASSISTANT:", "</s>")


_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_CHATML = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
_QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

TEMPLATES = {
    "llava_v1": _vicuna("human"),
    "vicuna_v1": _vicuna("user"),
    "llava_llama_2": Template(
        f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n{{question}} [/INST]", "<s>[INST] {question} [/INST]", " </s>"
    ),
    # without a system turn, as xtuner has it (sa2va.md 4.2); the template of Qwen3-VL itself, but for the last break
    "qwen_chat": Template(_CHATML, _CHATML, "<|im_end|>", separator="", after="\n"),
    # with that of Qwen2.5's own template: released Sa2VA answers with it (sa2va.md 4.3)
    "qwen_system": Template(_QWEN_SYSTEM + _CHATML, _CHATML, "<|im_end|>", separator="", after="\n"),
    # the same as UniPixel trains and answers with it (unipixel.md 2)
    "chatml": Template(
        _QWEN_SYSTEM + _CHATML,
        _CHATML,
        "<|im_end|>",
        separator="",
        after="\n",
        ends_after=False,
        breaks_after_image=False,
    ),
}
