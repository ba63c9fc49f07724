"""Referring sets with sentences that are false of the image: R-RefCOCO/+/g and FP-RefCOCO/+/g (sesame.md 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.sources.base import SOURCES, read_bool
from data.sources.refer import Refer, refer_files

DEFAULTS = {  # set -> `split_by` of its released file
    "R-refcoco": "unc_exclude_unified",
    "R-refcoco+": "unc_exclude_unified",
    "R-refcocog": "umd_exclude_unified",
    "fprefcoco": "berkeley_exclude_unified",
    "fprefcoco+": "berkeley_exclude_unified",
    "fprefcocog": "berkeley_exclude_unified",
}


def read_premise(sentence: dict[str, Any], where: str) -> tuple[bool, str | None]:
    """(whether a sentence is true of the image, what is there instead).

    The two releases write it as `is_false_premise` and as `exist`; where a file has both, `is_false_premise` decides,
    and a sentence with neither is true.
    """
    correction = str(sentence.get("gt_sent") or "").strip() or None
    if "is_false_premise" in sentence:
        return not read_bool(sentence["is_false_premise"], f"{where}: is_false_premise"), correction
    return ("exist" not in sentence or read_bool(sentence["exist"], f"{where}: exist")), correction


def _set(name: str, split_by_default: str) -> Callable[..., Refer]:
    def build(root: Path, split: str = "train", split_by: str = split_by_default, overlap: str = "union") -> Refer:
        return Refer(root, name, split, files=refer_files(name, split_by), overlap=overlap, read_premise=read_premise)

    return build


for _name, _split_by in DEFAULTS.items():
    SOURCES.register(_name)(_set(_name, _split_by))
