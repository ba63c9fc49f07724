"""Your own images and label maps in a folder: images/, masks/ and classes.txt. See docs/your_data.md."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.sources.base import SOURCES, locate
from data.sources.semantic import (
    Classes,
    LabelMaps,
    Pairs,
    Table,
    pair_files,
    read_label_map,
    select_classes,
    values_in,
)
from utils.text import read_text

NUMBERED = re.compile(r"([+-]?\d+)\s*:\s*(.+)")
ALMOST = re.compile(r"[+-]?\d+\s*([,;=\t.)|]| +\S)")  # a number in front, but not with a colon
NUMBER_LAST = re.compile(r".*[:,;=\t]\s*\d+")  # a number at the end
UNLABELLED = frozenset({0, 255})  # unless classes.txt gives them a name
LARGEST = 65535
SAMPLE = 8  # label maps that are read when the folder is opened, to find 0/255 masks


@SOURCES.register("folder")
def folder(
    root: Path,
    folder: str = ".",
    split: str = "",
    classes: Classes = None,
    ignore_unknown: bool = False,
    background: int | None = None,
) -> LabelMaps:
    """`<folder>/images[/<split>]/x.jpg` with `<folder>/masks[/<split>]/x.png` and `<folder>/classes.txt`.

    classes: use only these names. ignore_unknown: count values without a name as unlabelled, instead of refusing a map.
    background: the value of pixels that are known to be of no class; None: 0 where the only class of the list is
    another value, since unlabelled pixels next to a single class would leave nothing that can be wrong.
    """
    base = Path(folder)
    places = [str(base / kind / split) for kind in ("images", "masks")]
    images, maps, names = locate(root, f"folder {folder}", (*places, str(base / "classes.txt")))
    entries, numbered = read_classes(names)
    named = dict(entries)
    if background is None and len(named) == 1 and 0 not in named:
        background = 0
    if background in named:
        raise ValueError(f"background: {names} gives the value {background} a name, {named[background]!r}")
    outside = frozenset(() if background is None else (background,))
    void = UNLABELLED - named.keys() - outside
    pairs = pair_files(images, maps)
    hint = ""
    if not numbered:
        hint = f". The names in {names} have no numbers, so they count from 0: {_two_ways(entries)}"
    if not numbered and len(entries) == 1:
        void = frozenset()  # with a single class, 255 more likely means that class than unlabelled pixels
    elif 255 in void and len(entries) > 1 and not ignore_unknown:
        _refuse_binary(
            pairs, maps, f" ({names}): {_two_ways(entries)}; the option ignore_unknown takes them as they are"
        )
    table = select_classes(Table.of(entries, void, outside), classes, root)
    return LabelMaps(pairs, (images, maps), table, ignore_unknown, hint)


def read_classes(path: Path) -> tuple[list[tuple[int, str]], bool]:
    """[(label value, name), ...] of a class list, and whether the file gives the values.

    A line is `value: name`, or a name alone; names alone count from 0. ValueError if a value has two names (it shows
    both lines), if only some lines have a value, or if a value is out of range.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise ValueError(f"{path}: names no class; write one name per line, or `value: name`")
    matches = [NUMBERED.fullmatch(line) for _, line in lines]
    if not any(matches):
        if reason := _no_plain_names(lines):
            raise ValueError(f"{path}: {reason}")
        return list(enumerate(line for _, line in lines)), False
    numbered = [match for match in matches if match is not None]
    if len(numbered) < len(lines):
        odd = lines[matches.index(None)][1]
        raise ValueError(f"{path}: {odd!r} has no value, other lines have; number all lines or none")
    first: dict[int, tuple[int, str]] = {}  # value -> number and text of the line that gives it
    for (number, line), match in zip(lines, numbered, strict=True):
        value = int(match[1])
        if not 0 <= value <= LARGEST:
            raise ValueError(f"{path}: line {number} ({line!r}): a label value is 0 to {LARGEST}")
        if value in first:
            before, text = first[value]
            raise ValueError(
                f"{path}: the value {value} is given twice, in line {before} ({text!r}) and line {number} ({line!r}); "
                "a value has one name"
            )
        first[value] = number, line
    return [(int(match[1]), match[2]) for match in numbered], True


def _no_plain_names(lines: list[tuple[int, str]]) -> str:
    """Why lines are not names that count from 0, "" if they are: one line too many would shift every class.

    lines: number and text of those that are not blank.
    """
    texts = [text for _, text in lines]
    if texts[0] == "__ignore__":
        return (
            "labelme counts '__ignore__' as -1, so the next line is the value 0; remove it, or write `value: name` for "
            "the classes, with the option `background: 0`"
        )
    if marked := [text for text in texts if text.startswith(("#", "- "))]:
        return f"{marked[0]!r} is no plain name; write names alone, one per line, or `value: name`"
    if all(map(ALMOST.match, texts)):
        return f"{texts[0]!r} begins with a number; write `value: name`, with a colon"
    if len(texts) > 1 and all(map(ALMOST.match, texts[1:])):
        return f"{texts[1]!r} begins with a number, as all lines but {texts[0]!r}; write `value: name`, with a colon"
    if all(map(NUMBER_LAST.fullmatch, texts)) or _count_up(texts):
        return f"{texts[0]!r} ends with a number; write `value: name`, the value first"
    for (before, _), (number, text) in pairwise(lines):
        if number > before + 1:
            return f"a blank line stands before {text!r}, so its value is not clear; write `value: name`"
    return ""


def _count_up(texts: list[str]) -> bool:
    """Whether different names count from 0 or 1: `cup 1`, `plate 2`; `zone 1`, `zone 2` are names."""
    matches = [match for text in texts if (match := re.fullmatch(r"(.*\S)\s+(\d+)", text))]
    count, numbers = len(texts), [int(match[2]) for match in matches]
    different = len({match[1] for match in matches}) == count > 1
    return different and numbers in (list(range(count)), list(range(1, count + 1)))


def _refuse_binary(pairs: Pairs, maps: Path, hint: str) -> None:
    """ValueError if the masks hold nothing but 0 and 255 and 255 has no name: the object would be ignored pixels."""
    values: set[int] = set()
    for index in np.unique(np.linspace(0, len(pairs.rows) - 1, SAMPLE).astype(int)):
        try:
            values |= values_in(read_label_map(maps / pairs.rows[int(index)][1]))
        except (OSError, ValueError):
            continue  # a fault of that record, raised when it is read
    if 255 in values and values <= UNLABELLED:
        raise ValueError(f"{maps}: the label maps hold no value but 0 and 255, and 255 has no name{hint}")


def _two_ways(entries: list[tuple[int, str]]) -> str:
    """The two lines that classes.txt could have for masks of 0 and 255, for messages."""
    name = entries[-1][1]
    return (
        f"write `255: {name}` if 255 is {name!r}, or `0: {entries[0][1]}` if 0 is {entries[0][1]!r} and 255 unlabelled"
    )
