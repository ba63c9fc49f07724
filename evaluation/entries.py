"""The entries of files of predictions by other programs: read one by one, their fields checked, masks not decoded.

Two forms: a list of COCO results (one mask per entry), and JSON lines (one answer per line, or one COCO result per
line). docs/judge.md describes every field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.readers.json_stream import read_json_lines, read_list
from evaluation.prediction_schema import is_score
from utils.limits import ENTRY
from utils.text import preview

NAMED = 3  # entries named in a note
MASK_FIELDS = ("segmentation", "bbox", "refused")  # of an entry that is one mask, or says that there is none
WORDS = ("query", "suite", "image", "file_name", "phrase", "question", "category", "protocol")
NUMBERS = ("image_id", "category_id")
BLANKS = frozenset(" \t\r\n\ufeff")


@dataclass
class Found:
    """Entries of one kind: how many, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(printable(name))

    def __str__(self) -> str:
        return f"{self.count} (the first: {'; '.join(self.first)})"


def entries_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and place, entry) of a file in either form."""
    if first_character(path) == "[":
        for number, values in enumerate(read_list(path, ENTRY)):
            yield f"{path}, entry {number}", values
    else:
        for number, values in read_json_lines(path, ENTRY):
            yield f"{path}, line {number}", values


def first_character(path: Path) -> str:
    """The first character of a file that is not blank. ValueError for a file without one, or no text."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for _ in range(1 << 16):
            character = file.read(1)
            if not character:
                break
            if character not in BLANKS:
                return character
    raise ValueError(f"{path} holds no predictions")


def check_entry(values: Any, where: str) -> None:
    """ValueError unless the fields of an entry have the types that they must have. Masks are not decoded here."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping, got {preview(values)}")
    if "annotations" in values or "counts" in values:
        raise ValueError(
            f"{where}: neither an answer nor a COCO result; it has {', '.join(map(printable, list(values)[:8]))}"
        )
    for key in WORDS:
        if key in values and not (isinstance(values[key], str) and values[key].strip()):
            raise ValueError(f"{where}: {key} must be text, got {preview(values[key])}")
    if not isinstance(values.get("text", ""), str):
        raise ValueError(f"{where}: text must be text, got {preview(values['text'])}")
    if not _printable(values.get("protocol", "-")):
        raise ValueError(f"{where}: protocol must be a name of printable characters")
    for key in NUMBERS:
        if key in values and (not isinstance(values[key], int) or isinstance(values[key], bool)):
            raise ValueError(f"{where}: {key} must be a whole number, got {preview(values[key])}")
    if "masks" in values:
        if any(key in values for key in ("segmentation", "bbox")):
            raise ValueError(f"{where}: an answer with 'masks' has no 'segmentation' or 'bbox' of its own")
        if not isinstance(values["masks"], list):
            raise ValueError(f"{where}: masks must be a list, got {preview(values['masks'])}")
        for number, mask in enumerate(values["masks"]):
            _check_mask(mask, f"{where}: masks[{number}]")
        if values["masks"] and values.get("refused"):
            raise ValueError(f"{where}: it is refused and has masks")
    elif any(key in values for key in MASK_FIELDS):
        _check_mask(values, where)
    elif "text" not in values:
        raise ValueError(f"{where}: no answer: it has neither 'masks', 'segmentation', 'refused' nor 'text'")


def printable(text: str, most: int = 120) -> str:
    """Text of somebody else as it may be printed: without control characters, cut after `most` characters."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]} ..."


def phrase_of(values: Mapping[str, Any]) -> str:
    """What a mask or an entry calls its object."""
    return str(values.get("phrase") or values.get("category") or "").strip()


def _check_mask(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a mask is a mapping with 'segmentation', got {preview(values)}")
    if values.get("refused") not in (None, True, False):
        raise ValueError(f"{where}: refused must be true or false, got {preview(values['refused'])}")
    if values.get("refused"):
        if values.get("segmentation"):
            raise ValueError(f"{where}: it is refused and has a mask")
    elif "segmentation" not in values:
        hint = " (tools/boxes_to_masks.py makes masks of boxes)" if "bbox" in values else ""
        raise ValueError(f"{where}: no 'segmentation'{hint}")
    elif not isinstance(values["segmentation"], (dict, list)):
        raise ValueError(f"{where}: segmentation must be an RLE or polygons, got {preview(values['segmentation'])}")
    if "score" in values and not is_score(values["score"]):
        raise ValueError(f"{where}: score must be a finite number, got {preview(values['score'])}")
    for key in ("phrase", "category"):
        if key in values and not isinstance(values[key], str):
            raise ValueError(f"{where}: {key} must be text, got {preview(values[key])}")
    place = values.get("category_id", 0)
    if not isinstance(place, int) or isinstance(place, bool):
        raise ValueError(f"{where}: category_id must be a whole number, got {preview(place)}")


def _printable(value: str) -> bool:
    return 0 < len(value) <= 100 and value.isprintable()
