"""Writes a referring set: images, refs and instances.json, in the REFER toolkit's layout (lisa.md 4.4)."""

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from toy.world.expressions import Expression
from toy.world.layouts.instances import annotation, annotation_id, categories, category_id, image_entry, object_indices
from toy.world.layouts.world import World
from toy.world.scene import Scene

SENTENCES = 3  # at most per object
LETTERED = {"testAB": {"testA", "testB"}, "testABC": {"testA", "testB", "testC"}}
ANIMALS = {"fish"}

Phrases = Callable[[Scene], list[Expression]]
Refs = Callable[[Scene, list[Expression], np.random.Generator], Iterator[dict]]  # things by index; see `one_object`


def one_object(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[dict]:
    """A ref for every object that has an expression: `thing`, an index or a list of them, and `sentences`."""
    for index in object_indices(scene):
        texts = [item.text for item in items if item.targets == (index,)]
        if texts:
            chosen = [texts[i] for i in rng.permutation(len(texts))[:SENTENCES]]
            yield {"thing": index, "sentences": [{"sent": text} for text in chosen]}


@dataclass(frozen=True)
class RefSet:
    """A referring set: its folder below refer_seg, the names of its refs file (all are written), phrases and refs."""

    name: str
    files: tuple[str, ...]
    phrases: Phrases
    refs: Refs = one_object
    tests: str = "testAB"  # test splits: a key of LETTERED, or the name of the only one
    pool: str = "coco2014"
    val2014: bool = False  # images of val and test are of COCO's val2014, but lie in train2014, where GSVA looks


def write_refs(world: World, refset: RefSet) -> str:
    """Write images, refs files and `instances.json` of one set."""
    images, annotations, refs = [], [], []
    for split, number, scene in _pictures(world, refset):
        folder, file_name = _place(refset, split, number)
        world.picture(f"refer_seg/images/{folder}/{file_name}", scene)
        images.append(image_entry(scene, number, file_name))
        as_rle = refset.pool == "saiapr"
        annotations += [annotation(scene, i, number, as_rle=as_rle) for i in object_indices(scene)]
        made = refset.refs(scene, refset.phrases(scene), world.words(scene, refset.name))
        refs += [_released(ref, scene, number, split, file_name) for ref in made]
    _count(refs)
    instances = {"images": images, "annotations": annotations, "categories": categories()}
    world.file(f"refer_seg/{refset.name}/instances.json").write_text(json.dumps(instances))
    for file in refset.files:
        data = json.dumps(refs).encode() if file.endswith(".json") else pickle.dumps(refs, protocol=2)
        world.file(f"refer_seg/{refset.name}/{file}").write_bytes(data)
    return f"{len(images)} pictures, {len(refs)} objects, {sum(len(ref['sentences']) for ref in refs)} sentences"


def _pictures(world: World, refset: RefSet) -> Iterator[tuple[str, int, Scene]]:
    """(split, image id, scene); test scenes continue until every test split has an object."""
    for split, pictures in (("train", world.train(refset.pool)), ("val", world.val())):
        yield from ((split, number, scene) for number, scene in pictures)
    missing = LETTERED.get(refset.tests, {refset.tests}).copy()
    for position, (number, scene) in enumerate(world.endless_test()):
        if position >= world.val_images and not missing:
            return
        missing -= {_split(refset.tests, scene, item.targets) for item in refset.phrases(scene)}
        yield refset.tests, number, scene


def _split(split: str, scene: Scene, things: tuple[int, ...]) -> str:
    """testA has people; testB everything else, without the animals where there is a testC, which has them."""
    if split not in LETTERED:
        return split
    names = {scene.things[index].name for index in things}
    if "person" in names:
        return "testA"
    return "testC" if "testC" in LETTERED[split] and names & ANIMALS else "testB"


def _released(ref: dict, scene: Scene, number: int, split: str, file_name: str) -> dict:
    """The entry of the refs file without the ids that `_count` adds; a list of things gives lists of annotations."""
    things = ref.pop("thing")
    listed = things if isinstance(things, list) else [things]
    ids, kinds = ([f(i) for i in listed] for f in (lambda i: annotation_id(number, i), lambda i: _kind(scene, i)))
    if listed is things:
        none = ref.pop("none", [])  # what the set writes for no target
        own, name = {"ann_id": ids or none, "category_id": kinds or none}, file_name
    else:
        own, name = {"ann_id": ids[0], "category_id": kinds[0]}, _ref_file_name(file_name, ids[0])
    sentences = [{"raw": said["sent"], "tokens": said["sent"].split(), **said} for said in ref.pop("sentences")]
    seen = tuple(listed) or tuple(object_indices(scene))
    where = {"image_id": number, "split": _split(split, scene, seen), "file_name": name}
    return {**own, **where, **ref, "sentences": sentences}


def _kind(scene: Scene, index: int) -> int:
    return category_id(scene.things[index].name)


def _count(refs: list[dict]) -> None:
    """Number refs and sentences."""
    sentence = iter(range(1, 1 << 40))
    for number, ref in enumerate(refs, start=1):
        ref["ref_id"] = number
        for said in ref["sentences"]:
            said["sent_id"] = next(sentence)
        ref["sent_ids"] = [said["sent_id"] for said in ref["sentences"]]


def _place(refset: RefSet, split: str, number: int) -> tuple[str, str]:
    """(folder below refer_seg/images, file name)."""
    if refset.pool == "saiapr":
        return "saiapr_tc-12", f"{number % 10:02d}/images/{number}.jpg"
    half = "val2014" if refset.val2014 and split != "train" else "train2014"
    return "mscoco/images/train2014", f"COCO_{half}_{number:012d}.jpg"


def _ref_file_name(file_name: str, annotation: int) -> str:
    """A ref's own `file_name` carries the annotation, as in the released files; the image's name does not."""
    return f"{file_name.rpartition('/')[2].removesuffix('.jpg')}_{annotation}.jpg"
