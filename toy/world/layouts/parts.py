"""Parts of objects: PACO-LVIS, PASCAL-Part (lisa.md 4.3) and PartImageNet, all in COCO-style files."""

import json
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from toy.world.layouts.instances import bbox, image_entry
from toy.world.layouts.world import World
from toy.world.polygons import coco_polygons, rle
from toy.world.scene import OBJECTS, PARTS, Scene, Thing

LVIS_NAMES = {"car": "car_(automobile)", "bus": "bus_(vehicle)", "lamp": "lamp_(furniture)"}
Shape = Callable[[np.ndarray], list | dict]


def paco_lvis(world: World) -> str:
    """vlpart/paco/annotations/paco_lvis_v1_{train,val}.json: objects with polygons, parts with run lengths."""
    wholes = [(LVIS_NAMES.get(name, name), "OBJECT") for name in OBJECTS]
    parts = [(f"{LVIS_NAMES.get(name, name)}:{part}", "PART") for name, part in _part_names()]
    numbers = {name: number for number, (name, _) in enumerate(wholes + parts, start=1)}
    categories = [{"id": numbers[name], "name": name, "supercategory": above} for name, above in wholes + parts]

    def shapes(thing: Thing) -> Iterator[tuple[int, np.ndarray, Shape]]:
        name = LVIS_NAMES.get(thing.name, thing.name)
        yield numbers[name], thing.mask, coco_polygons
        yield from ((numbers[f"{name}:{part}"], mask, rle) for part, mask in thing.parts.items())

    made = []
    for split, scenes in (("train", world.train("coco2017")), ("val", world.val())):
        files = ((f"{split}2017/{number:012d}.jpg", number, scene) for number, scene in scenes)
        path = f"vlpart/paco/annotations/paco_lvis_v1_{split}.json"
        made.append(_write(world, path, "coco", files, categories, shapes))
    return " and ".join(made)


def pascal_part(world: World) -> str:
    """vlpart/pascal_part/{train,val}.json: parts only, `object:part`."""
    numbers = {names: number for number, names in enumerate(_part_names(), start=1)}
    categories = [{"id": number, "name": f"{name}:{part}"} for (name, part), number in numbers.items()]
    folder = "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"
    made = []
    for split, scenes in (("train", world.train("ade20k")), ("val", world.val())):
        files = ((f"2010_{number:07d}.jpg", number, scene) for number, scene in scenes)
        made.append(_write(world, f"vlpart/pascal_part/{split}.json", folder, files, categories, _parts_of(numbers)))
    return " and ".join(made)


def partimagenet(world: World) -> str:
    """partimagenet/annotations/{train,val,test}.json: parts only, `Car Wheels` of the supercategory `Car`."""
    numbers = {names: number for number, names in enumerate(_part_names())}
    categories = [
        {"id": number, "name": f"{name} {part}".title(), "supercategory": name.title()}
        for (name, part), number in numbers.items()
    ]
    made = []
    for split, scenes in (("train", world.train("saiapr")), ("val", world.val()), ("test", world.test())):
        files = ((f"n{number % 7:08d}_{number}.JPEG", number, scene) for number, scene in scenes)
        folder, path = f"partimagenet/images/{split}", f"partimagenet/annotations/{split}.json"
        made.append(_write(world, path, folder, files, categories, _parts_of(numbers)))
    return " and ".join(made)


def _part_names() -> list[tuple[str, str]]:
    return [(name, part) for name, parts in PARTS.items() for part in parts]


def _parts_of(numbers: dict[tuple[str, str], int]) -> Callable[[Thing], Iterator[tuple[int, np.ndarray, Shape]]]:
    return lambda thing: ((numbers[thing.name, part], mask, coco_polygons) for part, mask in thing.parts.items())


def _write(
    world: World,
    path: str,
    folder: str,
    files: Iterator[tuple[str, int, Scene]],
    categories: list[dict],
    shapes: Callable[[Thing], Iterator[tuple[int, np.ndarray, Shape]]],
) -> str:
    """Write one annotation file and its images below `folder`."""
    images, annotations, numbers = [], [], count(1)
    for file_name, number, scene in files:
        world.picture(f"{folder}/{file_name}", scene)
        images.append(image_entry(scene, number, file_name))
        for thing in scene.objects:
            for category, mask, shape in shapes(thing):
                own = {"id": next(numbers), "image_id": number, "category_id": category, "segmentation": shape(mask)}
                annotations.append({**own, "area": int(mask.sum()), "bbox": bbox(thing), "iscrowd": 0})
    data = {"images": images, "annotations": annotations, "categories": categories}
    world.file(path).write_text(json.dumps(data))
    return f"{len(images)} pictures, {len(annotations)} masks"
