"""MUSE: questions whose answer holds several objects (pixellm.md 3.4, 4.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data.readers.coco_file import rasterize, size_of
from data.sources.base import (
    SOURCES,
    Fault,
    attempt,
    choice,
    field,
    indexed_rows,
    inside,
    locate,
    of_kind,
    read_json,
    spoken,
)
from data.types import Dialogue, Mask, Record, Script, Target, Turn
from utils.masks import CachedMask

PLACEHOLDER = "{seg}"
NAMES = ("plain", "published")
SPLITS = {"train": "train", "val": "val", "test_few": "test_less", "test_less": "test_less", "test_many": "test_many"}
FOLDERS = ("refer_seg/images/mscoco/images", "images/mscoco/images", "coco")
log = logging.getLogger(__name__)


@SOURCES.register("muse", "MultiReasonSeg")
class Muse:
    """One record a picture, one dialogue of `asked` a question, targets in the order of the answers' holes.

    An answer without text in the dataset is a row of holes for the task to word; a target is called by its rephrased
    name, with its category among the aliases. split: train, val, test_few (test_less in the files), test_many.
    names: "published" leaves a category as the file spells it ("lamp_(furniture)", pixellm.md 3.4); "plain" has no
    underscores and no distinction in brackets.
    """

    def __init__(self, root: Path, split: str = "train", names: str = "plain"):
        plain = choice("names of muse", names, NAMES) == "plain"
        stem = SPLITS[choice("split of muse", split, SPLITS)]
        places = [(f"{base}{name}_{stem}.json",) for base in ("muse/", "", "MUSE/") for name in ("muse", "MUSE")]
        self.files = tuple(locate(root, f"muse {split}", *places))
        self._folders = [root / base for base in FOLDERS]
        self._rows = indexed_rows(root, parse, self.files, plain, picture="file_name")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: entry {row['entry']}"
        targets: list[Target] = []
        asked: list[Dialogue] = []
        for number, (question, text, objects) in enumerate(row["questions"]):
            first = len(targets)
            for place, (names, segmentation) in enumerate(objects):
                origin = f"{where}: question {number}: answer {place}"
                mask = CachedMask(partial(rasterize, [segmentation], tuple(row["size"]), "union", origin), origin)
                targets.append(Target(names[0], mask, aliases=tuple(names[1:])))
            asked.append((Turn(question, answer(text, range(first, len(targets)))),))
        image = self._found(row["file_name"], where)
        if not image.is_file():
            raise FileNotFoundError(f"{where}: no picture {row['file_name']} in {', '.join(map(str, self._folders))}")
        return Record(image, "multi", tuple(targets), dialogues=tuple(asked))

    def image_paths(self) -> list[str]:
        return [str(self._found(name, self.files[0].name)) for name in self._rows.pictures()]

    def _found(self, name: str, where: str) -> Path:
        """The picture in the first of the known COCO folders that has it; else where it would be in the first."""
        paths = [inside(folder, name, where) for folder in self._folders]
        return next((path for path in paths if path.is_file()), paths[0])


def answer(text: str | None, targets: range) -> Script:
    """The text with its placeholders replaced, literally; without text the holes alone."""
    if text is None:
        return tuple(Mask(index) for index in targets)
    pieces = text.split(PLACEHOLDER)
    script: list[str | Mask] = [pieces[0]]
    for index, piece in zip(targets, pieces[1:], strict=True):
        script += [Mask(index), piece]
    return tuple(part for part in script if part != "")


def parse(path: Path, plain: bool) -> Iterator[Any]:
    """A row per picture: [question, text or None, [[names, segmentation], ...]] each. plain: see `names` of Muse.

    Left out, and counted in a warning: pictures without questions, questions without objects, and text answers whose
    placeholders are not as many as their objects.
    """
    entries, silent, uneven = read_json(path), 0, 0
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of pictures, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        where = f"{path}: entry {index}"
        read = attempt(partial(_entry, entry, index, where, plain))
        if isinstance(read, Fault):
            yield read
            continue
        kept = [item for item in read["questions"] if item[2] and _even(item)]
        uneven += sum(not _even(item) for item in read["questions"])
        if kept:
            yield {**read, "questions": kept}
        silent += not kept
    if silent or uneven:
        log.warning("%s: left out %d pictures without a question, %d uneven answers", path, silent, uneven)


def _entry(entry: Any, index: int, where: str, plain: bool) -> dict[str, Any]:
    name, size = _file_name(of_kind(entry, dict, "an entry", where), where), size_of(entry, where)
    return {"entry": index, "file_name": name, "size": size, "questions": list(_questions(entry, where, plain))}


def _questions(entry: dict[str, Any], where: str, plain: bool) -> Iterator[list[Any]]:
    questions = of_kind(entry.get("questions") or [], list, "questions", where)
    answers = field(entry, "answers", where, list) if questions else []
    texts = of_kind(entry.get("text_answers") or [None] * len(questions), list, "text_answers", where)
    if not len(questions) == len(answers) == len(texts):
        raise ValueError(f"{where}: {len(questions)} questions, {len(answers)} answers, {len(texts)} text answers")
    for number, (question, objects, text) in enumerate(zip(questions, answers, texts, strict=True)):
        place = f"{where}: answers[{number}]"
        question = spoken(question, f"questions[{number}]", where)
        text = None if text is None else of_kind(text, str, f"text_answers[{number}]", where)
        objects = [
            [_names(item, place, plain), field(item, "segmentation", place)]
            for item in of_kind(objects, list, "it", place)
        ]
        yield [question, text, objects]


def _even(item: list[Any]) -> bool:
    return item[1] is None or item[1].count(PLACEHOLDER) == len(item[2])


def _names(instance: dict[str, Any], where: str, plain: bool) -> list[str]:
    """The rephrased name and then the category, or the category alone."""
    category = spoken(field(instance, "category_name", where), "category_name", where)
    category = category.partition("_(")[0].replace("_", " ") if plain else category
    rephrased = of_kind(instance.get("rephrased_name") or "", str, "rephrased_name", where)
    return list(dict.fromkeys(name.strip() for name in (rephrased, category) if name.strip()))


def _file_name(entry: dict[str, Any], where: str) -> str:
    """`train2014/<file_name>`, or the folder and name that the URL ends with."""
    if entry.get("file_name"):
        return f"train2014/{field(entry, 'file_name', where, str)}"
    url = PurePosixPath(str(field(entry, "coco_url", where)))
    return f"{'train2017' if 'train2017' in url.parts else 'val2017'}/{url.name}"
