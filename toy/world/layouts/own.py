"""Layouts for custom data: COCO instances and panoptic files, a folder of label maps, a file of queries."""

import json

import numpy as np
from PIL import Image

from toy.world.expressions import expressions
from toy.world.knowledge import implicit
from toy.world.layouts.instances import annotation, annotation_id, bbox, categories, category_id, image_entry
from toy.world.layouts.world import World
from toy.world.polygons import coco_polygons, rle
from toy.world.scene import CLASSES, STUFF, Scene
from toy.world.several import false_premises

CROWD = 3  # this many objects of a class or more are one crowd in the instances file


def coco(world: World) -> str:
    """coco/annotations/{instances,panoptic}_{train,val}2017.json, and the panoptic PNGs."""
    segments = 0
    plain_categories = categories()
    stuff_ids = {category_id(name) for name in STUFF}
    panoptic_categories = [entry | {"isthing": int(entry["id"] not in stuff_ids)} for entry in plain_categories]
    for split, scenes in (("train", world.train("coco2017")), ("val", world.val())):
        images, things, panoptic = [], [], []
        for number, scene in scenes:
            name = f"{number:012d}"
            world.picture(f"coco/{split}2017/{name}.jpg", scene)
            images.append(image_entry(scene, number, f"{name}.jpg"))
            things += _instances(scene, number)
            panoptic.append(_panoptic(world, scene, number, f"coco/annotations/panoptic_{split}2017", f"{name}.png"))
            segments += len(panoptic[-1]["segments_info"])
        files = (("instances", things, plain_categories), ("panoptic", panoptic, panoptic_categories))
        for kind, entries, kind_categories in files:
            data = {"images": images, "annotations": entries, "categories": kind_categories}
            world.file(f"coco/annotations/{kind}_{split}2017.json").write_text(json.dumps(data))
    return f"{segments} segments"


def _instances(scene: Scene, number: int) -> list[dict]:
    """Objects as polygons; a class of CROWD objects or more is one crowd with compressed run lengths."""
    entries = []
    names = [thing.name for thing in scene.things]
    for index, thing in enumerate(scene.things):
        if thing.stuff:
            continue
        if names.count(thing.name) < CROWD:
            entries.append(annotation(scene, index, number))
        elif names.index(thing.name) == index:
            mask = np.logical_or.reduce([other.mask for other in scene.things if other.name == thing.name])
            entries.append(annotation(scene, index, number) | {"segmentation": rle(mask), "iscrowd": 1})
    return entries


def _panoptic(world: World, scene: Scene, number: int, folder: str, file_name: str) -> dict:
    """The PNG and its entry; a segment's id is R + 256 G + 65536 B."""
    ids = np.zeros(scene.image.shape[:2], np.uint32)
    infos = []
    for index, thing in enumerate(scene.things):
        segment = annotation_id(number, index) * 7 % (1 << 24) + 1  # spread, so that all three bytes are in use
        ids[thing.mask] = segment
        own = {"id": segment, "category_id": category_id(thing.name), "iscrowd": 0}
        infos.append(own | {"bbox": bbox(thing), "area": int(thing.mask.sum())})
    colors = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=2).astype(np.uint8)
    Image.fromarray(colors).save(world.file(f"{folder}/{file_name}"))
    return {"image_id": number, "file_name": file_name, "segments_info": infos}


def folder(world: World) -> str:
    """my_folder/{images,masks}/{train,val} and classes.txt: label value k + 1 is class k."""
    pictures = 0
    world.file("my_folder/classes.txt").write_text("".join(f"{k}: {name}\n" for k, name in enumerate(CLASSES, start=1)))
    for split, scenes in (("train", world.train("cityscapes")), ("val", world.val())):
        for number, scene in scenes:
            world.picture(f"my_folder/images/{split}/photo {number}.jpg", scene)
            labels = np.zeros(scene.image.shape[:2], np.uint8)
            for thing in scene.things:
                labels[thing.mask] = 1 + CLASSES.index(thing.name)
            Image.fromarray(labels).save(world.file(f"my_folder/masks/{split}/photo {number}.png"))
            pictures += 1
    return f"{pictures} pictures, {len(CLASSES)} classes"


def jsonl(world: World) -> str:
    """my_queries/{train,val}.jsonl next to the images: phrases and questions, with every way to give a mask."""
    lines = 0
    for split, scenes in (("train", world.train("cityscapes")), ("val", world.val())):
        with world.file(f"my_queries/{split}.jsonl").open("w", encoding="utf-8") as file:
            for number, scene in scenes:
                name = f"{split}/{number}.jpg"
                world.picture(f"my_queries/{name}", scene)
                for entry in _queries(world, scene, name):
                    file.write(json.dumps({"image": name, **entry}) + "\n")
                    lines += 1
    return f"{lines} lines"


def _queries(world: World, scene: Scene, name: str) -> list[dict]:
    rng = world.words(scene, "jsonl")
    items, queries = expressions(scene), implicit(scene, rng)
    wrong = false_premises(scene, items, rng)
    entries = []
    for shape, i in zip(("polygons", "rle", "mask"), rng.permutation(len(items)), strict=False):
        mask = scene.things[items[i].targets[0]].mask
        entries.append({"phrase": items[i].text, shape: _shape(world, shape, mask, f"{name[:-4]}_{i}.png")})
    for i in rng.permutation(len(wrong))[:1]:
        entries.append({"phrase": wrong[i].text, "mask": None, "answer": wrong[i].truth.text})
    for query in queries[:1]:
        mask = np.logical_or.reduce([scene.things[i].mask for i in query.targets])
        entries.append({"question": query.query_long, "polygons": coco_polygons(mask), "answer": query.explanation})
    return entries


def _shape(world: World, kind: str, mask: np.ndarray, file_name: str) -> list | dict | str:
    if kind == "mask":
        Image.fromarray(mask).save(world.file(f"my_queries/{file_name}"))
        return file_name
    return coco_polygons(mask) if kind == "polygons" else rle(mask)
