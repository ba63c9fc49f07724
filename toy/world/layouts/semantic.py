"""Semantic sets: ADE20K, COCO-Stuff, Cityscapes, Mapillary Vistas (lisa.md 4.2-4.3, lasagna.md 5.2), Pascal VOC."""

import colorsys
import json
from collections.abc import Iterator
from itertools import chain

import numpy as np
from PIL import Image

from toy.world.layouts.labels import label_map, label_table, mapillary_names_v1, mapillary_table, real_names
from toy.world.layouts.world import World
from toy.world.scene import Scene

CITIES = {"train": "aachen", "val": "frankfurt"}
COCO_UNLABELLED = 255
MAPILLARY_UNLABELLED = 123


def ade20k(world: World) -> str:
    """ade20k/{images,annotations}/{training,validation}; 0 is unlabelled, class k has value k + 1."""
    folders = {"train": ("training", "ADE_train_{:08d}"), "val": ("validation", "ADE_val_{:08d}")}
    pictures = 0
    for split, number, scene in _both(world, "ade20k"):
        folder, stem = folders[split][0], folders[split][1].format(number)
        world.picture(f"ade20k/images/{folder}/{stem}.jpg", scene)
        _save(label_map(scene, "ade20k", 0), world, f"ade20k/annotations/{folder}/{stem}.png")
        pictures += 1
    return f"{pictures} pictures, {_class_list(world, 'ade20k')} classes"


def cocostuff(world: World) -> str:
    """cocostuff/{train,val}2017/*.png with coco/{train,val}2017/*.jpg; value = official id - 1, 255 unlabelled."""
    pictures = 0
    for split, number, scene in _both(world, "coco2017"):
        world.picture(f"coco/{split}2017/{number:012d}.jpg", scene)
        labels = label_map(scene, "cocostuff", COCO_UNLABELLED)
        _save(labels, world, f"cocostuff/{split}2017/{number:012d}.png")
        pictures += 1
    return f"{pictures} pictures, {_class_list(world, 'cocostuff')} classes"


def cityscapes(world: World) -> str:
    """cityscapes/{leftImg8bit,gtFine}/{train,val}/<city>, labelIds maps, and the categories of the panoptic file."""
    pictures = []
    for split, number, scene in _both(world, "cityscapes"):
        stem = f"{CITIES[split]}_{number:06d}_000019"
        world.picture(f"cityscapes/leftImg8bit/{split}/{CITIES[split]}/{stem}_leftImg8bit.png", scene)
        labels = label_map(scene, "cityscapes", 0)
        _save(labels, world, f"cityscapes/gtFine/{split}/{CITIES[split]}/{stem}_gtFine_labelIds.png")
        size = {"height": labels.shape[0], "width": labels.shape[1]}
        pictures.append((split, {"id": stem, "file_name": f"{stem}_gtFine_leftImg8bit.png", **size}))
    categories = [
        {"id": value, "name": name, "supercategory": "", "isthing": int(value >= 24), "color": _color(value)}
        for value, name in label_table("cityscapes")
    ]
    images = [entry for split, entry in pictures if split == "val"]
    panoptic = {"images": images, "annotations": [], "categories": categories}
    world.file("cityscapes/gtFine/cityscapes_panoptic_val.json").write_text(json.dumps(panoptic))
    return f"{len(pictures)} pictures, {_class_list(world, 'cityscapes')} classes"


def mapillary(world: World) -> str:
    """mapillary/{training,validation}/{images,v1.2/labels,v2.0/labels}, palette PNGs that index `labels` of the
    version's config, as the download has them."""
    tables = {"1.2": [(name, name) for name in mapillary_names_v1()], "2.0": mapillary_table()}
    for version, table in tables.items():
        labels = [
            {"name": name, "readable": readable, "color": _color(i), "evaluate": i < 118, "instances": False}
            for i, (name, readable) in enumerate(table)
        ]
        structure = f"{{split}}/v{version}/{{content}}/{{image_id}}.{{extension}}"
        config = {"version": version, "folder_structure": structure, "labels": labels}
        world.file(f"mapillary/config_v{version}.json").write_text(json.dumps(config, indent=1))
    palette = [channel for value in range(len(tables["2.0"])) for channel in _color(value)]
    old_values = {readable: value for value, (_, readable) in enumerate(tables["1.2"])}
    older = np.array([old_values.get(readable, old_values["Unlabeled"]) for _, readable in tables["2.0"]], np.uint8)
    pictures = 0
    for split, number, scene in _both(world, "mapillary"):
        folder = {"train": "training", "val": "validation"}[split]
        world.picture(f"mapillary/{folder}/images/{number:022d}.jpg", scene)
        indices = label_map(scene, "mapillary", MAPILLARY_UNLABELLED)
        _save(indices, world, f"mapillary/{folder}/v2.0/labels/{number:022d}.png", palette)
        _save(older[indices], world, f"mapillary/{folder}/v1.2/labels/{number:022d}.png", palette)
        pictures += 1
    return f"{pictures} pictures, {_class_list(world, 'mapillary')} classes"


def pascal_context(world: World) -> str:
    """VOCdevkit/VOC2010: JPEGImages, SegmentationClassContext, and the lists of ImageSets/SegmentationContext."""
    return _voc(world, "pascal_context", "VOC2010", "SegmentationClassContext", "SegmentationContext")


def pascal_voc(world: World) -> str:
    """VOCdevkit/VOC2012: JPEGImages, SegmentationClass (palette PNGs), and the lists of ImageSets/Segmentation."""
    return _voc(world, "pascal_voc", "VOC2012", "SegmentationClass", "Segmentation")


def _voc(world: World, dataset: str, year: str, maps: str, lists: str) -> str:
    names: dict[str, list[str]] = {"train": [], "val": []}
    palette = [channel for value in range(256) for channel in _color(value)]
    for split, number, scene in _both(world, "cityscapes"):
        stem = f"{year[3:]}_{number:07d}"
        world.picture(f"VOCdevkit/{year}/JPEGImages/{stem}.jpg", scene)
        _save(label_map(scene, dataset, 0), world, f"VOCdevkit/{year}/{maps}/{stem}.png", palette)
        names[split].append(stem)
    for split, stems in names.items():
        world.file(f"VOCdevkit/{year}/ImageSets/{lists}/{split}.txt").write_text("".join(f"{s}\n" for s in stems))
    return f"{sum(map(len, names.values()))} pictures, {_class_list(world, dataset)} classes"


def _both(world: World, pool: str) -> Iterator[tuple[str, int, Scene]]:
    train = (("train", *picture) for picture in world.train(pool))
    return chain(train, (("val", *picture) for picture in world.val()))


def _class_list(world: World, dataset: str) -> int:
    """Write toy_classes/<dataset>.txt, the classes of the label set that the toy world has; returns their number."""
    names = real_names(dataset)
    world.file(f"toy_classes/{dataset}.txt").write_text("".join(f"{name}\n" for name in names))
    return len(names)


def _save(labels: np.ndarray, world: World, path: str, palette: list[int] | None = None) -> None:
    image = Image.fromarray(labels)
    if palette:
        image.putpalette(palette)
    image.save(world.file(path))


def _color(value: int) -> list[int]:
    """A distinct colour for each label value."""
    channels = colorsys.hsv_to_rgb(value * 0.381966 % 1, 0.55 + 0.4 * (value % 2), 0.95 - 0.2 * (value % 3))
    return [round(255 * channel) for channel in channels]
