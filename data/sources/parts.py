"""Parts of objects in COCO-style files: PACO-LVIS, PASCAL-Part (lisa.md 4.3, lasagna.md 5.7) and PartImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.readers.coco_file import CocoFile, outline, rasterize, read_coco, shape_of, size_of
from data.sources.base import (
    SOURCES,
    attempt,
    choice,
    field,
    file_below,
    file_field,
    indexed_rows,
    locate,
    name_of,
    read_entries,
)
from data.types import Record, Target
from utils.masks import CachedMask

SPLITS = ("train", "val", "test")
INSTANCES = ("union", "separate")
NAMES = ("plain", "published")


class Parts:
    """One record per image: objects ("car") and parts ("car wheel", with the alias "the wheel of the car").

    instances: "union" makes one target per name, with all its annotations; "separate" makes one per annotation, as LISA
        trains.
    names: "published" keeps the underscores of names ("trash_can"; lisa.md 4.3), "plain" makes them blanks.
    """

    def __init__(self, root: Path, file: Path, folder: Path, instances: str, names: str):
        self._union = choice("instances of a part set", instances, INSTANCES) == "union"
        self._names = choice("names of a part set", names, NAMES)
        self._folder = folder
        self.files = (file,)
        self._rows = indexed_rows(root, parse, self.files, image_key="file_name")
        aliases = {self._phrase(*row): self._alias(*row) for row in indexed_rows(root, categories, self.files)}
        self.vocabulary = tuple(aliases)
        self._aliases = tuple(aliases.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for whole, part, number, segmentation in row["annotations"]:
            name = (self._phrase(whole, part), self._alias(whole, part))
            groups.setdefault(name if self._union else (*name, number), []).append((number, segmentation))
        targets = []
        for (phrase, aliases, *_), members in groups.items():
            where = f"{self.files[0]}: annotation {', '.join(str(number) for number, _ in members)}"
            mask = CachedMask(
                partial(rasterize, [shape for _, shape in members], tuple(row["size"]), "union", where), where
            )
            targets.append(Target(phrase, mask, aliases=aliases))
        image = file_below(self._folder, row["file_name"], f"{self.files[0]}: image {row['image_id']}")
        return Record(image, "classes", tuple(targets), self.vocabulary, vocabulary_aliases=self._aliases)

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]

    def _phrase(self, whole: str, part: str | None) -> str:
        return self._spell(f"{whole} {part}" if part else whole)

    def _alias(self, whole: str, part: str | None) -> tuple[str, ...]:
        return (self._spell(f"the {part} of the {whole}"),) if part else ()

    def _spell(self, name: str) -> str:
        return name.replace("_", " ") if self._names == "plain" else name


@SOURCES.register("paco_lvis")
def paco_lvis(root: Path, split: str = "train", instances: str = "union", names: str = "plain") -> Parts:
    """Categories `object` and `object:part`; a file name starts with its COCO folder (`train2017/...`)."""
    name = f"paco_lvis_v1_{choice('split of paco_lvis', split, SPLITS)}.json"
    (file,) = locate(
        root, f"paco_lvis {split}", *((f"{base}/{name}",) for base in ("vlpart/paco/annotations", "paco_lvis_v1"))
    )
    (folder,) = locate(root, "images of paco_lvis", ("coco",))
    return Parts(root, file, folder, instances, names)


@SOURCES.register("pascal_part")
def pascal_part(root: Path, split: str = "train", instances: str = "union", names: str = "plain") -> Parts:
    """Categories `object:part`, images of VOC 2010."""
    choice("split of pascal_part", split, SPLITS)
    (file,) = locate(
        root, f"pascal_part {split}", *((f"{base}/{split}.json",) for base in ("vlpart/pascal_part", "pascal_part"))
    )
    voc = "VOCdevkit/VOC2010/JPEGImages"
    (folder,) = locate(root, "images of pascal_part", (f"vlpart/pascal_part/{voc}",), (f"pascal_part/{voc}",), (voc,))
    return Parts(root, file, folder, instances, names)


@SOURCES.register("partimagenet")
def partimagenet(root: Path, split: str = "train", instances: str = "union", names: str = "plain") -> Parts:
    """Categories `Quadruped Head` of the supercategory `Quadruped`, as the dataset is distributed."""
    choice("split of partimagenet", split, SPLITS)
    bases = ("vlpart/partimagenet", "partimagenet", "PartImageNet")
    places = [(f"{base}/annotations/{split}.json", f"{base}/images/{split}") for base in bases]
    file, folder = locate(root, f"partimagenet {split}", *places)
    return Parts(root, file, folder, instances, names)


def parse(path: Path) -> Iterator[Any]:
    """A row per image with annotations, which are [object, part or None, annotation id, segmentation]."""
    coco = read_coco(path, shape_of)
    names = {number: split_name(entry, path) for number, entry in coco.categories.items()}
    for number, image in coco.images.items():
        if coco.is_annotated(number):
            yield attempt(partial(_row, coco, number, image, names), image.get("file_name"))
    yield from coco.strays


def _row(coco: CocoFile, number: Any, image: dict[str, Any], names: dict[Any, tuple[str, str | None]]) -> Any:
    shapes = []
    for entry in coco.annotations(number):
        place = coco.place("annotation", entry["id"])
        category = coco.categories.key(entry["category_id"], "category", place)
        shapes.append([*names[category], entry["id"], outline(entry, place)])
    where = coco.place("image", number)
    name, size = file_field(image, "file_name", where), size_of(image, where)
    return {"image_id": number, "file_name": name, "size": size, "annotations": shapes}


def categories(path: Path) -> Iterator[list[str | None]]:
    """[object, part or None] of every category, in the order of the file."""
    for key, entry in read_entries(path):
        if key == "categories":
            yield list(split_name(entry, path))


def split_name(category: dict[str, Any], path: Path) -> tuple[str, str | None]:
    """("car", "wheel") of `car_(automobile):wheel`, or of `Car Wheel` with the supercategory `Car`; lower case."""
    where = f"{path}: category {category.get('id') if isinstance(category, dict) else category!r}"
    name = name_of(field(category, "name", where), "name", where).lower()
    above = str(category.get("supercategory") or "").strip().lower()
    if ":" not in name and above and name.startswith(f"{above} "):
        name = f"{above}:{name[len(above) :].strip()}"
    whole, _, part = (piece.partition("_(")[0].strip() for piece in name.partition(":"))
    if not whole:
        raise ValueError(f"{where}: the name {category['name']!r} has no object")
    return whole, part or None
