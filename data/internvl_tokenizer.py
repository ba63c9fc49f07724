"""Tokenizers of InternVL: those of Qwen, with tokens of their own around the image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from data.qwen_tokenizer import PAD, QWEN, START, STOP, has_token, load_byte_level

WRAP = ("<img>", "</img>")
NEEDED = (PAD, START, STOP, *WRAP, "<IMG_CONTEXT>")
OWN = frozenset({f"<{end}{part}>" for part in ("quad", "ref", "box") for end in ("", "/")} | {"<video>"})


def _reads(folder: Path) -> bool:
    return QWEN.reads(folder) and has_token(folder, WRAP[0])


INTERNVL = replace(
    QWEN,
    name="InternVL",
    reads=_reads,
    load=partial(load_byte_level, needed=NEEDED, known="InternVL"),
    wrap=WRAP,
    control=frozenset(NEEDED),
    optional=OWN | (QWEN.control | QWEN.optional).difference(NEEDED),  # older ones have only the chat tokens of Qwen2
)
