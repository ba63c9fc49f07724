"""LLaVA-Instruct: dialogues of several rounds about an image, without masks (lisa.md 4.5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.sources.base import SOURCES, attempt, field, file_below, file_field, indexed_rows, locate, read_json
from data.types import IMAGE_PLACEHOLDER, Dialogue, Record, Turn
from utils.text import preview


@SOURCES.register("llava_instruct_150k")
class LlavaInstruct:
    """One record per entry, with one dialogue that holds all its rounds. The file has the split "train" only."""

    def __init__(self, root: Path, split: str = "train"):
        if split != "train":
            raise ValueError(f"llava_instruct_150k has no split {split!r}; have: train")
        (self._file,) = locate(root, "llava_instruct_150k", ("llava_dataset/llava_instruct_150k.json",))
        self.files = (self._file,)
        (self._folder,) = locate(root, "images of llava_instruct_150k", ("coco/train2017",))
        self._rows = indexed_rows(root, parse, self.files, image_key=1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        name, image, rounds = self._rows[index]
        where = f"{self._file}: entry {index} (id {name})"
        return Record(file_below(self._folder, image, where), "vqa", dialogues=(dialogue(rounds, where),))

    def image_paths(self) -> list[str]:
        return [f"{self._folder}/{name}" for name in self._rows.image_names()]


def parse(path: Path) -> Iterator[Any]:
    """A row per entry: [id, image, [[speaker, text], ...]]."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of dialogues, got {preview(entries)}")
    for index, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        yield attempt(partial(_entry, entry, f"{path}: entry {index}"), image)


def _entry(entry: Any, where: str) -> list[Any]:
    image, messages = file_field(entry, "image", where), field(entry, "conversations", where, list)
    where += f" (id {entry.get('id')})"
    rounds = [
        [field(one, key, f"{where}: conversations[{number}]", str) for key in ("from", "value")]
        for number, one in enumerate(messages)
    ]
    return [entry.get("id"), image, rounds]


def dialogue(rounds: list[list[str]], where: str) -> Dialogue:
    """Turns of question and answer; the image placeholder goes in front of the first question, on a line of its own.

    As released, only a message with the placeholder loses its outer blanks (lisa.md 4.5). ValueError unless human and
    gpt take turns.
    """
    messages = [
        (speaker, text.replace(IMAGE_PLACEHOLDER, "").strip() if IMAGE_PLACEHOLDER in text else text)
        for speaker, text in rounds
    ]
    if messages and messages[0][0] == "gpt":  # an answer without a question is dropped, as LLaVA does
        messages = messages[1:]
    speakers = [speaker for speaker, _ in messages]
    if not messages or len(messages) % 2 or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise ValueError(f"{where}: human and gpt must take turns and gpt speak last; got {', '.join(speakers) or '-'}")
    turns = [
        Turn(question, (answer,)) for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True)
    ]
    return (Turn(f"{IMAGE_PLACEHOLDER}\n{turns[0].question}", turns[0].answer), *turns[1:])
