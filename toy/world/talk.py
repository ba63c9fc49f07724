"""Captions of a scene, and short dialogues about number, colour, presence and place."""

from collections.abc import Iterator

import numpy as np

from toy.world.scene import CLASSES, Scene, Thing
from toy.world.shapes import OBJECTS
from toy.world.words import NUMBERS, by_class, center, join, noun, place, plural, shows_color, with_article

ROUNDS = 4  # at most this many questions in one dialogue
PRESENCE_QUESTIONS = 3  # about present classes, and as many about absent ones
Pair = tuple[str, str]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Three captions: objects from left to right with looks and place; numbers per class; objects and ground."""
    objects = _from_left(scene)
    full = [f"{with_article(noun(thing, size=True))} {place(thing)}" for thing in objects]
    opening = ("there is", "i see", "the picture shows")[rng.integers(3)]
    ground = join([thing.name for thing in scene.stuff])
    counts = [count_phrase(name, len(ids)) for name, ids in by_class(scene).items() if name in OBJECTS]
    where = [f"{thing.name} {place(thing)}" for thing in objects]
    return [
        f"{opening} {join(full)}. behind is {ground}.",
        f"this picture has {join(counts)}. from top to bottom there is {ground}.",
        f"{join(where)}, with {ground}.",
    ]


def dialogues(scene: Scene, rng: np.random.Generator) -> list[list[Pair]]:
    """All plain questions about the scene with their answers, shuffled and cut into dialogues."""
    topics = (_counts, _colors, _presence, _places, _contents)
    pairs = [pair for topic in topics for pair in topic(scene, rng)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    return [pairs[start : start + ROUNDS] for start in range(0, len(pairs), ROUNDS)]


def count_phrase(name: str, number: int) -> str:
    return f"{NUMBERS[number]} {name if number == 1 else plural(name)}"


def _from_left(scene: Scene) -> list[Thing]:
    return sorted(scene.objects, key=lambda thing: center(thing))


def _absent(scene: Scene, rng: np.random.Generator, count: int, *, names: tuple[str, ...] = CLASSES) -> list[str]:
    missing = [name for name in names if name not in by_class(scene)]
    return [missing[i] for i in rng.permutation(len(missing))[:count]]


def _with_article(name: str) -> str:
    """ "a car", but "grass": most stuff takes no article."""
    return with_article(name) if name in OBJECTS or name in ("road", "mountain") else name


def _counts(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    groups = by_class(scene)
    present = [name for name in groups if name in OBJECTS]
    for name in [*present, *_absent(scene, rng, 1, names=tuple(OBJECTS))]:
        number = len(groups.get(name, ()))
        yield (
            f"how many {plural(name)} are there?",
            f"there {'is' if number == 1 else 'are'} {count_phrase(name, number)}.",
        )


def _colors(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    for name, ids in by_class(scene).items():
        thing = scene.things[ids[0]]
        if len(ids) == 1 and shows_color(thing):
            if name == "person":
                yield "what color does the person wear?", f"the person wears {thing.color}."
            else:
                yield f"what color is the {name}?", f"the {name} is {thing.color}."


def _presence(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    present = list(by_class(scene))
    for name in [present[i] for i in rng.permutation(len(present))[:PRESENCE_QUESTIONS]]:
        yield f"is there {_with_article(name)}?", f"yes, there is {_with_article(name)}."
    for name in _absent(scene, rng, PRESENCE_QUESTIONS):
        yield f"is there {_with_article(name)}?", f"no, there is no {name}."


def _places(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    cells: dict[str, list[Thing]] = {}
    for thing in _from_left(scene):
        cells.setdefault(place(thing), []).append(thing)
    for where, things in cells.items():
        yield f"what is {where}?", f"{where} is {join([with_article(noun(thing)) for thing in things])}."
    for name, ids in by_class(scene).items():
        if len(ids) == 1 and name in OBJECTS:
            yield f"where is the {name}?", f"the {name} is {place(scene.things[ids[0]])}."


def _contents(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    groups = by_class(scene)
    objects = list(dict.fromkeys(thing.name for thing in _from_left(scene)))
    yield "what objects can you see?", f"i see {join([count_phrase(name, len(groups[name])) for name in objects])}."
    yield "what is behind the objects?", f"behind is {join([thing.name for thing in scene.stuff])}."
    present = [list(groups)[i] for i in rng.permutation(len(groups))]
    offered = [*present[: int(rng.integers(1, 5))], *_absent(scene, rng, 4)]
    offered = [offered[i] for i in rng.permutation(len(offered))]
    visible = [name for name in offered if name in groups]
    yield f"which of these can you see: {', '.join(offered)}?", f"i see {join(visible)}."
