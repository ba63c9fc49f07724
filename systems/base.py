"""What a paper is: the tokens it adds, the words it trains and tests with, its mask head, how its answers are read."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data.collate import NothingToAsk
from data.tokens import TokenSpec
from data.types import IMAGE_PLACEHOLDER, Claim, Dialogue, Mask, Query, Record, Refuse, Script, Target
from utils.config import from_dict
from utils.plain import read_yaml
from utils.registry import Registry

ORIGINAL = "lisa"  # whose command line the others extend
SYSTEMS = Registry("system")  # factories: options by keyword -> System
WORDING = Path(__file__).parent / "wording"
ONCE = ("mask", "masks", "refuse")  # slots of templates that hold tokens; words may stand in one several times
REASONING = ("reason", "phrase")  # kinds of record: sentences and phrases that call for reasoning
ABSENT = Refuse(-1)  # an asked class of the vocabulary that no target of the record stands for
Item = TypeVar("Item")


class SegTask(Protocol):
    """Facts to words. Pure: the same generator state gives the same words; no file is opened."""

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        """Training dialogues of one picture, one row each; none where there is nothing to ask."""

    def queries(self, record: Record) -> list[Query]:
        """Evaluation questions of one picture: fixed words, no chance."""


@dataclass(frozen=True)
class ReleasedTruth:
    """What a paper's released scoring of phrases takes for the truth; the as-released figures are computed with it.

    parts: pixels under several parts of one object are outside ("exclude": LISA's reader sums the parts, and a sum of 2
    is of neither class; lisa.md 6), or inside ("union"). ignored: ignored pixels are left out of the counts ("leave
    out"), or stand for the object ("object", gsva.md 6.4) or for background ("background", sesame.md 4.3).
    """

    parts: str = "exclude"
    ignored: str = "leave out"


@dataclass(frozen=True)
class System:
    """A paper.

    published: the architectures in the `config.json` of its released checkpoints. published_tower: their vision tower,
    where these name a wrong one. published_tokenization: the transformers release whose ids the published figures of
    its bare weight file were made with; None: 4.31. prompt_template: the conversation template of generated answers
    where it is not the trained one. flags: command-line flags that only its original has. visible_padding: so many
    questions about a picture are answered together and see each other's padding, as released; 0: nothing sees padding.
    released_truth: what its released scoring of phrases compares with.
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
    released_truth: ReleasedTruth = ReleasedTruth()


def build_system(name: str, options: dict[str, Any] | None = None) -> System:
    """The system `name` with the recipe's `options`; an unknown name or option raises and lists the choices."""
    return SYSTEMS[name](**(options or {}))


def systems_accepting(options: dict[str, Any], flags: Iterable[str] = ()) -> list[str]:
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
    """Question and answer templates of a system, by list name; every template has the slots of its list."""

    name: str
    lists: dict[str, tuple[str, ...]]

    def sample(self, key: str, rng: np.random.Generator) -> str:
        templates = self.lists[key]
        return templates[rng.integers(len(templates))]


def load_wording(name: str, slots: dict[str, str]) -> Wording:
    """Reads `systems/wording/<name>.yaml` (or a YAML path) and checks it against `slots`: list name to slot names.

    Several slots of a list stand with blanks between them, `?` behind one that its templates may leave out; "" means
    none. Words may be filled in several times, masks and refusals once. A missing list, an empty one, or a template
    that has not the slots of its list is an error that names the file, the list and the template.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORDING / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in WORDING.glob("*.yaml")))
        raise FileNotFoundError(f"no wording {name!r}; have: {have}, or the path of a YAML file")
    lists = read_yaml(path) or {}
    if not isinstance(lists, dict) or set(lists) != set(slots):
        raise ValueError(
            f"{path}: expected the lists {', '.join(sorted(slots))}; got {', '.join(sorted(map(str, lists)))}"
        )
    for key, slot in slots.items():
        if not lists[key]:
            raise ValueError(f"{path}: the list {key!r} is empty")
        for template in lists[key]:
            if not _has_slots(template, slot):
                needed = sorted(name for name in slot.split() if not name.endswith("?"))
                wanted = [f"{{{name}}} once{'' if name in ONCE else ' or more'}" for name in needed]
                raise ValueError(f"{path}: {key}: {template!r} must hold {' and '.join(wanted) or 'no slot'}")
    return Wording(name, {key: tuple(templates) for key, templates in lists.items()})


def _has_slots(template: Any, slot: str) -> bool:
    """Whether a template holds these slots, with or without the optional ones."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (TypeError, ValueError):  # no text, or a brace that is not closed
        return False
    if any(form or conversion for _, form, conversion in fields):  # {phrase:>1000000000} is no slot
        return False
    found = [field for field, _, _ in fields]
    needed = {name for name in slot.split() if not name.endswith("?")}
    return set(found) in (needed, set(slot.replace("?", "").split())) and all(found.count(name) < 2 for name in ONCE)


def about_picture(text: str) -> str:
    """A first user turn: the picture's line, then `text` as it is (evaluation prompts begin with a blank)."""
    return f"{IMAGE_PLACEHOLDER}\n{text}"


def fill_answer(template: str, hole: Mask | Refuse) -> Script:
    """`It is {mask}.` -> ("It is ", hole, "."), without empty text."""
    before, after = template.split("{mask}")
    return tuple(part for part in (before, hole, after) if part != "")


def fill_template(template: str, **slots: str | Script) -> Script:
    """A template of several slots, filled with words or with pieces of answers."""
    script: list[str | Mask | Refuse] = []
    for text, name, _, _ in string.Formatter().parse(template):
        filled = slots[name] if name else ""
        script += [text, *([filled] if isinstance(filled, str) else filled)]
    return merge_text(script)


def pattern_before_mask(template: str) -> str:
    """A regular expression of the words before a template's mask, its slots as named groups."""
    clause, pattern, seen = template.partition("{mask")[0].strip(" :"), "", set()
    for text, name, _, _ in string.Formatter().parse(clause):
        slot = f"(?P={name})" if name in seen else f"(?P<{name}>.+?)"
        pattern += re.escape(text) + (slot if name else "")
        seen.add(name)
    return pattern


def merge_text(parts: Iterable[str | Mask | Refuse]) -> Script:
    """Neighbouring texts become one, empty ones go."""
    script: list[str | Mask | Refuse] = []
    for part in parts:
        if isinstance(part, str) and script and isinstance(script[-1], str):
            script[-1] += part
        elif part != "":
            script.append(part)
    return tuple(script)


def sample_items(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    """`number` of the items without replacement in random order; all of them in their own order where not more."""
    if len(items) <= number:
        return list(items)
    return [items[index] for index in rng.choice(len(items), number, replace=False)]


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    return [items[index] for index in rng.permutation(len(items))]


def random_name(target: Target, rng: np.random.Generator) -> str:
    """Any of the target's names: half the time a part is "the wheel of the car", else "car wheel" (lisa.md 4.3)."""
    names = (target.phrase, *target.aliases)
    return names[rng.integers(len(names))] if target.aliases else target.phrase


def asked_as(record: Record, phrase: str) -> str:
    """How the releases write a phrase into an evaluation question: lower-case, but of reasoning data as it is (lisa.md
    3.3); without outer blanks."""
    return phrase.strip() if record.kind in REASONING else phrase.strip().lower()


def label_set(record: Record) -> tuple[list[str], dict[str, int]]:
    """Lower-cased names in dataset order, and the target index of each present one.

    ValueError where a class is present as several targets: a list would speak of one of them only. Unlabelled is not
    absent: of a picture whose pixels are all ignored nothing is known (NothingToAsk). Of any other in which none of the
    names is present, it is known that all of them are absent.
    """
    names, present = _classes_of(record)
    if several := sorted({name for name in present if name and present.count(name) > 1}):
        raise ValueError(
            f"{record.image}: {', '.join(several)}: more than one target of the class, but a class list has one mask "
            "for each name; set the option instances of the source to union"
        )
    return names, {name: index for index, name in enumerate(present) if name}


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


def absent_classes(record: Record) -> list[Target]:
    """The classes of a label set that the picture does not have, in dataset order, with the other names they have."""
    names, present = _classes_of(record)
    others = record.vocabulary_aliases or ((),) * len(names)
    return [
        Target(name, None, aliases=aliases) for name, aliases in zip(names, others, strict=True) if name not in present
    ]


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
