"""MUSE: questions whose answer holds several objects (pixellm.md 3.4, 4.1)."""

from __future__ import annotations

import os
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
    file_field,
    indexed_rows,
    locate,
    non_blank,
    of_kind,
    path_below,
    read_json,
)
from data.types import Dialogue, Mask, Record, Script, Target, Turn
from utils.log import log
from utils.masks import CachedMask

PLACEHOLDER = "{seg}"  # stands for a mask in a text answer
NAMES = ("plain", "published")
SPLITS = {"train": "train", "val": "val", "test_few": "test_less", "test_less": "test_less", "test_many": "test_many"}
FOLDERS = ("refer_seg/images/mscoco/images", "images/mscoco/images", "coco")


@SOURCES.register("muse", "MultiReasonSeg")
class Muse:
    """One record per image, one dialogue per question, targets in the order of the answers' holes.

    An answer without text in the dataset is a row of holes for the task to word. The phrase of a target is its
    rephrased name, and its category is among the aliases.

    split: train, val, test_few (test_less in the files), test_many.
    names: "published" leaves a category as the file spells it ("lamp_(furniture)", pixellm.md 3.4); "plain" removes
        underscores and what stands in brackets.
    """

    def __init__(self, root: Path, split: str = "train", names: str = "plain"):
        plain = choice("names of muse", names, NAMES) == "plain"
        stem = SPLITS[choice("split of muse", split, SPLITS)]
        places = [(f"{base}{name}_{stem}.json",) for base in ("muse/", "", "MUSE/") for name in ("muse", "MUSE")]
        self.files = tuple(locate(root, f"muse {split}", *places))
        self._folders = [root / base for base in FOLDERS]
        self._rows = indexed_rows(root, parse, self.files, plain, image_key="file_name")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        where = f"{self.files[0]}: entry {row['entry']}"
        targets: list[Target] = []
        dialogues: list[Dialogue] = []
        for number, (question, text, objects) in enumerate(row["questions"]):
            first = len(targets)
            for place, (names, segmentation) in enumerate(objects):
                origin = f"{where}: question {number}: answer {place}"
                mask = CachedMask(partial(rasterize, [segmentation], tuple(row["size"]), "union", origin), origin)
                targets.append(Target(names[0], mask, aliases=tuple(names[1:])))
            dialogues.append((Turn(question, answer(text, range(first, len(targets)))),))
        path_below(self._folders[0], row["file_name"], where)  # refuses a name that leaves the folder
        image = Path(self._image_path(row["file_name"]))
        if not image.is_file():
            raise FileNotFoundError(f"{where}: no image {row['file_name']} in {', '.join(map(str, self._folders))}")
        return Record(image, "multi", tuple(targets), dialogues=tuple(dialogues))

    def image_paths(self) -> list[str]:
        return [self._image_path(name) for name in self._rows.image_names()]

    def _image_path(self, name: str) -> str:
        """The path of an image in the first COCO folder that has it; without any, its path in the first folder."""
        paths = [f"{folder}/{name}" for folder in self._folders]
        return next((path for path in paths if os.path.isfile(path)), paths[0])


def answer(text: str | None, targets: range) -> Script:
    """An answer: the text with a hole in place of each placeholder, or holes alone if there is no text.

    Split literally, because texts hold other braces that string formatting would trip over.
    """
    if text is None:
        return tuple(Mask(index) for index in targets)
    pieces = text.split(PLACEHOLDER)
    script: list[str | Mask] = [pieces[0]]
    for index, piece in zip(targets, pieces[1:], strict=True):
        script += [Mask(index), piece]
    return tuple(part for part in script if part != "")


def parse(path: Path, plain: bool) -> Iterator[Any]:
    """A row per image; its questions are [question, text or None, [[names, segmentation], ...]].

    Left out, and counted in a warning: images without questions, questions without objects, and text answers with
    another number of placeholders than of objects. plain: see `names` of Muse.
    """
    entries = read_json(path)
    without_questions = uneven = 0
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of images, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        where = f"{path}: entry {index}"
        row = attempt(partial(_entry, entry, index, where, plain))
        if isinstance(row, Fault):
            yield row
            continue
        questions = [item for item in row["questions"] if item[2] and _is_complete(item)]
        uneven += sum(not _is_complete(item) for item in row["questions"])
        if questions:
            yield {**row, "questions": questions}
        else:
            without_questions += 1
    if without_questions or uneven:
        log.warning("%s: left out %d images without a question, %d uneven answers", path, without_questions, uneven)


def _entry(entry: Any, index: int, where: str, plain: bool) -> dict[str, Any]:
    name, size = _file_name(of_kind(entry, dict, "an entry", where), where), size_of(entry, where)
    return {"entry": index, "file_name": name, "size": size, "questions": list(_questions(entry, where, plain))}


def _questions(entry: dict[str, Any], where: str, plain: bool) -> Iterator[list[Any]]:
    """[question, text or None, [[names, segmentation], ...]] of an entry; its parallel lists must have one length."""
    questions = of_kind(entry.get("questions") or [], list, "questions", where)
    answers = field(entry, "answers", where, list) if questions else []
    texts = of_kind(entry.get("text_answers") or [None] * len(questions), list, "text_answers", where)
    if not len(questions) == len(answers) == len(texts):
        raise ValueError(f"{where}: {len(questions)} questions, {len(answers)} answers, {len(texts)} text answers")
    for number, (question, objects, text) in enumerate(zip(questions, answers, texts, strict=True)):
        place = f"{where}: answers[{number}]"
        question = non_blank(question, f"questions[{number}]", where)
        text = None if text is None else of_kind(text, str, f"text_answers[{number}]", where)
        objects = [
            [_names(item, place, plain), field(item, "segmentation", place)]
            for item in of_kind(objects, list, "it", place)
        ]
        yield [question, text, objects]


def _is_complete(item: list[Any]) -> bool:
    """Whether a question's text has one placeholder per object; without text nothing can be missing."""
    return item[1] is None or item[1].count(PLACEHOLDER) == len(item[2])


def _names(instance: dict[str, Any], where: str, plain: bool) -> list[str]:
    """The rephrased name, if there is one, then the category."""
    category = non_blank(field(instance, "category_name", where), "category_name", where)
    category = category.partition("_(")[0].replace("_", " ") if plain else category
    rephrased = of_kind(instance.get("rephrased_name") or "", str, "rephrased_name", where)
    return list(dict.fromkeys(name.strip() for name in (rephrased, category) if name.strip()))


def _file_name(entry: dict[str, Any], where: str) -> str:
    """The image's path below a COCO folder: `train2014/<file_name>`, or year and name from the end of its URL."""
    if entry.get("file_name"):
        return f"train2014/{file_field(entry, 'file_name', where)}"
    url = PurePosixPath(str(field(entry, "coco_url", where)))
    return f"{'train2017' if 'train2017' in url.parts else 'val2017'}/{url.name}"
