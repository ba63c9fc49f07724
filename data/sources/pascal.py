"""Pascal VOC's label maps as class lists for open-vocabulary evaluation: PC-59 (context) and PAS-20 (objects)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.sources.base import SOURCES, Rows, choice, locate
from data.sources.semantic import Classes, LabelMaps, Pairs, Table, select_classes, shipped_labels
from utils.text import read_text

VOID = frozenset({0, 255})  # background, which no list names, and borders
SETS = {  # name -> year, folder of the label maps, folder of the lists of splits
    "pascal_context": ("VOC2010", "SegmentationClassContext", "ImageSets/SegmentationContext"),
    "pascal_voc": ("VOC2012", "SegmentationClass", "ImageSets/Segmentation"),
}


def _set(name: str) -> Callable[..., LabelMaps]:
    def build(root: Path, split: str = "val", classes: Classes = None, ignore_unknown: bool = False) -> LabelMaps:
        """Label k is the k-th class of data/labels; the split is a list of names in ImageSets."""
        choice(f"split of {name}", split, ("train", "val"))
        year, map_folder, lists = SETS[name]
        places = [
            tuple(f"{base}{year}/{part}" for part in ("JPEGImages", map_folder, f"{lists}/{split}.txt"))
            for base in ("VOCdevkit/", "")
        ]
        images, maps, file = locate(root, f"{name} {split}", *places)
        table = select_classes(Table.of(shipped_labels(name), VOID), classes, root)
        return LabelMaps(read_split(images, maps, file), (images, maps), table, ignore_unknown)

    return build


for _name in SETS:
    SOURCES.register(_name)(_set(_name))


def read_split(images: Path, maps: Path, file: Path) -> Pairs:
    """[image, label map] of every name in the list of a split; FileNotFoundError if one of these files is missing."""
    stems = read_text(file).split()
    rows = [[f"{stem}.jpg", f"{stem}.png"] for stem in stems]
    missing = [path for row in rows for path in (images / row[0], maps / row[1]) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{file}: of its {len(stems)} names {len(missing)} files are missing: {missing[0]}, ..."
        )
    if not rows:
        raise ValueError(f"{file} names no image")
    return Pairs(Rows(rows, image_key=0))
