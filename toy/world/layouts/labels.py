"""Names and label values of the toy classes in the real data sets."""

import re
from functools import cache
from pathlib import Path

import numpy as np

from toy.world.scene import CLASSES, Scene

TABLES = Path(__file__).resolve().parents[3] / "data" / "labels"
MAPILLARY_TABLE = Path(__file__).with_name("mapillary_v2.txt")

OTHER_NAMES: dict[str, dict[str, str]] = {  # toy class -> the real name, where they differ; "": the set lacks the class
    "ade20k": {"fish": "animal"},
    "cocostuff": {"ball": "sports ball", "lamp": "light", "water": "water-other", "fish": "", "flag": ""},
    "cityscapes": {"house": "building", "tree": "vegetation", "grass": "terrain"},
    "pascal_context": {"house": "building", "airplane": "aeroplane", "lamp": "light"},
    "pascal_voc": {"airplane": "aeroplane"},
    "mapillary": {"house": "building", "tree": "vegetation", "flower": "vegetation", "grass": "terrain"},
}


@cache
def label_values(dataset: str) -> dict[str, int]:
    """Toy class -> label value, for the classes that the data set has, in order of value."""
    values = {name: value for value, name in reversed(label_table(dataset))}
    renamed = {name: OTHER_NAMES[dataset].get(name, name) for name in CLASSES}
    toy_values = {name: values[real] for name, real in renamed.items() if real in values}
    return dict(sorted(toy_values.items(), key=lambda item: item[1]))


@cache
def label_table(dataset: str) -> list[tuple[int, str]]:
    """(label value, lower-case real name) of the whole data set."""
    if dataset == "mapillary":
        return [(value, readable.lower()) for value, (_, readable) in enumerate(mapillary_table())]
    lines = (TABLES / f"{dataset}.txt").read_text(encoding="utf-8").splitlines()
    return [(int(value), name) for value, _, name in (line.partition(" ") for line in lines)]


@cache
def mapillary_table() -> list[tuple[str, str]]:
    """(name, readable) of the 124 labels of Mapillary Vistas v2.0, in order of value."""
    lines = MAPILLARY_TABLE.read_text(encoding="utf-8").splitlines()
    return [(name, readable) for name, _, readable in (line.partition(" ") for line in lines)]


def mapillary_names_v1() -> list[str]:
    """The 66 readable names of Mapillary Vistas v1.2, the last one "Unlabeled", in order of value."""
    return MAPILLARY_TABLE.with_name("mapillary_v1.txt").read_text(encoding="utf-8").splitlines()


def real_names(dataset: str) -> list[str]:
    """The data set's names of the toy classes, in order of label value, without the suffixes of COCO-Stuff."""
    names = dict(label_table(dataset))
    return [re.sub("-(merged|other|stuff)$", "", names[value]) for value in sorted(set(label_values(dataset).values()))]


def label_map(scene: Scene, dataset: str, unlabelled: int) -> np.ndarray:
    """(H, W) uint8 label values of the scene."""
    labels = np.full(scene.image.shape[:2], unlabelled, np.uint8)
    values = label_values(dataset)
    for thing in scene.things:
        if thing.name in values:
            labels[thing.mask] = values[thing.name]
    return labels
