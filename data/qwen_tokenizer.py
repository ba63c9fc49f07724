"""Tokenizers of Qwen2 to Qwen3: byte-level BPE, no BOS, `<|im_end|>` after an answer, tokens that strip nothing."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from data.tokenizer_family import TokenizerFamily, check_characters

FILE, PARTS = "tokenizer.json", ("vocab.json", "merges.txt")
ADDED = "added_tokens.json"  # of older folders
PAD, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WRAP = ("<|vision_start|>", "<|vision_end|>")


class ByteLevel:
    """Ids of text between added tokens: every blank is text, so a stretch is encoded as it stands (`TextIds`)."""

    strips = False
    file = None

    def __init__(self, backend: Tokenizer):
        self._backend = backend

    def plain(self, text: str) -> str:
        return text

    def stretch(self, text: str, *, opens: bool, continues: bool) -> list[int]:
        check_characters(text)
        return self._backend.encode(text, add_special_tokens=False).ids


def _reads(folder: Path) -> bool:
    if (folder / "tokenizer.model").exists():
        return False
    if (folder / FILE).exists():
        return "ByteLevel" in _kinds(_json(folder / FILE).get("decoder"))
    return all((folder / name).exists() for name in PARTS)


def has_token(folder: Path, token: str) -> bool:
    """Whether the files of a folder list this token among the added ones."""
    names = (FILE, "tokenizer_config.json", ADDED)
    files = {name: _json(folder / name) if (folder / name).exists() else {} for name in names}
    listed = files[FILE].get("added_tokens") or []
    described = files["tokenizer_config.json"].get("added_tokens_decoder") or {}
    entries = [*listed, *(described.values() if isinstance(described, dict) else ())]
    return token in files[ADDED] or any(isinstance(item, dict) and item.get("content") == token for item in entries)


def load_byte_level(folder: Path, max_length: int, needed: Collection[str], known: str) -> PreTrainedTokenizerBase:
    """For the `load` of families with Qwen's rules. needed: added tokens that must be there. known: the models that
    have them."""
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), model_max_length=max_length)
    backend = tokenizer.backend_tokenizer
    absent = [token for token in needed if token not in tokenizer.get_added_vocab()]
    if absent:
        raise ValueError(
            f"{folder}: a byte-level vocabulary without {', '.join(absent)}; of these only those of {known} are "
            "supported"
        )
    # The library's class brings its own rules for splitting a text, whatever the file says.
    if (folder / FILE).exists():
        rules = json.loads(backend.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            theirs = _json(folder / FILE).get(part)
            if _rules(theirs) != _rules(rules[part]):
                raise ValueError(f"{folder / FILE}: {part} is not that of Qwen2, so its ids would be others: {theirs}")
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = None, STOP, PAD
    tokenizer.pieces = ByteLevel(backend)
    return tokenizer


def _load(folder: Path, max_length: int, release: str | None, legacy: bool | None) -> PreTrainedTokenizerBase:
    return load_byte_level(folder, max_length, (PAD, START, STOP, *WRAP), "Qwen2.5-VL, Qwen3-VL and InternVL")


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON (a pointer, or half a download?); fetch it again: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {str(values)[:99]}")
    return values


def _kinds(part: Any) -> set[str]:
    """The types of a part of a `tokenizer.json` and of the parts inside it."""
    if isinstance(part, list):
        return {kind for item in part for kind in _kinds(item)}
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | {kind for item in part.values() for kind in _kinds(item)}


def _rules(part: Any) -> Any:
    """A part of a `tokenizer.json` without what moves no ids."""
    if isinstance(part, list):
        return [_rules(item) for item in part]
    if isinstance(part, dict):
        return {key: _rules(value) for key, value in part.items() if key != "trim_offsets"}
    return part


QWEN = TokenizerFamily(
    name="Qwen",
    reads=_reads,
    load=_load,
    stop=STOP,
    wrap=WRAP,
    adds_wrap=False,
    template="qwen_chat",
    padded=True,
    verbatim=True,
    control=frozenset(
        {PAD, START, STOP, *WRAP}
        | {f"<|{part}_{end}|>" for part in ("object_ref", "box", "quad") for end in ("start", "end")}
        | {f"<|{kind}_pad|>" for kind in ("vision", "image", "video", "fim")}
        | {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>"}
        | {"<tool_call>", "</tool_call>"}
    ),
    optional=frozenset({"<tool_response>", "</tool_response>", "<think>", "</think>"}),  # Qwen3's
)
