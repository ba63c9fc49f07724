"""Referring expressions: phrases that fit exactly one object of a scene beyond doubt."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import dist

from toy.world.scene import Scene, Thing
from toy.world.words import ORDINALS, by_class, center, noun, shows_color, shows_size

CLEAR_GAP = 12  # pixels between two centres from which "left of" or "first from the left" is beyond doubt
STEEP = 0.5  # "above" needs at least this much vertical distance per horizontal distance; so does "left of", turned
NEARER = 1.4  # the next candidate must be at least this many times as far away
LARGER = 1.4  # the largest must have at least this many times the area of the next
POSITIONAL = ("relation", "ordinal")

SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
ENDS = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}  # axis, reading direction


@dataclass(frozen=True)
class Expression:
    """A phrase and the indices of the things it names; `kind` is attribute, relation, ordinal or superlative."""

    text: str
    targets: tuple[int, ...]
    kind: str


def expressions(scene: Scene) -> list[Expression]:
    """All referring expressions of the scene's objects; doubtful ones are left out."""
    groups = [ids for name, ids in by_class(scene).items() if not scene.things[ids[0]].stuff]
    by_text: dict[str, Expression] = {}
    for ids in groups:
        for make in (_attributes, _superlatives, _ordinals):
            by_text |= {item.text: item for item in make(scene, ids)}
        for other in groups:
            if len(other) == 1 and other is not ids:
                by_text |= {item.text: item for item in _relations(scene, ids, other[0])}
    return list(by_text.values())


def _attributes(scene: Scene, ids: list[int]) -> Iterator[Expression]:
    things = [scene.things[i] for i in ids]
    if len(ids) == 1:
        yield Expression(f"the {things[0].name}", (ids[0],), "attribute")
    for index, thing in zip(ids, things, strict=True):
        others = [other for other in things if other is not thing]
        if shows_color(thing) and all(other.color != thing.color for other in others):
            yield Expression(f"the {noun(thing)}", (index,), "attribute")
        if shows_size(thing) and all(shows_size(other) and other.size != thing.size for other in others):
            yield Expression(f"the {noun(thing, color=False, size=True)}", (index,), "attribute")
        if shows_color(thing) and shows_size(thing) and all(_differs(other, thing) for other in others):
            yield Expression(f"the {noun(thing, size=True)}", (index,), "attribute")


def _differs(other: Thing, thing: Thing) -> bool:
    return other.color != thing.color or (shows_size(other) and other.size != thing.size)


def _superlatives(scene: Scene, ids: list[int]) -> Iterator[Expression]:
    if len(ids) < 2 or not all(shows_size(scene.things[i]) for i in ids):
        return
    ranked = sorted(ids, key=lambda i: int(scene.things[i].mask.sum()))
    areas = [int(scene.things[i].mask.sum()) for i in ranked]
    name = scene.things[ids[0]].name
    if areas[-1] >= LARGER * areas[-2]:
        yield Expression(f"the largest {name}", (ranked[-1],), "superlative")
    if areas[1] >= LARGER * areas[0]:
        yield Expression(f"the smallest {name}", (ranked[0],), "superlative")


def _ordinals(scene: Scene, ids: list[int]) -> Iterator[Expression]:
    if len(ids) < 2:
        return
    name = scene.things[ids[0]].name
    for end, (axis, direction) in ENDS.items():
        places = {i: direction * center(scene.things[i])[axis] for i in ids}
        ranked = sorted(ids, key=places.__getitem__)
        gaps = [places[b] - places[a] for a, b in pairwise(ranked)]
        if gaps[0] >= CLEAR_GAP:
            yield Expression(f"the {end} {name}", (ranked[0],), "ordinal")
            yield Expression(f"the {name} nearest the {end} side", (ranked[0],), "ordinal")
        if min(gaps) >= CLEAR_GAP and end in ("left", "right"):
            for word, index in zip(ORDINALS, ranked, strict=False):
                yield Expression(f"the {word} {name} from the {end}", (index,), "ordinal")


def _relations(scene: Scene, ids: list[int], anchor: int) -> Iterator[Expression]:
    """ "the car left of the tree": one object of a class clearly on that side, all others on the opposite one."""
    name, anchor_noun = scene.things[ids[0]].name, scene.things[anchor].name
    home = center(scene.things[anchor])
    for words, (axis, direction) in SIDES.items():
        ahead = {i: direction * (center(scene.things[i])[axis] - home[axis]) for i in ids}
        best = max(ids, key=ahead.__getitem__)
        aside = abs(center(scene.things[best])[1 - axis] - home[1 - axis])
        if ahead[best] >= max(CLEAR_GAP, STEEP * aside) and all(ahead[i] < 0 for i in ids if i != best):
            yield Expression(f"the {name} {words} the {anchor_noun}", (best,), "relation")
    if len(ids) > 1:
        distances = {i: dist(center(scene.things[i]), home) for i in ids}
        first, second = sorted(ids, key=distances.__getitem__)[:2]
        if distances[second] >= NEARER * distances[first]:
            yield Expression(f"the {name} nearest the {anchor_noun}", (first,), "relation")
