"""What a paper is: the tokens it adds, the words it trains and tests with, its mask head, how its answers are read."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import yaml

from data.tokens import TokenSpec
from data.types import IMAGE_PLACEHOLDER, Claim, Dialogue, Mask, Query, Record, Refuse, Script, Target
from utils.config import from_dict
from utils.registry import Registry

ORIGINAL = "lisa"  # whose command line the others extend
SYSTEMS = Registry("system")  # factories: options by keyword -> System
WORDING = Path(__file__).parent / "wording"
ABSENT = Refuse(-1)  # an asked class of the vocabulary that no target of the record stands for
Item = TypeVar("Item")


class SegTask(Protocol):
    """Facts to words. Pure: the same generator state gives the same words; no file is opened."""

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """Training dialogues of one picture, one row each; none where there is nothing to ask."""

    def queries(self, record: Record) -> list[Query]:
        """Evaluation questions of one picture: fixed words, no chance."""


@dataclass(frozen=True)
class System:
    """A paper.

    published: the architectures in the `config.json` of its released checkpoints. published_tower: their vision tower,
    where these name a wrong one. published_tokenization: the transformers release whose ids the published figures of
    its bare weight file were made with; None: 4.31. prompt_template: the conversation template of generated answers
    where it is not the trained one. flags: command-line flags that only its original has. visible_padding: so many
    questions about a picture are answered together and see each other's padding, as released; 0: nothing sees padding.
    """

    name: str
    tokens: TokenSpec
    task: SegTask
    head: str  # a name in HEADS
    read: Callable[[str], list[Claim]]
    published: tuple[str, ...] = ()
    published_tower: str | None = None
    published_tokenization: str | None = None
    prompt_template: str | None = None
    flags: tuple[str, ...] = ()
    visible_padding: int = 0


def build_system(name: str, options: dict[str, Any] | None = None) -> System:
    """The system `name` with the recipe's `options`; an unknown name or option raises and lists the choices."""
    return SYSTEMS[name](**(options or {}))


def taking(options: dict[str, Any], flags: Iterable[str] = ()) -> list[str]:
    """The systems that accept these options and flags, the original first: which paper a command line means."""
    names, owners = [], {flag: name for name in SYSTEMS for flag in build_system(name).flags}
    for name in sorted(SYSTEMS, key=lambda name: name != ORIGINAL):
        try:
            build_system(name, options)
        except ValueError:
            continue
        if all(owners.get(flag, name) == name for flag in flags):
            names.append(name)
    return names


def make_options(cls: type[Item], values: dict[str, Any]) -> Item:
    """A system's options dataclass from recipe values; an unknown one raises and lists the fields."""
    return from_dict(cls, values, "options")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"options.{name}: {value!r} is not a choice; have: {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class Wording:
    """Question and answer templates of a system, by list name; every template has exactly the slots of its list."""

    name: str
    lists: dict[str, tuple[str, ...]]

    def draw(self, key: str, rng: np.random.Generator) -> str:
        templates = self.lists[key]
        return templates[rng.integers(len(templates))]


def load_wording(name: str, slots: dict[str, str]) -> Wording:
    """Reads `systems/wording/<name>.yaml` (or a YAML path) and checks it against `slots`: list name to slot names.

    Several slots of a list stand with blanks between them, `?` behind one that its templates may leave out; "" means
    none. A missing list, an empty one, or a template without its slots (or with one twice, or with another) is an error
    that names the file, the list and the template.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORDING / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in WORDING.glob("*.yaml")))
        raise FileNotFoundError(f"no wording {name!r}; have: {have}, or the path of a YAML file")
    lists = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if set(lists) != set(slots):
        raise ValueError(f"{path}: expected the lists {', '.join(sorted(slots))}; got {', '.join(sorted(lists))}")
    for key, slot in slots.items():
        if not lists[key]:
            raise ValueError(f"{path}: the list {key!r} is empty")
        for template in lists[key]:
            found = sorted(field for _, field, _, _ in string.Formatter().parse(template) if field is not None)
            needed = sorted(name for name in slot.split() if not name.endswith("?"))
            if found not in (needed, sorted(slot.replace("?", "").split())):
                wanted = " and ".join(f"{{{name}}} once" for name in needed) or "no slot"
                raise ValueError(f"{path}: {key}: {template!r} must hold {wanted}")
    return Wording(name, {key: tuple(templates) for key, templates in lists.items()})


def about_picture(text: str) -> str:
    """A first user turn: the picture's line, then `text` as it is (evaluation prompts begin with a blank)."""
    return f"{IMAGE_PLACEHOLDER}\n{text}"


def fill_answer(template: str, hole: Mask | Refuse) -> Script:
    """`It is {mask}.` -> ("It is ", hole, "."), without empty text."""
    before, after = template.split("{mask}")
    return tuple(part for part in (before, hole, after) if part != "")


def compose(template: str, **slots: str | Script) -> Script:
    """A template of several slots, filled with words or with pieces of answers."""
    script: list[str | Mask | Refuse] = []
    for text, name, _, _ in string.Formatter().parse(template):
        filled = slots[name] if name else ""
        script += [text, *([filled] if isinstance(filled, str) else filled)]
    return joined(script)


def before_mask(template: str) -> str:
    """A regular expression of the words before a template's mask, its slots as named groups."""
    clause = template.partition("{mask")[0].strip(" :")
    parts = string.Formatter().parse(clause)
    return "".join(re.escape(text) + (f"(?P<{name}>.+?)" if name else "") for text, name, _, _ in parts)


def joined(parts: Iterable[str | Mask | Refuse]) -> Script:
    """Neighbouring texts become one, empty ones go."""
    script: list[str | Mask | Refuse] = []
    for part in parts:
        if isinstance(part, str) and script and isinstance(script[-1], str):
            script[-1] += part
        elif part != "":
            script.append(part)
    return tuple(script)


def choose(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    """`number` of the items without replacement in random order; all of them in their own order where not more."""
    if len(items) <= number:
        return list(items)
    return [items[index] for index in rng.choice(len(items), number, replace=False)]


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    return [items[index] for index in rng.permutation(len(items))]


def called(target: Target, rng: np.random.Generator) -> str:
    """Any of the target's names: half the time a part is "the wheel of the car", else "car wheel" (lisa.md 4.3)."""
    names = (target.phrase, *target.aliases)
    return names[rng.integers(len(names))] if target.aliases else target.phrase


def label_set(record: Record) -> tuple[list[str], dict[str, int]]:
    """Lower-cased names in dataset order, and the target index of each present one."""
    names = [name.lower() for name in record.vocabulary]
    present = {target.phrase.lower(): i for i, target in enumerate(record.targets) if target.mask is not None}
    if not names:
        raise ValueError(f"{record.image}: a 'classes' record with an empty class list")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{record.image}: the class list names {', '.join(twice)} more than once")
    if strangers := present.keys() - set(names):
        raise ValueError(f"{record.image}: targets {', '.join(sorted(strangers))} are not in the class list")
    return names, present


def read_claims(text: str, tokens: TokenSpec) -> list[Claim]:
    """Every mask and refusal of a generated answer, in order, with the words that stand directly before it.

    The k-th complete group of mask tokens is the k-th mask, with or without words before it, so masks and claims
    pair exactly. Blanks around tokens differ between decoders and carry no meaning (`sky <ins>`, `sky<ins>`).
    """
    text = text.rpartition("ASSISTANT:")[2]
    group = r"\s*".join(map(re.escape, tokens.mask))
    refuse = re.escape(tokens.refuse) if tokens.refuse else r"(?!)"
    other = "|".join(map(re.escape, ("</s>", "<s>", *tokens.all_added)))
    claims, masks, words = [], 0, 0
    for found in re.finditer(f"(?P<mask>{group})|(?P<refuse>{refuse})|{other}", text):
        phrase = " ".join(text[words : found.start()].split()).strip(" ,.;:")
        words = found.end()
        if found["mask"]:
            claims.append(Claim(phrase, masks))
            masks += 1
        elif found["refuse"]:
            claims.append(Claim(phrase, None))
    return claims
