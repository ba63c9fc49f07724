"""Your own queries, one JSON object per line: image, phrase or question, and where it is; see docs/your_data.md."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    with_slashes,
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
    """One record for all lines about one image that are of one kind; each explained text has a record of its own.

    A phrase is asked as a referring expression, a question as it stands. `answer` explains what is there. For what is
    not there (its shape is null), `answer` says what is there instead of a phrase, or is the full answer to a question.
    Lines of one image and one text have one mask, the union of their shapes.

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
        where = f"{self.files[0]}: line"
        image = file_below(self._folder, row["image"], f"{where} {row['queries'][0][0]}")
        targets = []
        for _, text, shapes, correction in row["queries"]:
            mask = None
            if shapes:
                lines = ", ".join(str(number) for number, *_ in shapes)
                mask = CachedMask(partial(self._union, image, shapes), f"{where}{'s' * (len(shapes) > 1)} {lines}")
            targets.append(Target(text, mask, correction))
        dialogues = ((Turn(targets[0].phrase, (row["explanation"],)),),) if row["explanation"] else ()
        return Record(image, row["kind"], tuple(targets), dialogues=dialogues)

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]

    def annotation_paths(self) -> list[Path]:
        shapes = (shape for row in self._rows.sound() for _, _, shapes, _ in row["queries"] for shape in shapes)
        return [*self.files, *(self._folder / value for _, kind, value in shapes if kind == "mask")]

    def _union(self, image: Path, shapes: list[list[Any]]) -> np.ndarray:
        """(H, W) bool: where any of the shapes is; each must cover a pixel."""
        masks = [self._mask(image, kind, shape, f"{self.files[0]}: line {line}") for line, kind, shape in shapes]
        return np.logical_or.reduce(masks)

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
    """A row per image and kind, and one per explained text; its queries are [line, text, shapes, correction].

    Shapes are [line, kind of shape, shape], of all lines about this image and text; what is not there has none.
    """
    lines: list[Line] = []
    faulty: set[tuple[str, str] | None] = set()  # images and texts of bad lines
    content = read_text(path)
    if content.strip()[:1] == "[" and content.strip()[-1] == "]":
        raise ValueError(f"{path}: holds a JSON list; write one object per line, with nothing around them")
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        line = attempt(partial(read_line, text, number, f"{path}: line {number}"))
        if isinstance(line, Fault):
            faulty.add(_about(text))
            yield line
        else:
            lines.append(line)
    if not lines and not faulty:
        raise ValueError(f"{path}: holds no line")
    about: dict[tuple[str, str], list[Line]] = {}  # image and text -> its lines
    for line in lines:
        about.setdefault(line.about, []).append(line)
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Any]]] = {}
    for key, same in about.items():
        if key in faulty:  # without that line, the union would lack a shape
            yield Fault(f"{path}: line {same[0].number}: another line about {same[0].text!r} is bad", same[0].image)
            continue
        shapes = [[line.number, line.shape_key, line.shape] for line in same if line.shape is not None]
        if 0 < len(shapes) < len(same):
            yield _contradiction(path, same)
            continue
        for line in same:
            explained = line.about if line.explanation else None
            queries = groups.setdefault((line.image, line.kind, line.explanation, explained), {})
            queries.setdefault((line.about, line.correction), [line.number, line.text, shapes, line.correction])
    for (image, kind, explanation, _), queries in groups.items():
        yield {"image": image, "kind": kind, "explanation": explanation, "queries": list(queries.values())}


@dataclass(frozen=True)
class Line:
    """A query. shape is None for what is not in the image; then `correction`, not `explanation`, is the answer.

    about: image and text, equal for two lines that a system asks the same of.
    """

    number: int
    image: str
    kind: str  # of its record
    text: str
    about: tuple[str, str]
    shape_key: str
    shape: Any
    explanation: str | None
    correction: str | None


def _about(line: str) -> tuple[str, str] | None:
    """Image and text of a bad line, None where they are what is bad."""
    with suppress(ValueError):
        entry = parse_json(line)
        if isinstance(entry, dict):
            image = entry.get("image")
            for key in TEXTS:
                if isinstance(image, str) and isinstance(text := entry.get(key), str):
                    return _subject(image, text, key)
    return None


def _subject(image: str, text: str, key: str) -> tuple[str, str]:
    """`Line.about`: a phrase is asked in lower case, a question as it stands."""
    words = " ".join(text.lower().split()) if key == "phrase" else text.strip()
    return posixpath.normpath(with_slashes(image)), words


def _contradiction(path: Path, lines: list[Line]) -> Fault:
    """Of lines with one image and text, some of which have a shape and some null."""
    here, absent = (next(line for line in lines if (line.shape is None) == null) for null in (False, True))
    return Fault(
        f"{path}: line {absent.number} says that {here.text!r} is not in {here.image} ({absent.shape_key} is null), "
        f"line {here.number} says where it is",
        here.image,
    )


def read_line(line: str, number: int, where: str) -> Line:
    """The query of a line; ValueError if anything about it is wrong."""
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
    if shape is not None and shape_key != "polygons":
        shape = [shape] if shape_key == "rle" else with_slashes(shape)
    about = _subject(entry["image"], text, text_key)
    return Line(number, about[0], kind, text.strip(), about, shape_key, shape, explanation, correction)


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
