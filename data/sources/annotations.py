"""COCO-style annotation files: entries by id, masks of one or several annotations; every error says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as member
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import field, read_entries
from utils.masks import Once, Size, segmentation_to_mask

CORNERS = 3  # a polygon has at least this many


@dataclass
class CocoFile:
    """A COCO-style file, read entry by entry: annotations wait as text, an eighth of what objects would take."""

    path: Path
    images: dict[Any, dict[str, Any]] = member(default_factory=dict)
    categories: dict[Any, dict[str, Any]] = member(default_factory=dict)
    _annotations: dict[Any, list[bytes]] = member(default_factory=dict)  # by picture

    def annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """The annotations of a picture, in the order of the file."""
        return [json.loads(text) for text in self._annotations.get(image_id, ())]

    def category(self, annotation: dict[str, Any], where: str) -> dict[str, Any]:
        return known(self.categories, field(annotation, "category_id", where), "category", where, self.path)

    def place(self, kind: str, number: Any) -> str:
        return f"{self.path}: {kind} {number}"


def read_coco(path: Path, keep: Callable[[dict[str, Any], str], dict[str, Any]]) -> CocoFile:
    """Images, categories and annotations of a file; `keep(annotation, where)` says what of an annotation is needed."""
    coco, seen, sections = CocoFile(path), set(), set()
    for key, entry in read_entries(path):
        sections.add(key)
        if key in ("images", "categories"):
            table = getattr(coco, key)
            _unique(table, field(entry, "id", f"{path}: {key}[{len(table)}]"), f"{path}: {key}[{len(table)}]")
            table[entry["id"]] = entry
        elif key == "annotations":
            where = f"{path}: annotations[{len(seen)}]"
            image_id = field(entry, "image_id", where)
            number = entry.get("id", ("picture", image_id))  # panoptic files have one a picture, without an id
            _unique(seen, number, where)
            seen.add(number)
            text = json.dumps(keep(entry, f"{path}: annotation {entry.get('id', f'of image {image_id}')}"))
            coco._annotations.setdefault(image_id, []).append(text.encode("ascii"))
    if missing := {"images", "categories", "annotations"} - sections:
        have = ", ".join(sorted(sections)) or "nothing"
        raise ValueError(f"{path}: no {' or '.join(sorted(missing))} (or an empty list); it has {have}")
    for image_id in coco._annotations:
        known(coco.images, image_id, "image", f"{path}: an annotation", path)
    return coco


def shape_of(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """What masks need: id, category, segmentation, crowd or not."""
    keys = ("id", "category_id", "segmentation")
    return {key: field(annotation, key, where) for key in keys} | {"iscrowd": int(bool(annotation.get("iscrowd")))}


def by_id(data: Any, key: str, path: Path) -> dict[Any, dict[str, Any]]:
    """The entries of the list `data[key]` by their `id`; two of one id are an error."""
    table: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(field(data, key, str(path))):
        where = f"{path}: {key}[{index}]"
        number = field(entry, "id", where)
        _unique(table, number, where)
        table[number] = entry
    return table


def known(table: dict[Any, Any], key: Any, what: str, where: str, path: Path) -> Any:
    """`table[key]`, or a ValueError that names both files."""
    if key not in table:
        raise ValueError(f"{where}: names {what} {key}, which is not in {path}; are the two files of one release?")
    return table[key]


def size_of(image: dict[str, Any], where: str) -> Size:
    """(H, W) as the file gives it; both must be whole numbers above 0."""
    size = [field(image, key, where) for key in ("height", "width")]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(f"{where}: height and width must be whole numbers above 0, got {size[0]!r} and {size[1]!r}")
    return size[0], size[1]


def released_mask(segmentations: list[Any], size: Size, where: str) -> Once | None:
    """The mask as readers have it that sum an object's parts (lisa.md 4.4), which may leave nothing of it; None where
    no annotation has several parts."""
    if not any(isinstance(shape, list) and len(shape) > 1 for shape in segmentations):
        return None

    def summed() -> np.ndarray:
        return np.logical_or.reduce([segmentation_to_mask(shape, size, "exclude") for shape in segmentations])

    return Once(summed, where)


def draw(segmentations: list[Any], size: Size, overlap: str, where: str) -> np.ndarray:
    """(H, W) bool, the union of the annotations' masks; errors get the file and the entry."""
    mask = np.zeros(size, bool)
    try:
        for segmentation in segmentations:
            mask |= segmentation_to_mask(segmentation, tuple(size), overlap)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return mask


def whole_polygons(segmentation: Any) -> Any:
    """Without the polygons of an odd number of coordinates or too few points, which some released readers skip."""
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if isinstance(part, dict) or _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 2 * CORNERS and len(part) % 2 == 0


def _unique(table: Any, number: Any, where: str) -> None:
    if number in table:
        raise ValueError(f"{where}: the id {number} is given twice; ids must be unique")
