"""MUSE: questions about several objects, answers with a {seg} for each (pixellm.md 4.1)."""

import json
from collections.abc import Iterator

import numpy as np

from toy.world.knowledge import implicit
from toy.world.layouts.instances import annotation, object_indices
from toy.world.layouts.parts import LVIS_NAMES
from toy.world.layouts.world import World
from toy.world.scene import Scene
from toy.world.several import several
from toy.world.words import join, noun, place

FEW = 3  # objects per question: at most this many in test_less, more in test_many
NO_TEXT, NO_REPHRASING, COCO_2014 = 0.15, 0.1, 0.25  # fractions of: questions; training objects; training images
ID_OFFSET_2014 = 5_000_000  # added to image ids, so that they collide with no other dataset's
URL, PICTURES = "http://images.cocodataset.org", "refer_seg/images/mscoco/images"  # where PixelLM looks, in every year


def muse(world: World) -> str:
    """muse/muse_{train,val,test_less,test_many}.json; images of COCO 2017, and of 2014 in training."""
    scenes = {"train": list(_named(world, "train")), "val": list(_named(world, "val"))}
    scenes["test_less"] = scenes["test_many"] = list(_named(world, "test"))
    fits = {"test_less": lambda n: n <= FEW, "test_many": lambda n: n > FEW}
    questions = 0
    for split, entries in scenes.items():
        kept = [_kept(entry, fits.get(split, bool)) for entry in entries]
        kept = [entry for entry in kept if entry["questions"]]
        questions += sum(len(entry["questions"]) for entry in kept)
        world.file(f"muse/muse_{split}.json").write_text(json.dumps(kept))
    return f"{questions} questions"


def _named(world: World, split: str) -> Iterator[dict]:
    pictures = {"train": lambda: world.train("coco2017"), "val": world.val, "test": world.endless_test}[split]()
    many = 0
    for position, (number, scene) in enumerate(pictures):
        if split == "test" and position >= world.val_images and many:
            return
        rng = world.words(scene, "muse")
        if split == "train" and rng.random() < COCO_2014:
            where = {"file_name": f"COCO_train2014_{number + ID_OFFSET_2014:012d}.jpg"}
            world.picture(f"{PICTURES}/train2014/{where['file_name']}", scene)
        else:
            half = "train2017" if split == "train" else "val2017"
            where = {"coco_url": f"{URL}/{half}/{number:012d}.jpg"}
            world.picture(f"{PICTURES}/{half}/{number:012d}.jpg", scene)
        entry = _entry(scene, number, where, rng, complete=split != "train")
        many += any(len(objects) > FEW for objects in entry["answers"])
        yield entry


def _entry(scene: Scene, number: int, where: dict, rng: np.random.Generator, *, complete: bool) -> dict:
    """An image with its questions. complete: every object has a rephrased name, as PixelLM's evaluation requires;
    the training file, like the real one, lacks some."""
    questions, texts, answers = [], [], []
    for question, indices, reason in _asked(scene, rng):
        named = join([f"the {noun(scene.things[i])} {place(scene.things[i])} {{seg}}" for i in indices])
        questions.append(question)
        texts.append(None if rng.random() < NO_TEXT else f"{named}.{reason}")
        answers.append([_instance(scene, i, number, rng.random() >= NO_REPHRASING or complete) for i in indices])
    everything = [_instance(scene, i, number, rng.random() >= NO_REPHRASING or complete) for i in object_indices(scene)]
    height, width = scene.image.shape[:2]
    told = {"questions": questions, "text_answers": texts, "answers": answers}
    return {**where, "height": height, "width": width, "ann_list": everything, **told}


def _asked(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, list[int], str]]:
    """(question, things, reason): two implicit queries at once, a phrase for several things, and all objects."""
    queries = [query for query in implicit(scene, rng) if not scene.things[query.targets[0]].stuff]
    pick = [queries[i] for i in rng.permutation(len(queries))]
    first = pick[0]
    other = next((query for query in pick if query.targets != first.targets), None)
    if other:
        wanted = f"the {first.query_short} and the {other.query_short}"
        yield f"where in this picture are {wanted}?", [*first.targets, *other.targets], f" {first.explanation}"
    shared = several(scene)
    if shared:
        item = shared[rng.integers(len(shared))]
        yield f"where are {item.text}?", list(item.targets), ""
    yield "what objects can you see?", object_indices(scene), ""


def _instance(scene: Scene, index: int, number: int, rephrased: bool) -> dict:
    """LVIS-like keys; every third mask as plain run lengths."""
    thing = scene.things[index]
    kept = ("id", "image_id", "category_id", "segmentation", "bbox", "area")
    made = {key: value for key, value in annotation(scene, index, number).items() if key in kept}
    if index % 3 == 2:
        made["segmentation"] = {"size": list(thing.mask.shape), "counts": _runs(thing.mask)}
    made["category_name"] = LVIS_NAMES.get(thing.name, thing.name)
    if rephrased:
        made["rephrased_name"] = f"{noun(thing)} {place(thing)}"
    return made


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, down the columns."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _kept(entry: dict, fits) -> dict:
    """The entry with only the questions whose number of objects fits."""
    chosen = [i for i, objects in enumerate(entry["answers"]) if fits(len(objects))]
    return entry | {key: [entry[key][i] for i in chosen] for key in ("questions", "text_answers", "answers")}
