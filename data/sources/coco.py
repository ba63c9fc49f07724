"""Your own COCO-style files: instances (polygons, RLE, crowds) or panoptic (JSON and PNGs); see docs/your_data.md."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from data.sources.base import (
    SOURCES,
    Fault,
    attempt,
    choice,
    existing_file,
    field,
    file_below,
    file_field,
    indexed_rows,
    name_of,
    read_entries,
)
from data.sources.semantic import Classes, class_names
from data.types import MaskFn, Record, Target
from utils.images import open_image, upright
from utils.log import log
from utils.masks import CachedMask, Size
from utils.registry import unknown

SUFFIX = re.compile("(-(merged|other|stuff))+$")  # of COCO's panoptic classes
ABOUT_CROWDS = ("use", "ignore")


@SOURCES.register("coco")
class Coco:
    """One record per image, one target per category that is in it; its mask is the union of all its objects.

    annotations, images, panoptic: below the dataset folder, or absolute. panoptic: the folder with the PNGs of a
        panoptic file; None: the folder next to that file with its name.
    serve: "classes" makes class lists of the label set, "refer" asks for categories by name.
    single: for "refer", leave out categories with several objects.
    absent: for "refer", add this many categories that are not in the image. An image gets the same ones at every visit;
        from image to image they go around the label set.
    crowd: "ignore" makes the pixels of crowds ignored; a category with crowds only is then neither present nor absent.
    classes: use only these names. In class lists of a panoptic file, all pixels of other or no categories are ignored.
    first: use only this many images, the first of the file, e.g. to see whether a model can fit them; 0: all.
    boxes: "draw" takes the box of an annotation without a segmentation as its mask; "refuse" makes it an error.
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
        first: int = 0,
    ):
        choice("boxes of coco", boxes, ABOUT_BOXES)
        self._serve = choice("serve of coco", serve, ("classes", "refer"))
        self._ignore_crowd = choice("crowd of coco", crowd, ABOUT_CROWDS) == "ignore"
        for name, number in (("absent", absent), ("first", first)):
            if number < 0:
                raise ValueError(f"option {name} of coco must be 0 or more, got {number}")
        if serve == "classes" and (single or absent):
            raise ValueError(
                "options single and absent of coco need serve: refer; a class list names absent ones itself"
            )
        self._single = single
        self._absent = absent
        self.files = (existing_file(root, annotations, "annotations of coco"),)
        self._folder = existing_file(root, images, "images of coco")
        self._png = root / panoptic if panoptic else self.files[0].with_suffix("")
        names = list(indexed_rows(root, categories, self.files))
        if groups := [name for name, group in names if group and classes is None]:
            log.warning(
                "%s: %s: nothing is annotated as it, and it is the supercategory of others, so it is not asked for; "
                "the option classes can name it",
                *(self.files[0], ", ".join(groups)),
            )
        self.vocabulary = select_categories(
            tuple(dict.fromkeys(name for name, _ in names if name not in groups)), classes, root
        )
        empty_too = serve == "classes" or absent > 0
        options = list(self.vocabulary), empty_too, boxes
        self._rows = indexed_rows(root, parse, self.files, *options, image_key="file_name")
        self._count = min(first or len(self._rows), len(self._rows))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        row = self._rows[range(self._count)[index]]
        where = f"{self.files[0]}: image {row['image_id']}"
        image = file_below(self._folder, row["file_name"], where)
        groups: dict[str, list[Any]] = {}  # name -> its shapes
        crowds = []
        for name, number, segmentation, crowd in row["shapes"]:
            group = crowds if crowd and self._ignore_crowd else groups.setdefault(name, [])
            group.append((name, number, segmentation, crowd))
        join = self._joiner(row, where)
        # A category of which there is nothing but a crowd is neither present (no single object) nor absent.
        unclear = {name for name, *_ in crowds} - groups.keys()
        names = tuple(name for name in self.vocabulary if name not in unclear)
        present = [name for name in names if name in groups]
        targets = [Target(name, join(groups[name])) for name in present if self._is_asked(groups[name])]
        ignore = join(crowds) if crowds else None
        if self._serve == "classes":
            if row["png"] is not None:
                ignore = _pixels_of_others(join, groups, tuple(row["size"]))
            return Record(image, "classes", tuple(targets), names, ignore=ignore)
        targets += [Target(name, None) for name in self._absent_names([n for n in names if n not in groups], index)]
        return Record(image, "refer", tuple(targets), ignore=ignore)

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()[: len(self)]]

    def annotation_paths(self) -> list[Path]:
        maps = [row["png"] for row in self._rows.sound(len(self))] if self._is_panoptic() else []
        return [*self.files, *(self._png / name for name in maps if name)]

    def _is_panoptic(self) -> bool:
        return any(row["png"] for row in self._rows.sound(min(len(self), 100)))

    def _is_asked(self, shapes: list[Any]) -> bool:
        """Whether a category with these shapes is a target; with `single`, only if they are one object."""
        return not self._single or (len(shapes) == 1 and not shapes[0][-1])

    def _absent_names(self, names: list[str], index: int) -> list[str]:
        """The categories among `names`, all absent, that record `index` asks for."""
        first = index * self._absent
        return [names[(first + i) % len(names)] for i in range(min(self._absent, len(names)))]

    def _joiner(self, row: dict[str, Any], where: str) -> Callable[[list[Any]], MaskFn]:
        """A function from shapes to their union as a lazy mask, from annotations or from the image's segment map."""
        size = tuple(row["size"])
        if row["png"] is None:
            return lambda shapes: _union_mask(shapes, size, f"{where}: {_numbers(shapes)}")
        path = file_below(self._png, row["png"], where, "segment map")
        segments = CachedMask(partial(read_segments, path, size))
        return lambda shapes: partial(segments_mask, segments, tuple(shape[1] for shape in shapes), path)


def select_categories(names: tuple[str, ...], classes: Classes, root: Path) -> tuple[str, ...]:
    """Those of `names` that the option `classes` lists, in the order of `names`."""
    if classes is None:
        return names
    selection, where = class_names(classes, root)
    for name in selection:
        if name not in names:
            raise ValueError(f"{where}: {unknown('class', name, names)}")
    return tuple(name for name in names if name in selection)


def parse(path: Path, names: list[str], empty_too: bool, boxes: str) -> Iterator[Any]:
    """A row per image; its shapes are [name, annotation or segment id, segmentation, crowd].

    names: the categories to keep. empty_too: keep images without any of them. boxes: see `Coco`.
    """
    coco = read_coco(path, _trim_annotation)
    panoptic = _is_panoptic(coco)
    first: dict[str, Any] = {}  # file name -> the first image that has it
    unclear: list[Fault] = []  # images of which it is not known what they lack
    for number, image in coco.images.items():
        row = attempt(partial(_row, coco, number, image, names, boxes), image.get("file_name"))
        if empty_too and isinstance(row, dict):  # then what the row does not name is said not to be in the image
            name = row["file_name"]
            other = first.setdefault(posixpath.normpath(name), number)
            reason = ""
            if other != number:
                reason = f"has the file name of image {other}, {name}: merge their annotations, or name the files apart"
            elif panoptic and not coco.is_annotated(number):
                reason = "has no entry among the annotations, as a panoptic file needs"
            if reason:
                unclear.append(Fault(f"{coco.place('image', number)}: {reason}", name))
                continue
        if empty_too or not isinstance(row, dict) or row["shapes"]:
            yield row
    yield from (*coco.strays, *unclear)


def _is_panoptic(coco: CocoFile) -> bool:
    """Whether the first sound annotation is of a segment map."""
    for number in filter(coco.is_annotated, coco.images):
        with suppress(ValueError):
            return any("segments" in entry for entry in coco.annotations(number))
    return False


def _row(coco: CocoFile, number: Any, image: dict[str, Any], names: list[str], boxes: str) -> dict[str, Any]:
    where = coco.place("image", number)
    png = None  # segment map of a panoptic file
    shapes = []
    for entry in coco.annotations(number):
        png = entry.get("file_name", png)
        for shape in entry.get("segments", [entry]):
            panoptic = "segments" in entry
            place = where if panoptic else coco.place("annotation", shape["id"])
            name = _name(coco.category(shape, place), coco.path, panoptic)
            if name in names:
                segmentation = None if panoptic else outline(shape, place, boxes)
                shapes.append([name, shape["id"], segmentation, shape["iscrowd"]])
    name, size = file_field(image, "file_name", where), size_of(image, where)
    return {"image_id": number, "file_name": name, "size": size, "png": png, "shapes": shapes}


def categories(path: Path) -> Iterator[Any]:
    """[name, whether it is only a group of others] of each category, in the order of the file and as `parse` spells it.

    A group has no annotations and is the supercategory of others, such as the first entry of Roboflow's exports.
    """
    entries = []
    panoptic = False
    used = set()  # ids, as text: a file may spell them in two ways
    for key, entry in read_entries(path):
        if key == "categories":
            entries.append(entry)
        elif key == "annotations" and isinstance(entry, dict):
            panoptic |= "segments_info" in entry
            shapes = entry.get("segments_info", [entry])
            used |= {str(shape.get("category_id")) for shape in shapes if isinstance(shape, dict)}
    names = [_name(entry, path, panoptic) for entry in entries]
    members = Counter(str(entry.get("supercategory")) for entry in entries)
    for entry, name in zip(entries, names, strict=True):
        others = members[str(entry["name"])] - (entry.get("supercategory") == entry["name"])
        yield [name, others > 0 and str(entry.get("id")) not in used]


def read_segments(path: Path, size: Size) -> np.ndarray:
    """(H, W) int32 segment ids of a panoptic PNG: R + 256 G + 65536 B."""
    with open_image(path, "segment map") as image:
        turned = upright(image)
        found, pixels = turned.size[::-1], turned.convert("RGB").tobytes("raw", "RGBX")  # four bytes per pixel
    if found != size:
        raise ValueError(f"{path}: the segment map is {found}, the image (H, W) {size}")
    return (np.frombuffer(pixels, "<u4").reshape(size) & 0xFFFFFF).view(np.int32)


def segments_mask(segments: CachedMask, numbers: tuple[int, ...], path: Path) -> np.ndarray:
    """(H, W) bool: the union of these segments; ValueError if it has no pixel."""
    ids = segments()
    mask = np.logical_or.reduce([ids == number for number in numbers])  # faster than np.isin, for a few numbers
    if not mask.any():
        raise ValueError(f"{path}: has no pixel of the segments {', '.join(map(str, numbers))}")
    return mask


def _trim_annotation(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """What is needed of an annotation: its shape, or the name of a segment map with its segments."""
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
    return {"file_name": file_field(annotation, "file_name", where), "segments": segments}


def _name(category: dict[str, Any], path: Path, panoptic: bool) -> str:
    """The lower-case name of a category; of panoptic ones without "-merged" and the like."""
    where = f"{path}: category {category.get('id') if isinstance(category, dict) else category!r}"
    name = name_of(field(category, "name", where), "name", where).lower()
    if not name:
        raise ValueError(f"{where}: its name is empty")
    return SUFFIX.sub("", name) if panoptic else name


def _union_mask(shapes: list[Any], size: Size, where: str) -> CachedMask:
    return CachedMask(partial(rasterize, [shape[2] for shape in shapes], size, "union", where), where)


def _numbers(shapes: list[Any]) -> str:
    return "annotation " + ", ".join(str(shape[1]) for shape in shapes)


def _pixels_of_others(join: Callable, groups: dict[str, list[Any]], size: Size) -> MaskFn:
    """The pixels that belong to none of the groups, as a lazy mask."""
    shapes = [shape for group in groups.values() for shape in group]
    return partial(_invert, join(shapes)) if shapes else partial(np.ones, size, bool)


def _invert(mask: MaskFn) -> np.ndarray:
    return ~mask()
