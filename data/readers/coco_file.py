"""Reading COCO-style annotation files: entries by id, masks of annotations, and errors that say file and entry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as member
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.readers.index import Fault, attempt
from data.sources.base import field, read_entries
from data.types import EmptyMask
from utils.limits import PIXELS
from utils.masks import CachedMask, Size, as_flat, segmentation_to_mask
from utils.text import preview

ABOUT_BOXES = ("refuse", "draw")  # choices for an annotation that has a box and no segmentation
CORNERS = 3  # the least that a polygon has


def id_of(value: Any, where: str, what: str = "id") -> int | str:
    """An id in the form in which ids are compared: 7, 7.0 and "7" are the same, "007" stays text.

    Raises ValueError for what is neither a whole number nor text.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be a whole number or text, got {preview(value)}")
    text = value.strip()
    return int(text) if text.isdecimal() and text.isascii() and str(int(text)) == text else text


class Table(dict):
    """Entries by id (`id_of`), however each list of a file writes its numbers."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._spellings: dict[int | str, Any] = {}  # id -> what the file writes, where the two differ
        self._by_number: dict[int, list[int | str]] | None = None  # number -> ids that differ in leading zeros only

    def put(self, value: Any, entry: Any, where: str) -> int | str:
        """Stores an entry under its id. A second entry of the same id is a ValueError, however it is written."""
        key = id_of(value, where)
        if key in self:
            before = self.spelling(key)
            both = "" if before == value and type(before) is type(value) else f", as {before!r} and {value!r}"
            raise ValueError(f"{where}: the id {key} is given twice{both}; ids must be unique")
        self[key] = entry
        self._by_number = None
        if type(value) is not type(key) or value != key:
            self._spellings[key] = value
        return key

    def spelling(self, key: int | str) -> Any:
        """An id as the file writes it."""
        return self._spellings.get(key, key)

    def key(self, value: Any, what: str, where: str) -> int | str:
        """The id of the entry that `value` names, which may differ from it in leading zeros ("000007" and 7).

        ValueError if there is no such entry, or if several differ in leading zeros only; it shows how both are written.
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
            raise ValueError(f"{text} in this spelling, but as {' and '.join(repr(self.spelling(k)) for k in same)}")
        if str(self.path) not in where:
            raise ValueError(f"{text}; are the two files of one release?")
        have = ", ".join(repr(self.spelling(key)) for key in list(self)[:3]) or "none"
        more = ", ..." if len(self) > 3 else ""
        raise ValueError(f"{text}: it has {len(self)} ({have}{more})")

    def find(self, value: Any, what: str, where: str) -> Any:
        """The entry that `value` names, see `key`."""
        return self[self.key(value, what, where)]


def _number(key: int | str) -> int | None:
    """The number that an id writes, leading zeros or not; None if it is other text."""
    if isinstance(key, str):
        return int(key) if key.isdecimal() and key.isascii() else None
    return key


@dataclass
class CocoFile:
    """A COCO-style file, read entry by entry. Annotations are kept as JSON text, an eighth of the size of objects.

    strays: bad annotations that belong to no image of the file.
    """

    path: Path
    images: Table
    categories: Table
    strays: list[Fault] = member(default_factory=list)
    _annotations: dict[Any, list[bytes | Fault]] = member(default_factory=dict)  # by image

    def annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """The annotations of an image, in the order of the file, as `keep` of `read_coco` left them.

        ValueError if one of them is bad: without it, what else is said of the image would be incomplete.
        """
        entries = self._annotations.get(image_id, ())
        for entry in entries:
            if isinstance(entry, Fault):
                raise ValueError(entry.text)
        return [json.loads(text) for text in entries if not isinstance(text, Fault)]

    def is_annotated(self, image_id: Any) -> bool:
        """Whether the file has an annotation of an image, good or bad."""
        return image_id in self._annotations

    def category(self, annotation: dict[str, Any], where: str) -> dict[str, Any]:
        """The category entry of an annotation."""
        return self.categories.find(field(annotation, "category_id", where), "category", where)

    def place(self, kind: str, number: Any) -> str:
        """The `where` of messages about an entry: file, "image" or "annotation", id."""
        return f"{self.path}: {kind} {number}"


def read_coco(path: Path, keep: Callable[[dict[str, Any], str], dict[str, Any]]) -> CocoFile:
    """Images, categories and annotations of a file.

    keep: `keep(annotation, where)` returns the part of an annotation that is needed, and is called as it is read.
    Raises ValueError for a file without one of the three lists, and for ids of images or categories that are missing
    or repeated. What is wrong with one annotation is a fault of its image, or one of the strays.
    """
    coco = CocoFile(path, Table(path), Table(path))
    numbers = Table(path)  # of the annotations, to find repeated ids
    sections = set()
    read = 0  # annotations so far
    for key, entry in read_entries(path):
        sections.add(key)
        if key in ("images", "categories"):
            table = getattr(coco, key)
            where = f"{path}: {key}[{len(table)}]"
            table.put(field(entry, "id", where), entry, where)
        elif key == "annotations":
            where, read = f"{path}: annotations[{read}]", read + 1
            image_id = attempt(partial(_image_of, entry, where))
            if isinstance(image_id, Fault):
                coco.strays.append(image_id)
                continue
            kept = attempt(partial(_kept, entry, image_id, numbers, keep, path, where))
            coco._annotations.setdefault(image_id, []).append(kept)
    if missing := {"images", "categories", "annotations"} - sections:
        have = ", ".join(sorted(sections)) or "nothing"
        raise ValueError(f"{path}: no {' or '.join(sorted(missing))} (or an empty list); it has {have}")
    # Annotations may come before the images in the file, so their spelling of image ids is resolved at the end.
    for image_id in [image_id for image_id in coco._annotations if image_id not in coco.images]:
        entries = coco._annotations.pop(image_id)
        key = attempt(partial(coco.images.key, image_id, "image", f"{path}: {_names(entries)}"))
        if isinstance(key, Fault):
            coco.strays.append(key)
        else:
            coco._annotations.setdefault(key, []).extend(entries)
    return coco


def _image_of(annotation: Any, where: str) -> int | str:
    return id_of(field(annotation, "image_id", where), where, "image_id")


def _kept(
    entry: Any, image_id: int | str, numbers: Table, keep: Callable[..., dict[str, Any]], path: Path, where: str
) -> bytes:
    """What `keep` leaves of an annotation, as JSON. numbers: the ids so far; ValueError if its own is among them."""
    number = numbers.put(entry.get("id", f"of image {image_id}"), True, where)  # panoptic files have no ids
    return json.dumps(keep(entry, f"{path}: annotation {number}")).encode("ascii")


def _names(entries: list[bytes | Fault]) -> str:
    """The subject of a message about these annotations: the id of the first, and how many there are."""
    first = entries[0]
    number = None if isinstance(first, Fault) else json.loads(first).get("id")
    name = "an annotation" if number is None else f"annotation {number}"
    return name if len(entries) == 1 else f"{name} (of {len(entries)})"


def shape_of(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """What masks need of an annotation: id, category, segmentation, iscrowd; without a segmentation, its box."""
    shape = {key: field(annotation, key, where) for key in ("id", "category_id")}
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, list) and not any(segmentation):  # [[]] is none either
        segmentation = []
    box = {} if segmentation else {"bbox": annotation.get("bbox")}
    return {**shape, "segmentation": segmentation, "iscrowd": is_crowd(annotation, where), **box}


def outline(shape: dict[str, Any], where: str, boxes: str = "refuse") -> Any:
    """The segmentation of an annotation (from `shape_of`). boxes: "draw" takes its box if it has none.

    Raises ValueError if there is neither: what is in the image needs a mask.
    """
    if shape["segmentation"]:
        return shape["segmentation"]
    if boxes == "draw" and shape["bbox"] is not None:
        return box_polygon(shape["bbox"], where)
    hint = "; it has a box only, which the source coco takes as the mask with the option boxes: draw"
    raise ValueError(
        f"{where}: no 'segmentation', or an empty one, and what is in the image needs a mask"
        f"{hint if shape['bbox'] is not None else ''}"
    )


def is_crowd(annotation: dict[str, Any], where: str) -> int:
    """1 if the annotation covers a group of objects, else 0; iscrowd may be missing or written as text."""
    value = annotation.get("iscrowd") or 0
    if value not in (0, 1, "0", "1"):
        raise ValueError(f"{where}: iscrowd must be 0 or 1, got {preview(value)}")
    return int(value)


def box_polygon(box: Any, where: str) -> list[list[float]]:
    """The four corners of COCO's [x, y, width, height] as a segmentation."""
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in box):
        raise ValueError(f"{where}: a box is [x, y, width, height], got {preview(box)}")
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise ValueError(f"{where}: the box {box} encloses nothing: width and height must be above 0")
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def by_id(data: Any, key: str, path: Path) -> Table:
    """The entries of the list `data[key]` by their `id`; ValueError if an id occurs twice."""
    table = Table(path)
    for index, entry in enumerate(field(data, key, str(path), list)):
        where = f"{path}: {key}[{index}]"
        table.put(field(entry, "id", where), entry, where)
    return table


def size_of(image: dict[str, Any], where: str) -> Size:
    """(H, W) of an image entry; ValueError unless both are whole numbers above 0 and within the limit on pixels."""
    size = [field(image, key, where) for key in ("height", "width")]
    size = [int(side) if isinstance(side, float) and side.is_integer() else side for side in size]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(f"{where}: height and width must be whole numbers above 0, got {size[0]!r} and {size[1]!r}")
    PIXELS.check(size[0] * size[1], f"{where}: {size[0]} x {size[1]} (height x width)")
    return size[0], size[1]


def released_mask(segmentations: list[Any], size: Size, where: str) -> CachedMask | None:
    """The mask as the released readers compute it: they sum an object's parts, and pixels under several parts are lost.

    It may be empty (lisa.md 4.4). None if no annotation has several parts: then it is the ordinary mask.
    """
    if not any(isinstance(shape, list) and len(shape) > 1 for shape in segmentations):
        return None

    def union_of_sums() -> np.ndarray:
        return np.logical_or.reduce([segmentation_to_mask(shape, size, "exclude") for shape in segmentations])

    return CachedMask(union_of_sums, where)


def rasterize(segmentations: list[Any], size: Size, overlap: str, where: str) -> np.ndarray:
    """(H, W) bool: the union of the masks of several annotations.

    overlap: what pixels under several parts of one annotation are, see `segmentation_to_mask`.
    where: file and entry, which begin every error. A mask without a pixel is EmptyMask: what is there covers something,
    and what is not there has no annotation.
    """
    mask = np.zeros(size, bool)
    try:
        for segmentation in segmentations:
            mask |= segmentation_to_mask(segmentation, tuple(size), overlap)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:  # nested in another way than COCO
        raise ValueError(f"{where}: the segmentation cannot be read ({error})") from None
    if not mask.any():
        why = "the mask covers no pixel" if any(segmentations) else "the segmentation is empty"
        raise EmptyMask(f"{where}: {why}; what is in the image needs a mask")
    return mask


def valid_polygons(segmentation: Any) -> Any:
    """A segmentation without its broken polygons (an odd number of coordinates, or fewer than three points).

    Some released readers skip these; RLEs and whatever is no list stay as they are.
    """
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if isinstance(part, dict) or _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    flat = as_flat(part)
    return isinstance(flat, list) and len(flat) >= 2 * CORNERS and len(flat) % 2 == 0
