"""Referring sets in the REFER toolkit's files: RefCOCO, RefCOCO+, RefCOCOg and RefCLEF (lisa.md 4.4)."""

import json
import pickle
from collections.abc import Callable, Iterator

import numpy as np

from toyworld.expressions import POSITIONAL, Expression, expressions
from toyworld.layouts.labels import label_table, label_values
from toyworld.layouts.world import World
from toyworld.polygons import coco_polygons, rle
from toyworld.scene import CLASSES, Scene
from toyworld.words import noun

SENTENCES = 3  # at most, for one object
THINGS_PER_PICTURE = 16  # room for annotation ids
FIRST_TOY_CATEGORY = 201  # for classes that COCO does not have

Phrases = Callable[[Scene], list[Expression]]


def refcoco(world: World) -> str:
    """Short phrases, words of position among them."""
    return _write(world, "refcoco", "unc", "coco2014", _phrases, "testAB")


def refcoco_plus(world: World) -> str:
    """Short phrases without any word of position."""
    return _write(world, "refcoco+", "unc", "coco2014", _looks_only, "testAB")


def refcocog(world: World) -> str:
    """Whole descriptions: looks and relation."""
    return _write(world, "refcocog", "umd", "coco2014", _descriptions, "test")


def refclef(world: World) -> str:
    """Short phrases; masks as lists of run lengths, pictures in nested folders."""
    return _write(world, "refclef", "unc", "saiapr", _phrases, "testAB")


def _phrases(scene: Scene) -> list[Expression]:
    return [Expression(item.text.removeprefix("the "), item.targets, item.kind) for item in expressions(scene)]


def _looks_only(scene: Scene) -> list[Expression]:
    return [item for item in _phrases(scene) if item.kind not in POSITIONAL]


def _descriptions(scene: Scene) -> list[Expression]:
    """ "the large red car left of the house": a relation that holds for one object, and how that object looks."""
    found = []
    for item in expressions(scene):
        thing = scene.things[item.targets[0]]
        if item.kind == "relation":
            text = item.text.replace(thing.name, noun(thing, size=True), 1)
            found.append(Expression(text, item.targets, item.kind))
    return found


def _write(world: World, name: str, split_by: str, pool: str, phrases: Phrases, tests: str) -> str:
    """Write pictures, `refs(<split_by>).p` and `instances.json` of one set."""
    images, annotations, refs = [], [], []
    for split, number, scene in _pictures(world, pool, tests, phrases):
        file_name = _file_name(pool, number)
        world.picture(f"refer_seg/images/{_folder(pool)}/{file_name}", scene)
        height, width = scene.image.shape[:2]
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        annotations += [_annotation(scene, i, number, pool) for i in _objects(scene)]
        refs += _refs(scene, phrases(scene), number, split, world.words(scene, name))
    counter = iter(range(1, 1 << 40))
    for ref_id, ref in enumerate(refs, start=1):
        ref["ref_id"] = ref_id
        ref["file_name"] = _ref_file_name(pool, ref["image_id"], ref["ann_id"])
        for sentence in ref["sentences"]:
            sentence["sent_id"] = next(counter)
        ref["sent_ids"] = [sentence["sent_id"] for sentence in ref["sentences"]]
    instances = {"images": images, "annotations": annotations, "categories": _categories()}
    world.file(f"refer_seg/{name}/instances.json").write_text(json.dumps(instances))
    world.file(f"refer_seg/{name}/refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    return f"{len(images)} pictures, {len(refs)} objects, {sum(len(ref['sentences']) for ref in refs)} sentences"


def _pictures(world: World, pool: str, tests: str, phrases: Phrases) -> Iterator[tuple[str, int, Scene]]:
    """(split, picture id, scene); the test pictures go on until every test split has an object."""
    for split, pictures in (("train", world.train(pool)), ("val", world.val())):
        yield from ((split, number, scene) for number, scene in pictures)
    missing = {"testA", "testB"} if tests == "testAB" else {tests}
    for position, (number, scene) in enumerate(world.endless_test()):
        if position >= world.val_images and not missing:
            return
        missing -= {_split(tests, scene, item.targets[0]) for item in phrases(scene)}
        yield tests, number, scene


def _split(split: str, scene: Scene, index: int) -> str:
    """testA holds people, testB everything else."""
    if split != "testAB":
        return split
    return "testA" if scene.things[index].name == "person" else "testB"


def _refs(scene: Scene, items: list[Expression], number: int, split: str, rng: np.random.Generator) -> Iterator[dict]:
    for index in _objects(scene):
        texts = [item.text for item in items if item.targets == (index,)]
        if not texts:
            continue
        chosen = [texts[i] for i in rng.permutation(len(texts))[:SENTENCES]]
        yield {
            "ann_id": number * THINGS_PER_PICTURE + index,
            "image_id": number,
            "category_id": _category(scene.things[index].name),
            "split": _split(split, scene, index),
            "sentences": [{"raw": text, "sent": text, "tokens": text.split()} for text in chosen],
        }


def _annotation(scene: Scene, index: int, number: int, pool: str) -> dict:
    thing = scene.things[index]
    x0, y0, x1, y1 = thing.box
    return {
        "id": number * THINGS_PER_PICTURE + index,
        "image_id": number,
        "category_id": _category(thing.name),
        "segmentation": [rle(thing.mask)] if pool == "saiapr" else coco_polygons(thing.mask),
        "area": int(thing.mask.sum()),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "iscrowd": 0,
    }


def _objects(scene: Scene) -> list[int]:
    return [index for index, thing in enumerate(scene.things) if not thing.stuff]


def _category(name: str) -> int:
    """COCO's id, which is one more than COCO-Stuff's label value."""
    values = label_values("cocostuff")
    return values[name] + 1 if name in values else FIRST_TOY_CATEGORY + CLASSES.index(name)


def _categories() -> list[dict]:
    names = dict(label_table("cocostuff"))
    entries = ((_category(name), names.get(_category(name) - 1, name)) for name in CLASSES)
    return [{"id": value, "name": name, "supercategory": "toy"} for value, name in sorted(entries)]


def _folder(pool: str) -> str:
    return "saiapr_tc-12" if pool == "saiapr" else "mscoco/images/train2014"


def _file_name(pool: str, number: int) -> str:
    return f"{number % 10:02d}/images/{number}.jpg" if pool == "saiapr" else f"COCO_train2014_{number:012d}.jpg"


def _ref_file_name(pool: str, number: int, annotation: int) -> str:
    """A ref's own `file_name` carries the annotation, as in the released files; the picture's name does not."""
    stem = f"{number}" if pool == "saiapr" else f"COCO_train2014_{number:012d}"
    return f"{stem}_{annotation}.jpg"
