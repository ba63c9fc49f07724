"""Open Images V6 in LaSagnA's layout: a JSON of classes and mask files by picture (lasagna.md 5.2, 5.6)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.sources.base import (
    SOURCES,
    Fault,
    attempt,
    choice,
    indexed_rows,
    locate,
    name_of,
    of_kind,
    picture,
    picture_size,
    read_entries,
)
from data.sources.semantic import read_label_map
from data.types import Record, Target
from utils.log import log
from utils.masks import CachedMask

HOME = "OpenImageV6"
SPLITS = ("train", "validation", "test")
CATEGORIES = "categories"  # the one key of the file that is no picture


@SOURCES.register("openimage")
class OpenImages:
    """Every mask belongs to the class that names it (the released reader pairs masks with shuffled names).

    Mask files may be of another size than the picture: they are brought to it by nearest neighbour; those of a class
    are joined. A class that is not annotated counts as absent, though the dataset is not annotated exhaustively.
    """

    def __init__(self, root: Path, split: str = "train"):
        choice("split of openimage", split, SPLITS)
        places = [(f"{HOME}/annotations/new/{split}_mask.json",), (f"{HOME}/{split}_mask.json",)]
        self.files = tuple(locate(root, f"openimage {split}", *places))
        self._folder, self._masks = locate(
            root, f"pictures and masks of openimage {split}", (f"{HOME}/folder_{split}", f"{HOME}/{split}-masks")
        )
        self._rows = indexed_rows(root, parse, self.files, picture="file_name")
        self.vocabulary = tuple(indexed_rows(root, categories, self.files))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: {row['image_id']}"
        image = picture(self._folder, row["file_name"], where)
        targets = []
        for name, files in row["classes"].items():
            paths = tuple(picture(self._masks, file, f"{where}: class {name!r}", "mask") for file in files)
            targets.append(Target(name, CachedMask(partial(joint_phrase, paths, image), f"{where}: class {name!r}")))
        return Record(image, "classes", tuple(targets), self.vocabulary)

    def annotation_paths(self) -> list[Path]:
        named = (
            name for index in range(len(self)) for names in self._rows[index]["classes"].values() for name in names
        )
        return [*self.files, *(self._masks / name for name in named)]

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.pictures()]


def joint_phrase(paths: tuple[Path, ...], image: Path) -> np.ndarray:
    """(H, W) bool of the picture's size: where any of the mask files is not zero."""
    height, width = picture_size(image)
    mask = np.zeros((height, width), bool)
    for path in paths:
        part = (read_label_map(path) > 0).astype(np.uint8)
        mask |= cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not mask.any():
        raise ValueError(f"{', '.join(map(str, paths))}: 0 everywhere; a class that is there needs a mask")
    return mask


def parse(path: Path) -> Iterator[Any]:
    """{image_id, file_name, classes: {class: mask files}} of every picture, whose classes must be categories.

    A picture without a mask is left out, and counted in a warning: OpenImages labels some classes of a picture, so
    nothing is known of it.
    """
    names, unlabelled = set(categories(path)), 0
    for number, classes in read_entries(path):
        if number == CATEGORIES:
            continue
        row = attempt(partial(_row, number, classes, names, f"{path}: {number}"), _file_name(number))
        if isinstance(row, Fault) or row["classes"]:
            yield row
        else:
            unlabelled += 1
    if unlabelled:
        log.warning("%s: left out %d images without a mask; nothing is known of what they show", path, unlabelled)


def _row(number: str, classes: Any, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(classes, dict):
        raise ValueError(f"{where}: expected class names with mask files, got {type(classes).__name__}")
    found: dict[str, list[str]] = {}
    for name, files in classes.items():
        if _spelt(name) not in names:
            raise ValueError(f"{where}: the class {name!r} is not among the {len(names)} {CATEGORIES} of the file")
        if files:
            found.setdefault(_spelt(name), []).extend(of_kind(files, list, f"class {name!r}", where))
    return {"image_id": number, "file_name": _file_name(number), "classes": found}


def _file_name(number: str) -> str:
    return f"{number[:2]}/{number}.jpg"


def categories(path: Path) -> Iterator[str]:
    """Lower-case class names in the order of the file, each once."""
    names = dict.fromkeys(_spelt(name) for key, name in read_entries(path) if key == CATEGORIES)
    if not names:
        raise ValueError(f"{path}: no {CATEGORIES!r}, the list of all class names")
    yield from names


def _spelt(name: str) -> str:
    return name_of(name, "a class", CATEGORIES).lower()
