"""Visual question answering with short answers, of which several may count as right: which general skill is left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.sources.base import (
    SOURCES,
    Fault,
    attempt,
    existing_file,
    field,
    file_below,
    indexed_rows,
    locate,
    read_json,
    with_slashes,
)
from data.types import IMAGE_PLACEHOLDER, Record, Turn
from utils.text import preview

HINT = "Answer the question using a single word or phrase."  # as LLaVA-1.5 asks for short answers
KEYS = ("image", "question", "answer", "answers")


@SOURCES.register("vqa")
class ShortAnswers:
    """A JSON list of {image, question, answer} or {image, question, answers: [...]}; one record per image.

    file: below the dataset folder, or absolute; None: vqa/<split>.json.
    images: the folder of the images, the same way; None: the file's folder.
    hint: goes after every question, on a line of its own; "" for none.
    """

    def __init__(
        self, root: Path, split: str = "val", file: str | None = None, images: str | None = None, hint: str = HINT
    ):
        if file:
            self.files = (existing_file(root, file, "file of vqa"),)
        else:
            self.files = tuple(locate(root, f"vqa {split}", (f"vqa/{split}.json",)))
        self._folder = existing_file(root, images, "images of vqa") if images else self.files[0].parent
        self._hint = f"\n{hint}" if hint else ""
        self._rows = indexed_rows(root, parse, self.files, image_key="image")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image = file_below(self._folder, row["image"], f"{self.files[0]}: entry {row['entries'][0][0]}")
        dialogues = tuple(
            (Turn(f"{IMAGE_PLACEHOLDER}\n{question}{self._hint}", (answers[0],)),)
            for _, question, answers in row["entries"]
        )
        return Record(
            image, "vqa", dialogues=dialogues, accepted=tuple(tuple(answers) for *_, answers in row["entries"])
        )

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]


def parse(path: Path) -> Iterator[Any]:
    """A row per image, in the order of the file; its entries are [number of the entry, question, accepted answers]."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of questions, got {preview(entries)}")
    questions_of: dict[str, list[list[Any]]] = {}  # image -> its questions
    for index, entry in enumerate(entries):
        item = attempt(partial(_entry, entry, f"{path}: entry {index}"))
        if isinstance(item, Fault):
            yield item
        else:
            image, *question = item
            questions_of.setdefault(image, []).append([index, *question])
    for image, questions in questions_of.items():
        yield {"image": image, "entries": questions}


def _entry(entry: Any, where: str) -> list[Any]:
    """[image, question, accepted answers]."""
    image, question = (_text(field(entry, key, where), key, where) for key in ("image", "question"))
    return [with_slashes(image), question, _answers(entry, where)]


def _answers(entry: dict[str, Any], where: str) -> list[str]:
    """The answers that count as right, without repetitions; training uses the first."""
    if unknown_keys := [key for key in entry if key not in KEYS and key != "id"]:
        raise ValueError(f"{where}: unknown {', '.join(unknown_keys)}; an entry has {', '.join(KEYS)}, and may have id")
    if ("answer" in entry) == ("answers" in entry):
        raise ValueError(f"{where}: give answer or answers")
    answers = entry["answers"] if "answers" in entry else [entry["answer"]]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: answers must be a list of one or more, got {answers!r}")
    return list(dict.fromkeys(_text(answer, "an answer", where) for answer in answers))


def _text(value: Any, what: str, where: str) -> str:
    """Text without outer blanks, or a number as text; ValueError otherwise."""
    value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be text, got {value!r}")
    return value.strip()
