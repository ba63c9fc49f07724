"""Questions with short answers, of which more than one may count as right: what general skill is kept (VQA)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.sources.base import SOURCES, Fault, attempt, field, indexed_rows, locate, picture, read_json, shortened
from data.sources.coco import existing_file
from data.types import IMAGE_PLACEHOLDER, Record, Turn

HINT = "Answer the question using a single word or phrase."  # as LLaVA-1.5 asks for short answers
KEYS = ("image", "question", "answer", "answers")


@SOURCES.register("vqa")
class ShortAnswers:
    """A JSON list of {image, question, answer} or {image, question, answers: [...]}; one record a picture.

    file, images: below the dataset folder, or absolute; without them vqa/<split>.json, and the file's folder. hint: put
    behind every question, "" for none.
    """

    def __init__(
        self, root: Path, split: str = "val", file: str | None = None, images: str | None = None, hint: str = HINT
    ):
        found = (
            [existing_file(root, file, "file of vqa")] if file else locate(root, f"vqa {split}", (f"vqa/{split}.json",))
        )
        self.files = tuple(found)
        self._folder = existing_file(root, images, "images of vqa") if images else self.files[0].parent
        self._hint = f"\n{hint}" if hint else ""
        self._rows = indexed_rows(root, parse, self.files, picture="image")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image = picture(self._folder, row["image"], f"{self.files[0]}: entry {row['entries'][0][0]}")
        asked = tuple(
            (Turn(f"{IMAGE_PLACEHOLDER}\n{question}{self._hint}", (answers[0],)),)
            for _, question, answers in row["entries"]
        )
        return Record(image, "vqa", dialogues=asked, accepted=tuple(tuple(answers) for *_, answers in row["entries"]))

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.pictures()]


def parse(path: Path) -> Iterator[Any]:
    """A row a picture: [entry, question, accepted answers] each, in the order of the file."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of questions, got {shortened(entries)}")
    pictures: dict[str, list[list[Any]]] = {}
    for index, entry in enumerate(entries):
        read = attempt(partial(_entry, entry, f"{path}: entry {index}"))
        if isinstance(read, Fault):
            yield read
        else:
            image, *asked = read
            pictures.setdefault(image, []).append([index, *asked])
    for image, questions in pictures.items():
        yield {"image": image, "entries": questions}


def _entry(entry: Any, where: str) -> list[Any]:
    """[picture, question, accepted answers]."""
    texts = [_text(field(entry, key, where), key, where) for key in ("image", "question")]
    return [*texts, _answers(entry, where)]


def _answers(entry: dict[str, Any], where: str) -> list[str]:
    """What counts as right, each once, the first one the one to be trained on."""
    if strange := [key for key in entry if key not in KEYS and key != "id"]:
        raise ValueError(f"{where}: unknown {', '.join(strange)}; an entry has {', '.join(KEYS)}, and may have id")
    if ("answer" in entry) == ("answers" in entry):
        raise ValueError(f"{where}: give answer or answers")
    answers = entry["answers"] if "answers" in entry else [entry["answer"]]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: answers must be a list of one or more, got {answers!r}")
    return list(dict.fromkeys(_text(answer, "an answer", where) for answer in answers))


def _text(value: Any, what: str, where: str) -> str:
    value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be text, got {value!r}")
    return value.strip()
