"""Referring sets with sentences that are not true of the picture: R-RefCOCO/+/g and FP-RefCOCO/+/g (sesame.md 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.sources.base import SOURCES
from data.sources.refer import Refer, refer_files

WORDS = {"true": True, "false": False}
DEFAULTS = {  # set -> the split_by of its released file
    "R-refcoco": "unc_exclude_unified",
    "R-refcoco+": "unc_exclude_unified",
    "R-refcocog": "umd_exclude_unified",
    "fprefcoco": "berkeley_exclude_unified",
    "fprefcoco+": "berkeley_exclude_unified",
    "fprefcocog": "berkeley_exclude_unified",
}


def premise(sentence: dict[str, Any], where: str) -> tuple[bool, str | None]:
    """(is it true, what is there instead). `is_false_premise` wins over `exist`; with neither it is true."""
    correction = str(sentence.get("gt_sent") or "").strip() or None
    if "is_false_premise" in sentence:
        return not truth(sentence["is_false_premise"], f"{where}: is_false_premise"), correction
    return ("exist" not in sentence or truth(sentence["exist"], f"{where}: exist")), correction


def truth(value: Any, where: str) -> bool:
    """A Python bool, or what stands for one in files that went through other tools: 0, 1, "true", "False"."""
    read = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if read not in (True, False):
        raise ValueError(f"{where} is {value!r}; expected true or false")
    return bool(read)


def _set(name: str, split_by_default: str) -> Callable[..., Refer]:
    def build(root: Path, split: str = "train", split_by: str = split_by_default, overlap: str = "union") -> Refer:
        return Refer(root, name, split, files=refer_files(name, split_by), overlap=overlap, said=premise)

    return build


for _name, _split_by in DEFAULTS.items():
    SOURCES.register(_name)(_set(_name, _split_by))
