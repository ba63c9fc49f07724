"""A system is one paper's method: its tokens, its words for training and evaluation, its mask head, its reading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Query, Record
from utils.config import from_dict
from utils.registry import Registry

ORIGINAL = "lisa"  # whose command line the others extend
SYSTEMS = Registry("system")  # factories: options by keyword -> System
Options = TypeVar("Options")


class SegTask(Protocol):
    """Turns facts into words. Pure: the same generator state gives the same words; no file is opened."""

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """Training dialogues about one image, one row each; [] where there is nothing to ask."""
        ...

    def queries(self, record: Record) -> list[Query]:
        """Evaluation questions about one image: fixed words, nothing random."""
        ...


@dataclass(frozen=True)
class ReleasedTruth:
    """What a paper's released scoring of phrases takes for the truth; the as-released figures are computed with it.

    parts: pixels under several parts of one object are outside ("exclude": LISA's reader sums the parts, and a sum of 2
    is of neither class; lisa.md 6), or inside ("union"). ignored: ignored pixels are left out of the counts ("leave
    out"), or stand for the object ("object", gsva.md 6.4) or for background ("background", sesame.md 4.3).
    """

    parts: str = "exclude"
    ignored: str = "leave out"


def no_settings(values: dict[str, Any]) -> dict[str, Any]:
    """See `Released.settings`."""
    return {}


@dataclass(frozen=True)
class Released:
    """What a paper's published code and checkpoints do and no other's; the defaults say: nothing of the kind.

    architectures: in the `config.json` of the published checkpoints, which are recognised by it.
    settings: the `config.json` of a published checkpoint -> what it means as fields of a recipe, nested by section;
        other fields keep what a folder without a recipe is taken for. The values may come from a stranger.
    vision_tower: the tower of the published checkpoints, where their `config.json` names a wrong one.
    tokenization: the transformers release whose token ids the published figures of a bare weight file were made with;
        None: 4.31.
    prompt_template: conversation template of generated answers, where it is not the one of training.
    visible_padding: the number of questions about an image that are answered together and attend to each other's
        padding; 0: nothing attends to padding.
    flags: command-line flags that only the paper's own program has.
    truth: what its scoring of phrases compares with.
    """

    architectures: tuple[str, ...] = ()
    settings: Callable[[dict[str, Any]], dict[str, Any]] = no_settings
    vision_tower: str | None = None
    tokenization: str | None = None
    prompt_template: str | None = None
    visible_padding: int = 0
    flags: tuple[str, ...] = ()
    truth: ReleasedTruth = ReleasedTruth()


@dataclass(frozen=True)
class System:
    """One paper's method. read: the text of an answer -> its claims. released: what only its release does."""

    name: str
    tokens: TokenSpec
    task: SegTask
    head: str  # a name in HEADS
    read: Callable[[str], list[Claim]]
    released: Released = Released()


def build_system(name: str, options: dict[str, Any] | None = None) -> System:
    """The system `name` with the recipe's `options`; an unknown name or option raises and lists the choices."""
    return SYSTEMS[name](**(options or {}))


def systems_accepting(options: dict[str, Any], flags: Iterable[str] = ()) -> list[str]:
    """The systems that accept these options and flags, the original first: which paper a command line means."""
    owners = {flag: name for name in SYSTEMS for flag in build_system(name).released.flags}
    names = []
    for name in sorted(SYSTEMS, key=lambda name: name != ORIGINAL):
        try:
            build_system(name, options)
        except ValueError:
            continue
        if all(owners.get(flag, name) == name for flag in flags):
            names.append(name)
    return names


def make_options(cls: type[Options], values: dict[str, Any]) -> Options:
    """A system's options dataclass from recipe values; an unknown one raises and lists the fields."""
    return from_dict(cls, values, "options")


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"options.{name}: {value!r} is not a choice; have: {', '.join(map(str, choices))}")
