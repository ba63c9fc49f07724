"""Implicit queries: questions that name no class and need a little world knowledge to answer."""

from dataclasses import dataclass

import numpy as np

from toy.world.scene import OBJECTS, Scene
from toy.world.words import by_class, with_article


@dataclass(frozen=True)
class Implicit:
    """A query as a short phrase and as a long sentence, an answer that names the class, and all things of that class.

    phrasings: the long sentence first, then others of the same meaning. targets: indices into `Scene.things`.
    """

    query_short: str
    query_long: str
    explanation: str
    targets: tuple[int, ...]
    phrasings: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """What the classes in `fits`, and no others, are or do: a phrase "thing that ..." and a reason."""

    fits: tuple[str, ...]
    phrase: str
    reason: str


_QUESTIONS = (
    "which part of this picture shows the {phrase}?",
    "if you look for the {phrase}, where is it in this picture?",
    "i want to find the {phrase}, so what in this picture should i look at?",
    "please find the {phrase} for me, what in this picture could it be?",
    "what do you see in this picture that could be the {phrase}?",
)


_TABLE = (
    ("fish", "animal that lives in water", "it is an animal that lives in water"),
    ("fish", "thing that swims", "it has a tail and swims"),
    ("fish", "thing that could be caught for dinner", "people catch it and eat it"),
    ("house", "thing where a family lives", "a family lives in it"),
    ("house", "thing with rooms to sleep and cook in", "it has rooms to sleep and cook in"),
    ("house tent car bus", "thing that keeps people dry in the rain", "people go into it when the rain comes"),
    ("tent", "thing that campers sleep in", "campers sleep in it"),
    ("tent", "thing that is folded and carried on a camping trip", "it is folded and carried on a camping trip"),
    ("car bus", "thing that drives on wheels", "it has wheels and drives"),
    ("car", "thing that a family drives in", "a family drives in it"),
    ("car", "thing that is parked in front of a home", "it is parked in front of a home"),
    ("bus", "thing that many people ride to work", "many people ride in it to work"),
    ("bus", "thing that takes children to school", "it takes children to school"),
    ("airplane", "thing that flies", "it has wings and flies"),
    ("airplane", "thing that takes people over the sea in a few hours", "it flies people over the sea in a few hours"),
    ("boat", "thing that floats and sails", "it floats and the wind moves its sails"),
    ("boat", "thing that crosses a lake", "it crosses lakes"),
    ("tree", "thing with leaves where birds nest", "birds nest in its leaves"),
    ("tree", "thing that gives wood", "wood is cut from it"),
    ("tree tent house", "thing that could give shade on a hot day", "it gives shade when the sun is hot"),
    ("tree flower grass", "thing that grows and needs rain", "it is a plant that grows"),
    ("flower", "thing that smells sweet", "it smells sweet"),
    ("flower", "thing that bees visit", "bees visit its petals"),
    ("flower", "thing that is given as a gift to a mother", "it is a sweet gift"),
    ("ball", "thing that children throw and catch", "children throw it and catch it"),
    ("ball", "thing that bounces and rolls", "it is round, so it bounces and rolls"),
    ("lamp", "thing that gives light at night", "it gives light at night"),
    ("lamp", "thing that helps to read in the dark", "its light helps to read in the dark"),
    ("clock", "thing that tells the time", "its hands tell the time"),
    ("clock", "thing that wakes people in the morning", "it rings in the morning"),
    ("bottle", "thing that holds a drink", "a drink is kept in it"),
    ("bottle", "thing that is closed with a cap", "it is closed with a cap"),
    ("chair", "thing to sit on at a table", "people sit on it at a table"),
    ("chair", "thing for a tired man to rest on", "it has a seat to rest on"),
    ("flag", "thing that waves in the wind on a pole", "it waves in the wind on a pole"),
    ("flag", "thing that stands for a country", "it stands for a country"),
    ("person", "one who can speak and think", "people can speak and think"),
    ("person", "one who wears clothes", "people wear clothes"),
    ("fish person", "living thing that has eyes", "it lives and has eyes"),
    ("sky", "place where birds fly and clouds drift", "birds fly and clouds drift there"),
    ("sky", "place where stars come out at night", "stars come out there at night"),
    ("water", "place that is wet", "it is wet"),
    ("water", "place to go for a swim", "people go there to swim"),
    ("grass", "place that cows eat from", "cows eat it"),
    ("grass", "ground that must be cut in summer", "it grows and is cut in summer"),
    ("sand", "ground that a castle can be built from on a beach", "castles are built from it on a beach"),
    ("sand", "ground that is dry and found in a desert", "it is dry and a desert is full of it"),
    ("road", "ground that is made for cars", "it is made for cars to drive on"),
    ("road", "ground with lines painted on it", "lines are painted on it"),
    ("mountain", "place that climbers go up", "climbers go up to its top"),
    ("mountain", "place where snow may lie on top", "snow may lie on its top"),
)
FACTS: tuple[Fact, ...] = tuple(Fact(tuple(names.split()), phrase, reason) for names, phrase, reason in _TABLE)


def implicit(scene: Scene, rng: np.random.Generator) -> list[Implicit]:
    """The queries that exactly one class of the scene fits; the targets are all its instances."""
    groups = by_class(scene)
    queries = []
    for fact in FACTS:
        present = [name for name in fact.fits if name in groups]
        if len(present) == 1:
            queries.append(_ask(fact, present[0], tuple(groups[present[0]]), rng))
    return queries


def unmet(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(short query, long query, answer) of queries that nothing in the scene fits, in random order."""
    present = by_class(scene)
    facts = [fact for fact in FACTS if not present.keys() & set(fact.fits)]
    objects = [name for name in present if name in OBJECTS]
    unmet_queries = []
    for fact in (facts[i] for i in rng.permutation(len(facts))):
        other = with_article(objects[rng.integers(len(objects))])
        question = _QUESTIONS[rng.integers(len(_QUESTIONS))].format(phrase=fact.phrase)
        unmet_queries.append((fact.phrase, question, f"no, there is no {fact.phrase} here, but there is {other}."))
    return unmet_queries


def _ask(fact: Fact, name: str, targets: tuple[int, ...], rng: np.random.Generator) -> Implicit:
    order = rng.permutation(len(_QUESTIONS))[: int(rng.integers(1, len(_QUESTIONS) + 1))]
    phrasings = tuple(_QUESTIONS[i].format(phrase=fact.phrase) for i in order)
    answer = with_article(name) if name in OBJECTS else f"the {name}"
    explanation = f"the answer is {answer}, because {fact.reason}."
    return Implicit(fact.phrase, phrasings[0], explanation, targets, phrasings)
