"""Open Images V6 in LaSagnA's layout: one JSON file with the masks of each image by class (lasagna.md 5.2, 5.6)."""

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
    file_below,
    image_size,
    indexed_rows,
    locate,
    name_of,
    of_kind,
    read_entries,
)
from data.sources.semantic import read_label_map
from data.types import Record, Target
from utils.log import log
from utils.masks import CachedMask

HOME = "OpenImageV6"
SPLITS = ("train", "validation", "test")
CATEGORIES = "categories"  # the only key of the file that is not an image


@SOURCES.register("openimage")
class OpenImages:
    """One record per image; every mask belongs to the class that names it (the release pairs them with shuffled names).

    Mask files may have another size than the image: they are resized to it by nearest neighbour, and those of a class
    are united. A class that is not annotated counts as absent, though the dataset is not annotated exhaustively.
    """

    def __init__(self, root: Path, split: str = "train"):
        choice("split of openimage", split, SPLITS)
        places = [(f"{HOME}/annotations/new/{split}_mask.json",), (f"{HOME}/{split}_mask.json",)]
        self.files = tuple(locate(root, f"openimage {split}", *places))
        self._folder, self._masks = locate(
            root, f"images and masks of openimage {split}", (f"{HOME}/folder_{split}", f"{HOME}/{split}-masks")
        )
        self._rows = indexed_rows(root, parse, self.files, image_key="file_name")
        self.vocabulary = tuple(indexed_rows(root, categories, self.files))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: {row['image_id']}"
        image = file_below(self._folder, row["file_name"], where)
        targets = []
        for name, files in row["classes"].items():
            paths = tuple(file_below(self._masks, file, f"{where}: class {name!r}", "mask") for file in files)
            targets.append(Target(name, CachedMask(partial(union_of_files, paths, image), f"{where}: class {name!r}")))
        return Record(image, "classes", tuple(targets), self.vocabulary)

    def annotation_paths(self) -> list[Path]:
        files = (file for row in self._rows.sound() for class_files in row["classes"].values() for file in class_files)
        return [*self.files, *(self._masks / file for file in files)]

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]


def union_of_files(paths: tuple[Path, ...], image: Path) -> np.ndarray:
    """(H, W) bool of the image's size: where any of the mask files is not 0. ValueError if they are 0 everywhere."""
    height, width = image_size(image)
    mask = np.zeros((height, width), bool)
    for path in paths:
        part = (read_label_map(path) > 0).astype(np.uint8)
        # The mask files have a size of their own; nearest neighbour keeps them binary.
        mask |= cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not mask.any():
        raise ValueError(f"{', '.join(map(str, paths))}: 0 everywhere; a class that is there needs a mask")
    return mask


def parse(path: Path) -> Iterator[Any]:
    """A row per image: {image_id, file_name, classes: {class: mask files}}, with classes of the file's categories only.

    An image without a mask is left out and counted in a warning: Open Images labels only some classes of an image, so
    nothing is known about it.
    """
    names = set(categories(path))
    unlabelled = 0
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
    masks: dict[str, list[str]] = {}
    for name, files in classes.items():
        if _class_name(name) not in names:
            raise ValueError(f"{where}: the class {name!r} is not among the {len(names)} {CATEGORIES} of the file")
        if files:
            masks.setdefault(_class_name(name), []).extend(of_kind(files, list, f"class {name!r}", where))
    return {"image_id": number, "file_name": _file_name(number), "classes": masks}


def _file_name(number: str) -> str:
    return f"{number[:2]}/{number}.jpg"


def categories(path: Path) -> Iterator[str]:
    """Lower-case class names in the order of the file, without repetitions."""
    names = dict.fromkeys(_class_name(name) for key, name in read_entries(path) if key == CATEGORIES)
    if not names:
        raise ValueError(f"{path}: no {CATEGORIES!r}, the list of all class names")
    yield from names


def _class_name(name: str) -> str:
    return name_of(name, "a class", CATEGORIES).lower()
