"""Conversation templates: the fixed words around questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

from utils.registry import unknown


@dataclass(frozen=True)
class Template:
    """Layout of a conversation (lisa.md 3.1). A round is: prefix, one space, answer, `close`.

    first, later: the prefix of the first and of every later round, with `{question}`. It ends where the answer begins,
        so the last prefix of an open conversation is the generation prompt. The encoder adds BOS.
    close: what ends an answer, usually EOS.
    """

    first: str
    later: str
    close: str

    def prefix(self, question: str, *, first: bool) -> str:
        return (self.first if first else self.later).replace("{question}", question)


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

TEMPLATES = {
    "llava_v1": _vicuna("human"),
    "vicuna_v1": _vicuna("user"),
    "llava_llama_2": Template(
        f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n{{question}} [/INST]", "<s>[INST] {question} [/INST]", " </s>"
    ),
}
