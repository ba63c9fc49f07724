"""Sentences that are not true of the image: R-RefCOCO/+/g and FP-RefCOCO/+/g (sesame.md 4.2)."""

from collections.abc import Iterator

import numpy as np

from toy.world.expressions import Expression
from toy.world.layouts.refer import descriptions, looks_only, phrases
from toy.world.layouts.refsets import Phrases, RefSet, one_object, write_refs
from toy.world.layouts.world import World
from toy.world.scene import Scene
from toy.world.several import absent, false_premises

WRONG = 2  # false sentences per object, at most
BERKELEY = ("refs(berkeley_exclude_unified).p",)
STYLES: dict[str, tuple[Phrases, str, str]] = {  # phrases, split_by, test splits
    "refcoco": (phrases, "unc", "testAB"),
    "refcoco+": (looks_only, "unc", "testAB"),
    "refcocog": (descriptions, "umd", "test"),
}


def denied(world: World, name: str) -> str:
    """R-<name>: sentences with `exist`; the false ones name something that is not in the image."""
    said, split_by, tests = STYLES[name]
    return write_refs(world, RefSet(f"R-{name}", (f"refs({split_by}_exclude_unified).p",), said, _some_absent, tests))


def corrected(world: World, name: str) -> str:
    """fp<name>: sentences with `is_false_premise` and `gt_sent`, the true sentence instead."""
    said, _, tests = STYLES[name]
    return write_refs(world, RefSet(f"fp{name}", BERKELEY, said, _some_wrong, tests))


def _some_absent(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[dict]:
    nothing = absent(scene, rng)
    for ref in one_object(scene, items, rng):
        wrong = [nothing[i] for i in rng.permutation(len(nothing))[:WRONG]]
        said = [*((said["sent"], True) for said in ref["sentences"]), *((text, False) for text in wrong)]
        yield ref | {"sentences": [{"sent": text, "exist": exist} for text, exist in said]}


def _some_wrong(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[dict]:
    wrong = false_premises(scene, items, rng)
    for ref in one_object(scene, items, rng):
        true = [{**said, "is_false_premise": False, "gt_sent": ""} for said in ref["sentences"]]
        own = [item for item in wrong if item.truth.targets == (ref["thing"],)]
        false = [
            {"sent": own[i].text, "is_false_premise": True, "gt_sent": own[i].truth.text}
            for i in rng.permutation(len(own))[:WRONG]
        ]
        yield ref | {"sentences": [*true, *false]}
