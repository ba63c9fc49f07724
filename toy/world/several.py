"""Phrases that fit several objects of a scene (all of a class, of a colour, a pair), or none of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from toy.world.expressions import Expression
from toy.world.scene import COLORS, OBJECTS, Scene
from toy.world.words import NUMBERS, by_class, plural, shows_color

OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class FalsePremise:
    """A phrase that fits nothing in the scene, and the true expression from which it was made."""

    text: str
    truth: Expression


def several(scene: Scene) -> list[Expression]:
    """All phrases that clearly name two or more objects; `targets` has every one of them."""
    by_text = {item.text: item for make in (_classes, _colors, _pairs) for item in make(scene)}
    return list(by_text.values())


def false_premises(scene: Scene, items: list[Expression], rng: np.random.Generator) -> list[FalsePremise]:
    """True expressions of the scene with the class, the colour or the side changed, so that they fit nothing."""
    by_text: dict[str, FalsePremise] = {}
    for item in items:
        for change in (_other_class, _other_color, _other_side):
            if text := change(scene, item, rng):
                by_text.setdefault(text, FalsePremise(text, item))
    return list(by_text.values())


def absent(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Phrases about one object of a class that is not in the image, in random order."""
    texts = []
    for name in _shuffle(_missing(scene), rng):
        color = list(COLORS)[rng.integers(len(COLORS))]
        texts.append(name if name == "person" or rng.random() < 0.5 else f"{color} {name}")
    return texts


def none_of_several(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Phrases in the forms of `several` that fit nothing in the scene, in random order."""
    names = _shuffle(_missing(scene), rng)
    unused = [color for color in COLORS if all(thing.color != color for thing in scene.things)]
    texts = [f"all {color} things" for color in unused]
    texts += [f"all {plural(name)}" for name in names[:3]] + [f"the {NUMBERS[2]} {plural(name)}" for name in names[3:5]]
    texts += [f"the {one} and the {other}" for one, other in pairwise(names[:4])]
    return _shuffle(texts, rng)


def _classes(scene: Scene) -> Iterator[Expression]:
    for name, ids in by_class(scene).items():
        if len(ids) > 1 and name in OBJECTS:
            yield Expression(f"all {plural(name)}", tuple(ids), "class")
            yield Expression(f"the {NUMBERS[len(ids)]} {plural(name)}", tuple(ids), "class")


def _colors(scene: Scene) -> Iterator[Expression]:
    """Only colours that show on every object of that colour; what a person wears does not count."""
    for color in COLORS:
        ids = [index for index, thing in enumerate(scene.things) if thing.color == color]
        things = [scene.things[index] for index in ids]
        if len(ids) > 1 and all(shows_color(thing) and thing.name != "person" for thing in things):
            yield Expression(f"all {color} things", tuple(ids), "color")


def _pairs(scene: Scene) -> Iterator[Expression]:
    """Two objects of different classes, each by its class alone."""
    single = [(name, ids[0]) for name, ids in by_class(scene).items() if len(ids) == 1 and name in OBJECTS]
    for (one, first), (other, second) in combinations(single, 2):
        yield Expression(f"the {one} and the {other}", (first, second), "pair")


def _other_class(scene: Scene, item: Expression, rng: np.random.Generator) -> str | None:
    name = scene.things[item.targets[0]].name
    names = [other for other in _missing(scene) if other != "person"]
    if name == "person" or not names or item.kind not in ("attribute", "relation"):
        return None
    return re.sub(rf"\b{name}\b", names[rng.integers(len(names))], item.text, count=1)


def _other_color(scene: Scene, item: Expression, rng: np.random.Generator) -> str | None:
    thing = scene.things[item.targets[0]]
    used = {other.color for other in scene.things if other.name == thing.name}
    colors = [color for color in COLORS if color not in used]
    if thing.color not in item.text.split() or not colors:
        return None
    return re.sub(rf"\b{thing.color}\b", colors[rng.integers(len(colors))], item.text, count=1)


def _other_side(scene: Scene, item: Expression, rng: np.random.Generator) -> str | None:
    """Only of a class that is there once: another object of it could be on the other side."""
    side = next((words for words in OPPOSITES if f" {words} " in item.text), None)
    if item.kind != "relation" or side is None or len(by_class(scene)[scene.things[item.targets[0]].name]) > 1:
        return None
    return item.text.replace(side, OPPOSITES[side])


def _missing(scene: Scene) -> list[str]:
    return [name for name in OBJECTS if name not in by_class(scene)]


def _shuffle(items: list[str], rng: np.random.Generator) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))]
