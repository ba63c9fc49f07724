"""Questions and answers about a scene for the LLaVA stage, in plain words and place words, without mask tokens."""

from collections.abc import Callable

import numpy as np

from toy.base.facts import Facts, cell_at, corners, spot, union
from toy.world.scene import CLASSES, SIDE, Thing
from toy.world.words import NUMBERS, noun

SYNONYMS = {"fish": "animal"}  # the name in the class list of ADE20K
Turn = tuple[str, str]
TurnBuilder = Callable[[Facts, np.random.Generator], Turn | None]

_FIND = ("where are these: {}?", "find each of these: {}.", "which of these are in this image, and where: {}?",
         "point at all of these objects in this image: {}.")  # fmt: skip
_PRESENT = ("which of these are in this image: {}?", "are these here: {}?", "say yes or no for each: {}.")
_BOXES = ("give the box of each: {}.", "what are the boxes of {} in this image?", "frame these: {}.")
_COUNTS = ("count these: {}.", "how many of each are in this image: {}?")
_REFER = ("where is {}?", "find {}.", "show {} in this image.", "what is {} in this image? please output its place.",
          "point at {} in this picture.", "please locate {}.", "can you find {} in this image?",
          "i need the place of {}.", "please find and outline {} in this image.",
          "what is {}? answer with a box.")  # fmt: skip
_SENTENCE = ("{}", "{} please answer with a place.", "{} please output its box.", "{} respond with the place.")
_DESCRIBE = ("describe this image.", "what do you see in this image?", "what is in this picture? please explain.")
_LIST = ("name all things and their places.", "describe this image with places.", "what is where in this image?")


def sample_classes(facts: Facts, rng: np.random.Generator, least: int = 4) -> list[str]:
    """Classes to ask for, in random order: some present and some absent ones; sometimes all classes.

    least: absent classes at least.
    """
    present = [CLASSES[i] for i in rng.permutation(len(CLASSES)) if CLASSES[i] in facts.groups]
    absent = [CLASSES[i] for i in rng.permutation(len(CLASSES)) if CLASSES[i] not in facts.groups]
    if rng.random() < 0.3:
        names = present + absent
    else:
        names = present[: rng.integers(1, len(present) + 1)] + absent[: rng.integers(least, len(absent) + 1)]
    return [names[i] for i in rng.permutation(len(names))]


def _ask_each(
    facts: Facts, rng: np.random.Generator, questions: tuple[str, ...], answer: Callable[[list[Thing]], str], no: str
) -> Turn:
    """A question with a list of classes, answered class by class in the order of the question."""
    names = sample_classes(facts, rng)
    wording = {name: SYNONYMS[name] if name in SYNONYMS and rng.random() < 0.4 else name for name in names}
    answers = [f"{wording[name]} {answer(facts.groups[name]) if name in facts.groups else no}" for name in names]
    return _pick(questions, rng).format(", ".join(wording.values())), " ".join(answers)


def find(facts: Facts, rng: np.random.Generator) -> Turn:
    return _ask_each(facts, rng, _FIND, lambda things: " ".join(spot(thing.mask) for thing in things), "no")


def present(facts: Facts, rng: np.random.Generator) -> Turn:
    return _ask_each(facts, rng, _PRESENT, lambda things: "yes", "no")


def boxes(facts: Facts, rng: np.random.Generator) -> Turn:
    return _ask_each(facts, rng, _BOXES, lambda things: corners(union(things)), "no")


def counts(facts: Facts, rng: np.random.Generator) -> Turn:
    return _ask_each(facts, rng, _COUNTS, lambda things: NUMBERS[len(things)], NUMBERS[0])


def what_at(facts: Facts, rng: np.random.Generator) -> Turn:
    """Name what is at eight places; stuff is often skipped, so that about half of the places are on objects."""
    places: list[str] = []
    names: list[str] = []
    while len(places) < 8:
        x, y = rng.integers(0, SIDE, 2)
        thing = facts.thing_at(x, y)
        if thing.stuff and rng.random() < 0.6:
            continue
        places.append(cell_at(x, y))
        names.append(noun(thing))
    return f"what is at {', '.join(places)}?", ", ".join(names)


def refer(facts: Facts, rng: np.random.Generator) -> Turn | None:
    """One object, by a referring expression of the toy world."""
    if not facts.expressions:
        return None
    kinds = sorted(facts.expressions)
    items = facts.expressions[kinds[rng.integers(len(kinds))]]  # every kind equally often
    item = items[rng.integers(len(items))]
    thing = facts.scene.things[item.targets[0]]
    text = item.text.removeprefix("the ") if rng.random() < 0.3 else item.text
    return _pick(_REFER, rng).format(text), _place(thing.name, [thing], rng)


def where_class(facts: Facts, rng: np.random.Generator) -> Turn:
    """All of one class, stuff included, by name alone."""
    name = list(facts.groups)[rng.integers(len(facts.groups))]
    text = name if rng.random() < 0.5 else f"the {name}"
    return _pick(_REFER, rng).format(text), _place(name, facts.groups[name], rng)


def knowledge(facts: Facts, rng: np.random.Generator) -> Turn | None:
    """An implicit query, short or long, answered by place, by name and place, or with the reason."""
    queries = facts.implicit
    if not queries:
        return None
    item = queries[rng.integers(len(queries))]
    things = [facts.scene.things[i] for i in item.targets]
    if rng.random() < 0.5:
        question = _pick(_REFER, rng).format(f"the {item.query_short}" if rng.random() < 0.7 else item.query_short)
    else:
        question = _pick(_SENTENCE, rng).format(item.phrasings[rng.integers(len(item.phrasings))])
    if rng.random() < 0.2:
        return f"{question} please explain why.", f"{spot(things[0].mask)} {item.explanation}"
    return question, _place(things[0].name, things, rng)


def parts(facts: Facts, rng: np.random.Generator) -> Turn | None:
    """A part of an object whose class is there once."""
    options = [
        (name, things[0], part) for name, things in facts.groups.items() if len(things) == 1 for part in things[0].parts
    ]
    if not options:
        return None
    name, thing, part = options[rng.integers(len(options))]
    mask = thing.parts[part]
    return _pick(_REFER, rng).format(f"the {part} of the {name}"), f"{spot(mask)} {corners(mask)}"


def describe(facts: Facts, rng: np.random.Generator) -> Turn:
    return _pick(_DESCRIBE, rng), facts.captions[rng.integers(len(facts.captions))]


def list_places(facts: Facts, rng: np.random.Generator) -> Turn:
    """Everything with its looks, place and box: the ground first, then objects from left to right."""
    objects = sorted(facts.scene.objects, key=lambda thing: thing.box)
    items = [f"{noun(t, size=True)} {spot(t.mask)} {corners(t.mask)}" for t in (*facts.scene.stuff, *objects)]
    return _pick(_LIST, rng), ", ".join(items)


def talk(facts: Facts, rng: np.random.Generator) -> Turn:
    return facts.pairs[rng.integers(len(facts.pairs))]


MENU: dict[TurnBuilder, float] = {  # relative frequencies
    find: 3.0,
    present: 1.5,
    boxes: 2.0,
    counts: 0.8,
    what_at: 2.0,
    refer: 6.0,
    where_class: 1.5,
    knowledge: 4.0,
    parts: 0.7,
    describe: 1.0,
    list_places: 1.5,
    talk: 2.0,
}


def _place(name: str, things: list[Thing], rng: np.random.Generator) -> str:
    """Spots from the left, then the box of all; sometimes the name first, sometimes a sentence."""
    spots = " ".join(spot(thing.mask) for thing in things)
    answer = f"{spots} {corners(union(things))}" if rng.random() < 0.6 else spots
    style = rng.random()
    if style < 0.65:
        return answer
    return f"it is {answer}" if style < 0.75 else f"{name} {answer}"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
