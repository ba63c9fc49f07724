"""Semantic sets with one label map per image: ADE20K, COCO-Stuff, Cityscapes, Mapillary Vistas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data.sources.base import SOURCES, choice, field, locate, name_of, read_json
from data.sources.semantic import Classes, LabelMaps, Table, pair_files, select_classes, shipped_labels
from utils.log import log

TRAINING = {"train": "training", "val": "validation"}
CITYSCAPES_VOID = frozenset({*range(7), 9, 10, 14, 15, 16, 18, 29, 30, 255})  # 255: licence plates, -1 in its table
COCO_UNUSED = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})  # label values that occur in no image
MAPILLARY_2 = "config_v2.0.json"
MAPILLARY_VERSIONS = ("v1.2", "v2.0")


@SOURCES.register("ade20k")
def ade20k(root: Path, split: str = "train", classes: Classes = None, ignore_unknown: bool = False) -> LabelMaps:
    """ADE20K, 150 classes; label 0 is unlabelled, label k is class k - 1 (lisa.md 4.3)."""
    folder = TRAINING[choice("split of ade20k", split, TRAINING)]
    images, maps = locate(
        root,
        f"ade20k {split}",
        *((f"{base}/images/{folder}", f"{base}/annotations/{folder}") for base in ("ade20k", "ADEChallengeData2016")),
    )
    table = select_classes(Table.of(shipped_labels("ade20k"), void={0}), classes, root)
    return LabelMaps(pair_files(images, maps), (images, maps), table, ignore_unknown)


@SOURCES.register("cocostuff")
def cocostuff(
    root: Path, split: str = "train", table: str = "171", classes: Classes = None, ignore_unknown: bool = False
) -> LabelMaps:
    """COCO-Stuff; label values 0 to 181, 255 unlabelled.

    table: "171" has every class that occurs, without its suffix (-merged, -other, -stuff; lasagna.md 5.4). "182" has
        the names of all label values, and every name with a "-" counts as unlabelled (lisa.md 4.3).
    """
    choice("split of cocostuff", split, ("train", "val"))
    choice("table of cocostuff", table := str(table), ("171", "182"))
    (maps,) = locate(
        root,
        f"cocostuff {split} label maps",
        *((f"{base}/{split}2017",) for base in ("cocostuff", "coco/stuffthingmaps_trainval2017")),
    )
    (images,) = locate(root, f"images of cocostuff {split}", (f"coco/{split}2017",))
    if table == "171":
        void = COCO_UNUSED | {255}
        suffix = re.compile("-(merged|other|stuff)$")
        entries = [(value, suffix.sub("", name)) for value, name in shipped_labels("cocostuff") if value not in void]
    else:
        void = {255} | {value for value, name in shipped_labels("cocostuff") if "-" in name}
        entries = [(value, name) for value, name in shipped_labels("cocostuff") if value not in void]
    names = select_classes(Table.of(entries, void), classes, root)
    return LabelMaps(pair_files(images, maps), (images, maps), names, ignore_unknown)


@SOURCES.register("cityscapes")
def cityscapes(root: Path, split: str = "train", classes: Classes = None, ignore_unknown: bool = False) -> LabelMaps:
    """Cityscapes, the 19 evaluated classes of the labelIds maps; every other id is unlabelled (lasagna.md 5.5)."""
    choice("split of cityscapes", split, ("train", "val"))
    places = (f"cityscapes/leftImg8bit/{split}", f"cityscapes/gtFine/{split}")
    images, maps = locate(root, f"cityscapes {split}", places)
    table = select_classes(Table.of(shipped_labels("cityscapes"), CITYSCAPES_VOID), classes, root)
    pairs = pair_files(images, maps, image_end="_leftImg8bit", map_end="_gtFine_labelIds")
    return LabelMaps(pairs, (images, maps), table, ignore_unknown)


@SOURCES.register("mapillary")
def mapillary(
    root: Path,
    split: str = "train",
    version: str | None = None,
    unlabeled: str | None = None,
    classes: Classes = None,
    ignore_unknown: bool = False,
) -> LabelMaps:
    """Mapillary Vistas v1.2 (65 names; lasagna.md 5.5) or v2.0 (names of config_v2.0.json; lisa.md 4.3).

    version: None takes v1.2 if both are there, and logs which it took.
    unlabeled: "class" treats "unlabeled" as a class, "ignore" leaves it out; None: as published, a class in v2.0 and
        ignored in v1.2.
    """
    folder = TRAINING[choice("split of mapillary", split, TRAINING)]
    versions = MAPILLARY_VERSIONS
    if version is not None:
        versions = (choice("version of mapillary", str(version), MAPILLARY_VERSIONS),)
    places = [place for version in versions for place in _mapillary_places(folder, version)]
    images, maps, names_file = locate(root, f"mapillary {split}", *places)
    old = names_file.name != MAPILLARY_2  # v1.2
    if version is None:
        log.info("mapillary %s: label set %s, of %s", split, "v1.2" if old else "v2.0", names_file)
    names = _mapillary_names(names_file)
    if old and names[-1] != "unlabeled":
        names.append("unlabeled")  # label value 65, which the panoptic file leaves out
    unlabeled = choice("unlabeled of mapillary", unlabeled or ("ignore" if old else "class"), ("class", "ignore"))
    entries = [(value, name) for value, name in enumerate(names) if name != "unlabeled" or unlabeled == "class"]
    void = set(range(len(names))) - {value for value, _ in entries}
    if old:
        void.add(255)
    table = select_classes(Table.of(entries, void), classes, root)
    return LabelMaps(pair_files(images, maps), (images, maps), table, ignore_unknown)


def _mapillary_places(folder: str, version: str) -> Iterator[tuple[str, str, str]]:
    """(images, label maps, file of the names) of every known layout."""
    for base in ("mapillary", "mapillary_vistas"):
        images = f"{base}/{folder}/images"
        if version == "v2.0":
            yield images, f"{base}/{folder}/v2.0/labels", f"{base}/{MAPILLARY_2}"
        else:
            yield images, f"{base}/{folder}/labels", f"{base}/validation/panoptic/panoptic_2018.json"
            yield images, f"{base}/{folder}/labels", f"{base}/config.json"
            yield images, f"{base}/{folder}/v1.2/labels", f"{base}/config_v1.2.json"


def _mapillary_names(path: Path) -> list[str]:
    """Lower-case names in the order of label values, from a config (`readable`) or a panoptic file (`name`)."""
    values = read_json(path)
    kind, key = ("labels", "readable") if "labels" in values else ("categories", "name")
    entries = field(values, kind, str(path), list)
    places = [f"{path}: {kind}[{i}]" for i in range(len(entries))]
    names = [name_of(field(e, key, place), key, place).lower() for e, place in zip(entries, places, strict=True)]
    if not names:
        raise ValueError(f"{path}: the list {kind!r} is empty")
    return names
