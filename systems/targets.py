"""What the dialogues about a record speak of: its targets and classes, their names, random samples of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data.collate import NothingToAsk
from data.types import Record, Refuse, Target

REASONING = ("reason", "phrase")  # kinds of record: sentences and phrases that call for reasoning
ABSENT = Refuse(-1)  # a class of the question that no target of the record stands for
Item = TypeVar("Item")


def sample_items(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    """`number` of the items without replacement, in random order; all of them in their own order where there are not
    more (then no random number is taken)."""
    if len(items) <= number:
        return list(items)
    return [items[index] for index in rng.choice(len(items), number, replace=False)]


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    return [items[index] for index in rng.permutation(len(items))]


def random_name(target: Target, rng: np.random.Generator) -> str:
    """Any of the target's names: half the time a part is "the wheel of the car", else "car wheel" (lisa.md 4.3)."""
    names = (target.phrase, *target.aliases)
    return names[rng.integers(len(names))] if target.aliases else target.phrase


def evaluation_phrase(record: Record, phrase: str) -> str:
    """A phrase as the releases write it into an evaluation question: without outer blanks, in lower case except in
    reasoning data (lisa.md 3.3)."""
    return phrase.strip() if record.kind in REASONING else phrase.strip().lower()


def label_set(record: Record) -> tuple[list[str], dict[str, int]]:
    """Lower-cased class names in dataset order, and present class -> index of its target.

    Raises ValueError where a class is present as several targets: a class list has one mask per name. Raises
    NothingToAsk where every pixel is ignored: a class without a label is not known to be absent. In any other image
    where none of the classes is present, all of them are known to be absent.
    """
    names, present = _classes_of(record)
    if several := sorted({name for name in present if name and present.count(name) > 1}):
        raise ValueError(
            f"{record.image}: {', '.join(several)}: more than one target of the class, but a class list has one mask "
            "for each name; set the option instances of the source to union"
        )
    return names, {name: index for index, name in enumerate(present) if name}


def absent_classes(record: Record) -> list[Target]:
    """The classes of a label set that are absent from the image, in dataset order, with their other names."""
    names, present = _classes_of(record)
    aliases_of = record.vocabulary_aliases or ((),) * len(names)
    return [
        Target(name, None, aliases=aliases)
        for name, aliases in zip(names, aliases_of, strict=True)
        if name not in present
    ]


def _classes_of(record: Record) -> tuple[list[str], list[str]]:
    """Lower-cased names of the label set, and the class of each target, "" where that is absent."""
    names = [name.lower() for name in record.vocabulary]
    present = [target.phrase.lower() if target.mask is not None else "" for target in record.targets]
    if not names:
        raise ValueError(f"{record.image}: a 'classes' record with an empty class list")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{record.image}: the class list names {', '.join(twice)} more than once")
    if strangers := {*present} - {*names, ""}:
        raise ValueError(f"{record.image}: targets {', '.join(sorted(strangers))} are not in the class list")
    if not any(present) and record.ignore is not None and record.ignore().all():
        raise NothingToAsk(f"{record.image}: no pixel is labelled as one of the {len(names)} classes")
    return names, present
