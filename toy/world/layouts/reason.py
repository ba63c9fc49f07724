"""ReasonSeg: implicit queries, polygons, explanations, false premises (lisa.md 4.6, sesame.md 4.3)."""

import json
from itertools import chain

import numpy as np

from toy.world.knowledge import Implicit, implicit, unmet
from toy.world.layouts.world import World
from toy.world.polygons import pixel_polygons
from toy.world.scene import Scene

LONG_SHARE, EXPLAINED_SHARE = 0.6, 0.6


def reason_seg(world: World) -> str:
    """reason_seg/ReasonSeg/{train,val,test}/x.jpg with x.json, and explanatory/train.json."""
    splits = {"train": world.train("reason_seg"), "val": world.val(), "test": world.test()}
    explained, pictures = [], 0
    pairs = ((split, number, scene) for split, scenes in splits.items() for number, scene in scenes)
    for split, number, scene in pairs:
        rng = world.words(scene, "ReasonSeg")
        queries = implicit(scene, rng)
        query = queries[rng.integers(len(queries))]
        entry = _entry(scene, query, is_sentence=bool(rng.random() < LONG_SHARE))
        entry["false_premise_QA"] = _false_premises(scene, world.words(scene, "false premise"), entry)
        stem = f"{number}_{scene.seed % 100_000:05d}"
        world.picture(f"reason_seg/ReasonSeg/{split}/{stem}.jpg", scene)
        world.file(f"reason_seg/ReasonSeg/{split}/{stem}.json").write_text(json.dumps(entry), encoding="utf-8")
        if split == "train" and rng.random() < EXPLAINED_SHARE:
            explained.append({"image": f"{stem}.jpg", "query": entry["text"][0], "outputs": query.explanation})
        pictures += 1
    world.file("reason_seg/ReasonSeg/explanatory/train.json").write_text(json.dumps(explained, indent=1))
    return f"{pictures} pictures, {len(explained)} explanations"


def _entry(scene: Scene, query: Implicit, *, is_sentence: bool) -> dict:
    """The labelme-like file of an image; all polygons together are the answer."""
    polygons = chain.from_iterable(pixel_polygons(scene.things[i].mask) for i in query.targets)
    shapes = [{"label": "target", "labels": ["target"], "shape_type": "polygon", "points": p} for p in polygons]
    return {
        "text": list(query.phrasings) if is_sentence else [query.query_short],
        "is_sentence": is_sentence,
        "shapes": shapes,
    }


def _false_premises(scene: Scene, rng: np.random.Generator, entry: dict) -> list[list]:
    """[question, is it a sentence, answer] about things that are not in the image, sentences and phrases in turn.

    As many as the image has true queries: SESAME's training takes one for each that it draws.
    """
    found = unmet(scene, rng)[: len(entry["text"])]
    flags = [entry["is_sentence"] ^ bool(index % 2) for index in range(len(found))]
    return [[long if flag else short, flag, answer] for flag, (short, long, answer) in zip(flags, found, strict=True)]
