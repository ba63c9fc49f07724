"""Your own queries, one JSON object per line: image, phrase or question, and where it is; see docs/your_data.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.readers.coco_file import rasterize
from data.sources.base import (
    KINDS,
    SOURCES,
    Fault,
    attempt,
    existing_file,
    file_below,
    image_size,
    indexed_rows,
)
from data.sources.semantic import read_label_map
from data.types import EmptyMask, Record, Target, Turn
from utils.images import size_mismatch
from utils.masks import CachedMask
from utils.plain import parse_json
from utils.text import preview, read_text

TEXTS = ("phrase", "question")
SHAPES = ("polygons", "rle", "mask")
KEYS = ("image", *TEXTS, *SHAPES, "answer")


@SOURCES.register("jsonl")
class JsonLines:
    """One record for all lines about one image that are of one kind and have one explanation.

    A phrase is asked as a referring expression, a question as it stands. `answer` explains what is there. For what is
    not there (its shape is null), `answer` says what is there instead of a phrase, or is the full answer to a question.

    file: below the dataset folder, or absolute. images: the folder of the images, the same way; None: the file's.
    """

    def __init__(self, root: Path, file: str, images: str | None = None):
        self.files = (existing_file(root, file, "file of jsonl"),)
        self._folder = existing_file(root, images, "images of jsonl") if images else self.files[0].parent
        self._rows = indexed_rows(root, parse, self.files, image_key="image")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: line {row['queries'][0][0]}"
        image = file_below(self._folder, row["image"], where)
        targets = []
        for line, text, kind, shape, correction in row["queries"]:
            place = f"{self.files[0]}: line {line}"
            mask = CachedMask(partial(self._mask, image, kind, shape, place), place)
            targets.append(Target(text, None if shape is None else mask, correction))
        dialogues = ((Turn(targets[0].phrase, (row["explanation"],)),),) if row["explanation"] else ()
        return Record(image, row["kind"], tuple(targets), dialogues=dialogues)

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]

    def annotation_paths(self) -> list[Path]:
        queries = (query for index in range(len(self)) for query in self._rows[index]["queries"])
        return [*self.files, *(self._folder / shape for _, _, kind, shape, _ in queries if kind == "mask" and shape)]

    def _mask(self, image: Path, kind: str, shape: Any, where: str) -> np.ndarray:
        """(H, W) bool of the image's size, from polygons, RLE or a mask file."""
        size = image_size(image)
        if kind != "mask":
            return rasterize([shape], size, "union", where)
        path = file_below(self._folder, shape, where, "mask")
        mask = read_label_map(path) > 0
        if mask.shape != size:
            raise ValueError(f"{where}: {size_mismatch(image, f'the file {path}', mask.shape, size)}")
        if not mask.any():
            raise EmptyMask(f"{where}: the mask {path} is 0 everywhere; null says that the thing is not there")
        return mask


def parse(path: Path) -> Iterator[Any]:
    """A row per image, kind and explanation; its queries are [line, text, kind of shape, shape, correction]."""
    groups: dict[tuple[str, str, str | None], list[list[Any]]] = {}
    faults = 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        query = attempt(partial(read_line, line, f"{path}: line {number}"))
        if isinstance(query, Fault):
            faults += 1
            yield query
        else:
            groups.setdefault(query[0], []).append([number, *query[1]])
    if not groups and not faults:
        raise ValueError(f"{path}: holds no line")
    for (image, kind, explanation), queries in groups.items():
        yield {"image": image, "kind": kind, "explanation": explanation, "queries": queries}


def read_line(line: str, where: str) -> tuple[tuple[str, str, str | None], list[Any]]:
    """(image, kind of record, explanation) and [text, kind of shape, shape, correction] of a line."""
    try:
        entry = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON, perhaps cut off ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    what = "not an object"
    if isinstance(entry, dict):
        unknown_keys = [key for key in entry if key not in KEYS]
        what = f"unknown {', '.join(unknown_keys)}" if unknown_keys else ""
    if what:
        raise ValueError(f"{where}: {what}; a line has {', '.join(KEYS)}")
    text_key, shape_key = _one_of(entry, TEXTS, where), _one_of(entry, SHAPES, where)
    text, shape, answer = entry[text_key], entry[shape_key], entry.get("answer")
    for key, value in (("image", entry.get("image")), (text_key, text), *([("answer", answer)] if answer else ())):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key} must be text, got {value!r}")
    _check_shape(shape_key, shape, where)
    explanation, correction = (None, answer) if shape is None else (answer, None)
    kind = "phrase" if explanation else "refer"
    if text_key == "question":
        kind = "reason"
    shape = [shape] if shape_key == "rle" and shape is not None else shape
    return (entry["image"], kind, explanation), [text.strip(), shape_key, shape, correction]


def _check_shape(key: str, shape: Any, where: str) -> None:
    """ValueError for a shape of the wrong type or an empty one: what is not there has null, not an empty shape."""
    kind = {"polygons": list, "rle": dict, "mask": str}[key]
    if shape is None:
        return
    if not isinstance(shape, kind) or not shape:
        raise ValueError(
            f"{where}: {key} must be {KINDS[kind]} with something in it, or null where the thing is not there; got "
            f"{preview(shape)}"
        )


def _one_of(entry: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The only one of `keys` that the entry has; ValueError if it has none or several."""
    present = [key for key in keys if key in entry]
    if len(present) != 1:
        raise ValueError(f"{where}: give one of {', '.join(keys)}; it has {' and '.join(present) or 'none'}")
    return present[0]
