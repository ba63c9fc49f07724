"""Templates of questions and answers: reading them from YAML, checking their fields, filling them in."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.types import IMAGE_PLACEHOLDER, Mask, Refuse, Script
from systems.reading import MARKS
from utils.plain import read_yaml
from utils.text import preview

WORDING = Path(__file__).parent / "wording"
ONCE = ("mask", "masks", "refuse")  # fields that stand for tokens; fields of words may occur several times


@dataclass(frozen=True)
class Wording:
    """Question and answer templates of a system, by list name; every template has the fields of its list."""

    name: str
    lists: dict[str, tuple[str, ...]]

    def sample(self, key: str, rng: np.random.Generator) -> str:
        """A template of the list `key`, each with the same probability (one number from `rng`)."""
        templates = self.lists[key]
        return templates[rng.integers(len(templates))]


def load_wording(name: str, fields: dict[str, str]) -> Wording:
    """Reads `systems/wording/<name>.yaml` (or a YAML path) and checks it against `fields`: list name to field names.

    The names of several fields are separated by blanks; `?` after a name makes it optional; "" means no field. A
    template may repeat a field of words; a field of masks or refusals occurs once. For example

        {"answer": "mask", "confirm": "phrase? mask", "explain": ""}

    accepts `It is {mask}.` as an answer, `{mask}.` and `The {phrase} is {mask}.` as confirmations. A missing or empty
    list, or a template without the fields of its list, raises a ValueError that names the file, the list and the
    template.
    """
    path = wording_file(name)
    lists = read_yaml(path) or {}
    if not isinstance(lists, dict) or set(lists) != set(fields):
        have = sorted(map(str, lists)) if isinstance(lists, dict) else []
        wrong = [f"{name} is missing" for name in sorted(set(fields) - set(have))]
        wrong += [f"{name} is unknown" for name in have if name not in fields]
        raise ValueError(f"{path}: expected the lists {', '.join(sorted(fields))}; {', '.join(wrong)}")
    for key, names in fields.items():
        if not lists[key]:
            raise ValueError(f"{path}: the list {key!r} is empty")
        if not isinstance(lists[key], list):
            raise ValueError(f"{path}: {key} must be a list, one template a line after `- `; got {preview(lists[key])}")
        for template in lists[key]:
            if not isinstance(template, str):  # YAML reads {phrase} without quotes as a mapping
                raise ValueError(f"{path}: {key}: a template is text in quotes; got {preview(template)}")
            if not _has_fields(template, names):
                needed = sorted(name for name in names.split() if not name.endswith("?"))
                wanted = [f"{{{name}}} once{'' if name in ONCE else ' or more'}" for name in needed]
                raise ValueError(f"{path}: {key}: {template!r} must hold {' and '.join(wanted) or 'no field'}")
    # without fields a template is never filled in, so that its doubled braces are made single here
    return Wording(name, {key: tuple(t if fields[key] else t.format() for t in lists[key]) for key in lists})


def wording_file(name: str) -> Path:
    """`systems/wording/<name>.yaml`, or the file itself where `name` is the path of a YAML file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORDING / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in WORDING.glob("*.yaml")))
        raise FileNotFoundError(f"no wording {name!r}; have: {have}, or the path of a YAML file")
    return path


def _has_fields(template: str, names: str) -> bool:
    """Whether a template has these fields, with all of the optional ones or none."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a brace that is not closed
        return False
    # A template may come from a stranger's file: {phrase:>1000000000} would fill the memory, {phrase!r} quote.
    if any(form or conversion for _, form, conversion in parts):
        return False
    present = [name for name, _, _ in parts]
    required = {name for name in names.split() if not name.endswith("?")}
    allowed = (required, set(names.replace("?", "").split()))
    return set(present) in allowed and all(present.count(name) < 2 for name in ONCE)


def about_image(text: str) -> str:
    """A first user turn: the image's line, then `text` as it is (published evaluation prompts begin with a blank)."""
    return f"{IMAGE_PLACEHOLDER}\n{text}"


def fill_answer(template: str, hole: Mask | Refuse) -> Script:
    """`It is {mask}.` -> ("It is ", hole, "."), without empty text."""
    return fill_template(template, mask=(hole,))


def fill_template(template: str, **values: str | Sequence[str | Mask | Refuse]) -> Script:
    """A template of several fields, each filled with words or with pieces of an answer.

    >>> fill_template("The {phrase} is {mask}.", phrase="cat", mask=(Mask(0),))
    ('The cat is ', Mask(target=0), '.')
    """
    script: list[str | Mask | Refuse] = []
    for text, name, _, _ in string.Formatter().parse(template):
        script.append(text)
        if name:
            value = values[name]
            script += [value] if isinstance(value, str) else value
    return merge_text(script)


def merge_text(parts: Iterable[str | Mask | Refuse]) -> Script:
    """Joins neighbouring texts into one and drops empty ones."""
    script: list[str | Mask | Refuse] = []
    for part in parts:
        if isinstance(part, str) and script and isinstance(script[-1], str):
            script[-1] += part
        elif part != "":
            script.append(part)
    return tuple(script)


def check_names(wording: Wording, field: str, *keys: str) -> None:
    """ValueError for a template of these lists that has the name `field` only after its mask: answers are read as masks
    with the words before them, so that it would be the name of the next mask."""
    for key in keys:
        for template in wording.lists[key]:
            before, after = _around_mask(template)
            if f"{{{field}}}" in after and f"{{{field}}}" not in before:
                raise ValueError(
                    f"{wording_file(wording.name)}: {key}: {template!r} names a mask after it; put {{{field}}} before "
                    "the mask, since an answer is read as masks with the words before them"
                )


def _around_mask(template: str) -> tuple[str, str]:
    """What stands before and after the field `mask` or `masks`, written as `read_claims` writes words."""
    before, _, after = template.partition("{mask")
    before, after = (" ".join(part.split()).strip(MARKS) for part in (before, after.partition("}")[2]))
    return before, after


def pattern_before_mask(template: str) -> str:
    """A regular expression for the words before a template's mask, as `read_claims` gives them, with fields as groups.

    A field that the template repeats must read the same each time: `{phrase}, yes, {phrase} is {mask}` becomes
    `(?P<phrase>.+?), yes, (?P=phrase) is` and does not match "red cat, yes, a dog is".
    """
    clause, _ = _around_mask(template)
    pattern = ""
    names: set[str] = set()
    for text, name, _, _ in string.Formatter().parse(clause):
        pattern += re.escape(text)
        if name:
            pattern += f"(?P={name})" if name in names else f"(?P<{name}>.+?)"
            names.add(name)
    return pattern


def pattern_after_masks(templates: Iterable[str]) -> str:
    """A regular expression for what such templates say after a mask: it stands before the name of the next one."""
    endings = {_around_mask(template)[1] for template in templates}
    words = sorted((ending for ending in endings if ending and "{" not in ending), key=len, reverse=True)
    return f"(?:(?:{'|'.join(map(re.escape, words))})[{MARKS}]+)?" if words else ""
