"""Tokenizers of InternVL: those of Qwen, with tokens of their own around the image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.qwen_tokenizer import PAD, QWEN, START, STOP, has_token, load_byte_level

WRAP = ("<img>", "</img>")
NEEDED = (PAD, START, STOP, *WRAP, "<IMG_CONTEXT>")
OWN = frozenset({f"<{end}{part}>" for part in ("quad", "ref", "box") for end in ("", "/")} | {"<video>"})


def _reads(folder: Path) -> bool:
    return QWEN.reads(folder) and has_token(folder, WRAP[0])


def _load(folder: Path, max_length: int, release: str | None, legacy: bool | None) -> PreTrainedTokenizerBase:
    return load_byte_level(folder, max_length, NEEDED, "InternVL")


INTERNVL = replace(
    QWEN,
    name="InternVL",
    reads=_reads,
    load=_load,
    wrap=WRAP,
    control=frozenset(NEEDED),
    optional=OWN | (QWEN.control | QWEN.optional).difference(NEEDED),  # older ones have only the chat tokens of Qwen2
)
