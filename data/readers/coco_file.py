"""COCO-style annotation files: entries by id, masks of one or several annotations; every error says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as member
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import field, read_entries, shortened
from utils.limits import PIXELS
from utils.masks import CachedMask, EmptyMask, Size, as_flat, segmentation_to_mask

ABOUT_BOXES = ("refuse", "draw")  # what an annotation with nothing but a box is
CORNERS = 3  # a polygon has at least this many


def id_of(value: Any, where: str, what: str = "id") -> int | str:
    """An id as it is compared: 7, 7.0 and "7" are one, "007" is text; what is no whole number or text is refused."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be a whole number or text, got {shortened(value)}")
    text = value.strip()
    return int(text) if text.isdecimal() and text.isascii() and str(int(text)) == text else text


class Table(dict):
    """Entries by id (`id_of`), whatever way of writing a number each list of a file has."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._spelt: dict[int | str, Any] = {}  # as the file writes them, where that is not the id itself
        self._by_number: dict[int, list[int | str]] | None = None

    def put(self, value: Any, entry: Any, where: str) -> int | str:
        """Files an entry under its id; two of one id are an error, also where they are written in two ways."""
        key = id_of(value, where)
        if key in self:
            before = self.spelt(key)
            written = "" if before == value and type(before) is type(value) else f", as {before!r} and {value!r}"
            raise ValueError(f"{where}: the id {key} is given twice{written}; ids must be unique")
        self[key], self._by_number = entry, None
        if type(value) is not type(key) or value != key:
            self._spelt[key] = value
        return key

    def spelt(self, key: int | str) -> Any:
        """An id as the file writes it."""
        return self._spelt.get(key, key)

    def key(self, value: Any, what: str, where: str) -> int | str:
        """The id of the entry that `value` names; one with zeros in front (000007) is found where that leaves no doubt.

        Otherwise a ValueError that shows how both are written.
        """
        key = id_of(value, where, f"{what} id")
        if key in self:
            return key
        if self._by_number is None:
            self._by_number = {}
            for known_key in self:
                if (number := _number(known_key)) is not None:
                    self._by_number.setdefault(number, []).append(known_key)
        number = _number(key)
        same = self._by_number.get(number, []) if number is not None else []
        if len(same) == 1:
            return same[0]
        text = f"{where}: names {what} {value!r}, which is not in {self.path}"
        if same:
            raise ValueError(f"{text} in this spelling, but as {' and '.join(repr(self.spelt(k)) for k in same)}")
        if str(self.path) not in where:
            raise ValueError(f"{text}; are the two files of one release?")
        have = ", ".join(repr(self.spelt(key)) for key in list(self)[:3]) or "none"
        raise ValueError(f"{text}: it has {len(self)} ({have}{', ...' * (len(self) > 3)})")

    def find(self, value: Any, what: str, where: str) -> Any:
        return self[self.key(value, what, where)]


def _number(key: int | str) -> int | None:
    if isinstance(key, str):
        return int(key) if key.isdecimal() and key.isascii() else None
    return key


@dataclass
class CocoFile:
    """A COCO-style file, read entry by entry: annotations wait as text, an eighth of what objects would take."""

    path: Path
    images: Table
    categories: Table
    _annotations: dict[Any, list[bytes]] = member(default_factory=dict)  # by picture

    def annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """The annotations of a picture, in the order of the file."""
        return [json.loads(text) for text in self._annotations.get(image_id, ())]

    def category(self, annotation: dict[str, Any], where: str) -> dict[str, Any]:
        return self.categories.find(field(annotation, "category_id", where), "category", where)

    def place(self, kind: str, number: Any) -> str:
        return f"{self.path}: {kind} {number}"


def read_coco(path: Path, keep: Callable[[dict[str, Any], str], dict[str, Any]]) -> CocoFile:
    """Images, categories and annotations of a file; `keep(annotation, where)` says what of an annotation is needed."""
    coco, seen, sections = CocoFile(path, Table(path), Table(path)), Table(path), set()
    for key, entry in read_entries(path):
        sections.add(key)
        if key in ("images", "categories"):
            table = getattr(coco, key)
            where = f"{path}: {key}[{len(table)}]"
            table.put(field(entry, "id", where), entry, where)
        elif key == "annotations":
            where = f"{path}: annotations[{len(seen)}]"
            image_id = id_of(field(entry, "image_id", where), where, "image_id")
            number = seen.put(entry.get("id", f"of image {image_id}"), True, where)  # panoptic files have no ids
            text = json.dumps(keep(entry, f"{path}: annotation {number}"))
            coco._annotations.setdefault(image_id, []).append(text.encode("ascii"))
    if missing := {"images", "categories", "annotations"} - sections:
        have = ", ".join(sorted(sections)) or "nothing"
        raise ValueError(f"{path}: no {' or '.join(sorted(missing))} (or an empty list); it has {have}")
    for image_id in [image_id for image_id in coco._annotations if image_id not in coco.images]:
        key = coco.images.key(image_id, "image", f"{path}: an annotation")
        coco._annotations.setdefault(key, []).extend(coco._annotations.pop(image_id))
    return coco


def shape_of(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """What masks need: id, category, segmentation, crowd or not; of an annotation without a segmentation its box."""
    shape = {key: field(annotation, key, where) for key in ("id", "category_id")}
    segmentation = annotation.get("segmentation") or []
    box = {} if segmentation else {"bbox": annotation.get("bbox")}
    return {**shape, "segmentation": segmentation, "iscrowd": is_crowd(annotation, where), **box}


def outline(shape: dict[str, Any], where: str, boxes: str = "refuse") -> Any:
    """The segmentation of what `shape_of` gives; boxes "draw": in the place of none the box."""
    if shape["segmentation"]:
        return shape["segmentation"]
    if boxes == "draw" and shape["bbox"] is not None:
        return box_polygon(shape["bbox"], where)
    hint = "; it has a box only, which the source coco takes as the mask with the option boxes: draw"
    raise ValueError(
        f"{where}: no 'segmentation', or an empty one, and what is in the picture needs a mask"
        f"{hint if shape['bbox'] is not None else ''}"
    )


def is_crowd(annotation: dict[str, Any], where: str) -> int:
    value = annotation.get("iscrowd") or 0
    if value not in (0, 1, "0", "1"):
        raise ValueError(f"{where}: iscrowd must be 0 or 1, got {shortened(value)}")
    return int(value)


def box_polygon(box: Any, where: str) -> list[list[float]]:
    """The four corners of COCO's [x, y, width, height] as a segmentation."""
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in box):
        raise ValueError(f"{where}: a box is [x, y, width, height], got {shortened(box)}")
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise ValueError(f"{where}: the box {box} encloses nothing: width and height must be above 0")
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def by_id(data: Any, key: str, path: Path) -> Table:
    """The entries of the list `data[key]` by their `id`; two of one id are an error."""
    table = Table(path)
    for index, entry in enumerate(field(data, key, str(path), list)):
        where = f"{path}: {key}[{index}]"
        table.put(field(entry, "id", where), entry, where)
    return table


def size_of(image: dict[str, Any], where: str) -> Size:
    """(H, W) as the file gives it; both must be whole numbers above 0."""
    size = [field(image, key, where) for key in ("height", "width")]
    size = [int(side) if isinstance(side, float) and side.is_integer() else side for side in size]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(f"{where}: height and width must be whole numbers above 0, got {size[0]!r} and {size[1]!r}")
    PIXELS.check(size[0] * size[1], f"{where}: {size[0]} x {size[1]} (height x width)")
    return size[0], size[1]


def released_mask(segmentations: list[Any], size: Size, where: str) -> CachedMask | None:
    """The mask as readers have it that sum an object's parts (lisa.md 4.4), which may leave nothing of it; None where
    no annotation has several parts."""
    if not any(isinstance(shape, list) and len(shape) > 1 for shape in segmentations):
        return None

    def summed() -> np.ndarray:
        return np.logical_or.reduce([segmentation_to_mask(shape, size, "exclude") for shape in segmentations])

    return CachedMask(summed, where)


def rasterize(segmentations: list[Any], size: Size, overlap: str, where: str) -> np.ndarray:
    """(H, W) bool, the union of the annotations' masks; errors get the file and the entry.

    A mask without a pixel is an error: what is there covers something, and what is not there has no annotation.
    """
    mask = np.zeros(size, bool)
    try:
        for segmentation in segmentations:
            mask |= segmentation_to_mask(segmentation, tuple(size), overlap)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:  # nested otherwise than in COCO
        raise ValueError(f"{where}: the segmentation cannot be read ({error})") from None
    if not mask.any():
        why = "the mask covers no pixel" if any(segmentations) else "the segmentation is empty"
        raise EmptyMask(f"{where}: {why}; what is in the picture needs a mask")
    return mask


def whole_polygons(segmentation: Any) -> Any:
    """Without the polygons of an odd number of coordinates or too few points, which some released readers skip."""
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if isinstance(part, dict) or _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    flat = as_flat(part)
    return isinstance(flat, list) and len(flat) >= 2 * CORNERS and len(flat) % 2 == 0
