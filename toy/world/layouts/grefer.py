"""Expressions that name several objects or none: gRefCOCO and Ref-ZOM (gsva.md 4)."""

from collections.abc import Iterator

import numpy as np

from toy.world.expressions import Expression
from toy.world.layouts.refer import phrases
from toy.world.layouts.refsets import RefSet, write_refs
from toy.world.layouts.world import World
from toy.world.scene import Scene
from toy.world.several import absent, false_premises, none_of_several, several

ONE, MANY, NONE = 2, 3, 2  # refs of each kind per image, at most


def grefcoco(world: World) -> str:
    """`ann_id` is a list, [-1] where the phrase fits nothing."""
    return write_refs(world, RefSet("grefcoco", ("grefs(unc).json",), _phrases, _grefs))


def refzom(world: World) -> str:
    """`ann_id` is a list, empty where the phrase fits nothing; images of train2014 and val2014."""
    refset = RefSet("refzom", ("Ref_ZOM.p",), _phrases, _zero_to_many, tests="test", val2014=True)
    return write_refs(world, refset)


def _phrases(scene: Scene) -> list[Expression]:
    return [*several(scene), *phrases(scene)]


def _grefs(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[dict]:
    for things, text in _sample_phrases(scene, items, rng):
        yield {"thing": things, "none": [-1], "no_target": not things, "sentences": [{"sent": text}]}


def _zero_to_many(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[dict]:
    for things, text in _sample_phrases(scene, items, rng):
        source = {0: "zero", 1: "one"}.get(len(things), "many")
        yield {"thing": things, "none": [], "source": source, "sentences": [{"sent": text}]}


def _sample_phrases(scene: Scene, items: list[Expression], rng: np.random.Generator) -> Iterator[tuple[list[int], str]]:
    """(things, phrase): some that fit one object, some that fit several, some that fit none."""
    for at_most, fits in ((ONE, lambda n: n == 1), (MANY, lambda n: n > 1)):
        candidates = [item for item in items if fits(len(item.targets))]
        for i in rng.permutation(len(candidates))[:at_most]:
            yield list(candidates[i].targets), candidates[i].text
    single = [item for item in items if len(item.targets) == 1]
    wrong = [item.text for item in false_premises(scene, single, rng)]
    nothing = [*wrong[: 2 * NONE], *absent(scene, rng)[:NONE], *none_of_several(scene, rng)[: 2 * NONE]]
    for i in rng.permutation(len(nothing))[:NONE]:
        yield [], nothing[i]
