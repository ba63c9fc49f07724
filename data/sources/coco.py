"""Your own COCO-style files: instances (polygons, RLE, crowds) or panoptic (JSON and PNGs). See docs/your_data.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.readers.coco_file import (
    ABOUT_BOXES,
    CocoFile,
    id_of,
    is_crowd,
    outline,
    rasterize,
    read_coco,
    shape_of,
    size_of,
)
from data.sources.base import SOURCES, attempt, choice, field, indexed_rows, name_of, picture, read_entries
from data.sources.semantic import Classes, class_names
from data.types import MaskFn, Record, Target
from utils.images import opened
from utils.masks import CachedMask, Size
from utils.registry import unknown

SUFFIX = re.compile("(-(merged|other|stuff))+$")  # of COCO's panoptic classes
ABOUT_CROWDS = ("use", "ignore")


@SOURCES.register("coco")
class Coco:
    """One record a picture, one target a category that is in it; its mask joins all its objects.

    annotations, images, panoptic: below the dataset folder, or absolute; panoptic, the PNGs of a panoptic file, is the
    folder beside that file with its name unless told. serve: "classes" lists the label set, "refer" asks for categories
    by name. For "refer": single leaves out categories of which there are several objects; absent adds so many that are
    not in the picture (the same at every visit, going round the label set from picture to picture). crowd: "ignore"
    makes crowds ignored pixels of a category that is neither present nor absent. classes: only these names; where class
    lists are served of a panoptic file, the pixels of the others and of none are ignored. boxes: "draw" takes the box
    of an annotation without a segmentation as its mask; "refuse": such a record is an error.
    """

    def __init__(
        self,
        root: Path,
        annotations: str,
        images: str,
        panoptic: str | None = None,
        serve: str = "classes",
        single: bool = False,
        absent: int = 0,
        crowd: str = "use",
        classes: Classes = None,
        boxes: str = "refuse",
    ):
        choice("boxes of coco", boxes, ABOUT_BOXES)
        self._serve = choice("serve of coco", serve, ("classes", "refer"))
        self._ignore_crowd = choice("crowd of coco", crowd, ABOUT_CROWDS) == "ignore"
        if absent < 0:
            raise ValueError(f"option absent of coco must be 0 or more, got {absent}")
        if serve == "classes" and (single or absent):
            raise ValueError(
                "options single and absent of coco need serve: refer; a class list names absent ones itself"
            )
        self._single, self._absent = single, absent
        self.files = (existing_file(root, annotations, "annotations of coco"),)
        self._folder = existing_file(root, images, "images of coco")
        self._png = root / panoptic if panoptic else self.files[0].with_suffix("")
        self.vocabulary = select_categories(
            tuple(dict.fromkeys(indexed_rows(root, categories, self.files))), classes, root
        )
        empty_too = serve == "classes" or absent > 0
        options = list(self.vocabulary), empty_too, boxes
        self._rows = indexed_rows(root, parse, self.files, *options, picture="file_name")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: image {row['image_id']}"
        image = picture(self._folder, row["file_name"], where)
        groups, crowds = {}, []
        for name, *shape in row["shapes"]:
            ignored = shape[-1] and self._ignore_crowd
            (crowds if ignored else groups.setdefault(name, [])).append((name, *shape))
        join = self._joiner(row, where)
        unclear = {name for name, *_ in crowds} - groups.keys()
        names = tuple(name for name in self.vocabulary if name not in unclear)
        targets = [Target(name, join(groups[name])) for name in names if name in groups and self._asked(groups[name])]
        ignore = join(crowds) if crowds else None
        if self._serve == "classes":
            if row["png"] is not None:
                ignore = _outside(join, groups, tuple(row["size"]))
            return Record(image, "classes", tuple(targets), names, ignore=ignore)
        targets += [Target(name, None) for name in self._missing([n for n in names if n not in groups], index)]
        return Record(image, "refer", tuple(targets), ignore=ignore)

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.pictures()]

    def annotation_paths(self) -> list[Path]:
        maps = [row["png"] for row in map(self._rows.__getitem__, range(len(self)))] if self._is_panoptic() else []
        return [*self.files, *(self._png / name for name in maps if name)]

    def _is_panoptic(self) -> bool:
        return any(self._rows[index]["png"] for index in range(min(len(self), 100)))

    def _asked(self, shapes: list[Any]) -> bool:
        return not self._single or (len(shapes) == 1 and not shapes[0][-1])

    def _missing(self, names: list[str], index: int) -> list[str]:
        first = index * self._absent
        return [names[(first + i) % len(names)] for i in range(min(self._absent, len(names)))]

    def _joiner(self, row: dict[str, Any], where: str) -> Callable[[list[Any]], MaskFn]:
        """Shapes to a function that draws their union, from annotations or from the picture's one segment map."""
        size = tuple(row["size"])
        if row["png"] is None:
            return lambda shapes: _drawn(shapes, size, f"{where}: {_numbers(shapes)}")
        path = picture(self._png, row["png"], where, "segment map")
        segments = CachedMask(partial(read_segments, path, size))
        return lambda shapes: partial(among, segments, tuple(shape[1] for shape in shapes), path)


def existing_file(root: Path, name: str, what: str) -> Path:
    """A file or folder given in the recipe, below the dataset folder or absolute."""
    if not (root / name).exists():
        raise FileNotFoundError(f"{what}: there is no {root / name}")
    return root / name


def select_categories(names: tuple[str, ...], classes: Classes, root: Path) -> tuple[str, ...]:
    """The names that the option `classes` leaves, in their order."""
    if classes is None:
        return names
    wanted, where = class_names(classes, root)
    for name in wanted:
        if name not in names:
            raise ValueError(f"{where}: {unknown('class', name, names)}")
    return tuple(name for name in names if name in wanted)


def parse(path: Path, names: list[str], empty_too: bool, boxes: str) -> Iterator[Any]:
    """A row a picture: [name, annotation or segment id, segmentation, crowd] each, of the categories `names` only."""
    coco = read_coco(path, _needed)
    for number, image in coco.images.items():
        row = attempt(partial(_row, coco, number, image, names, boxes), image.get("file_name"))
        if empty_too or not isinstance(row, dict) or row["shapes"]:
            yield row


def _row(coco: CocoFile, number: Any, image: dict[str, Any], names: list[str], boxes: str) -> dict[str, Any]:
    where, png, shapes = coco.place("image", number), None, []
    for entry in coco.annotations(number):
        png = entry.get("file_name", png)
        for shape in entry.get("segments", [entry]):
            place = where if "segments" in entry else coco.place("annotation", shape["id"])
            name = _name(coco.category(shape, place), coco.path, panoptic="segments" in entry)
            if name in names:
                polygons = None if "segments" in entry else outline(shape, place, boxes)
                shapes.append([name, shape["id"], polygons, shape["iscrowd"]])
    name, size = field(image, "file_name", where, str), size_of(image, where)
    return {"image_id": number, "file_name": name, "size": size, "png": png, "shapes": shapes}


def categories(path: Path) -> Iterator[str]:
    """Category names in the order of the file, as `parse` spells them."""
    found, panoptic = [], False
    for key, entry in read_entries(path):
        if key == "categories":
            found.append(entry)
        panoptic = panoptic or (key == "annotations" and isinstance(entry, dict) and "segments_info" in entry)
    yield from (_name(entry, path, panoptic) for entry in found)


def read_segments(path: Path, size: Size) -> np.ndarray:
    """(H, W) int32 segment ids of a panoptic PNG: R + 256 G + 65536 B."""
    with opened(path, "segment map") as image:
        colors = np.asarray(image.convert("RGB")).astype(np.int32)
    if colors.shape[:2] != size:
        raise ValueError(f"{path}: the segment map is {colors.shape[:2]}, the picture (H, W) {size}")
    return colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]


def among(segments: CachedMask, numbers: tuple[int, ...], path: Path) -> np.ndarray:
    """(H, W) bool, where these segments are."""
    mask = np.isin(segments(), numbers)
    if not mask.any():
        raise ValueError(f"{path}: has no pixel of the segments {', '.join(map(str, numbers))}")
    return mask


def _needed(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    if "segments_info" not in annotation:
        return shape_of(annotation, where)
    segments = [
        {
            "id": id_of(field(segment, "id", where), where, "the id of a segment"),
            "category_id": field(segment, "category_id", where),
            "iscrowd": is_crowd(segment, where),
        }
        for segment in field(annotation, "segments_info", where, list)
    ]
    return {"file_name": field(annotation, "file_name", where, str), "segments": segments}


def _name(category: dict[str, Any], path: Path, panoptic: bool) -> str:
    where = f"{path}: category {category.get('id') if isinstance(category, dict) else category!r}"
    name = name_of(field(category, "name", where), "name", where).lower()
    if not name:
        raise ValueError(f"{where}: its name is empty")
    return SUFFIX.sub("", name) if panoptic else name


def _drawn(shapes: list[Any], size: Size, where: str) -> CachedMask:
    return CachedMask(partial(rasterize, [shape[2] for shape in shapes], size, "union", where), where)


def _numbers(shapes: list[Any]) -> str:
    return "annotation " + ", ".join(str(shape[1]) for shape in shapes)


def _outside(join: Callable, groups: dict[str, list[Any]], size: Size) -> MaskFn:
    """The pixels that belong to none of the categories."""
    shapes = [shape for group in groups.values() for shape in group]
    return partial(_inverse, join(shapes)) if shapes else partial(np.ones, size, bool)


def _inverse(mask: MaskFn) -> np.ndarray:
    return ~mask()
