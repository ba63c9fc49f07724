"""ReasonSeg: implicit queries about a picture, polygons in a labelme-like file beside it (lisa 4.6, sesame 4.3)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import SOURCES, choice, field, locate, picture_size, read_json
from data.sources.false_premise import truth
from data.types import Record, Target, Turn
from utils.masks import Once, Size, paint_shapes

TARGET, IGNORED = 1, 255
TEXTS = ("all", "first", "pair")
ENCODINGS = ("utf-8-sig", "cp1252")
PICTURES = (".jpg", ".jpeg", ".png")
FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg")


@SOURCES.register("ReasonSeg")
class ReasonSeg:
    """Every text of a picture has the same mask; a sentence is of kind "reason", a phrase of kind "phrase".

    split: one, or several joined (`train_val`). explanations: put the explanation of `explanatory/train.json` into
    `Record.asked`; None: if the file is there. texts: "all" rephrasings are targets, or only the "first", which is the
    published evaluation. SESAME's release also has questions about what is not there: they follow as absent targets,
    whose `correction` is the whole answer, each with a flag of its own that says if it is a sentence; "first" keeps one
    of them, and "pair", SESAME's evaluation of one true and one false question per picture, also refuses a picture
    that has none (sesame.md 6.4).
    """

    def __init__(self, root: Path, split: str = "train", explanations: bool | None = None, texts: str = "all"):
        self._at_most = None if choice("texts of ReasonSeg", texts, TEXTS) == "all" else 1
        self._paired = texts == "pair"
        self._files: list[tuple[Path, Path]] = []
        for part in split.split("_"):
            (folder,) = locate(root, f"ReasonSeg {part}", *((f"{base}/{part}",) for base in FOLDERS))
            self._files += _pairs(folder)
        self._explained = _explanations(root, explanations)

    def __len__(self) -> int:
        return len(self._files)

    def image_paths(self) -> list[str]:
        return [str(image) for image, _ in self._files]

    def __getitem__(self, index: int) -> Record:
        image, path = self._files[index]
        entry = read_json(path, ENCODINGS)
        painted = Once(partial(paint, field(entry, "shapes", str(path)), picture_size(image), path))
        mask = Once(partial(_equals, painted, TARGET))
        true, false = [Target(text, mask) for text in _texts(entry, path)], _false_premises(entry, path)
        if self._paired and not false:
            raise ValueError(
                f"{path}: 'false_premise_QA' has no question to pair with the true one. SESAME's release of ReasonSeg "
                "has one in every file; with texts: first, and in the suite ReasonSeg, the true one is enough"
            )
        return Record(
            image,
            "reason" if field(entry, "is_sentence", str(path)) else "phrase",
            (*true[: self._at_most], *false[: self._at_most]),
            asked=self._explained.get(image.name, ()),
            ignore=partial(_equals, painted, IGNORED),
        )


def paint(shapes: list[dict[str, Any]], size: Size, path: Path) -> np.ndarray:
    """(H, W) uint8 map: 0 background, 1 target, 255 ignored. Shapes labelled `flag` are not drawn."""
    drawn = []
    for index, shape in enumerate(shapes):
        where = f"{path}: shapes[{index}]"
        label = str(field(shape, "label", where)).lower()
        if label != "flag":
            drawn.append((field(shape, "points", where), IGNORED if "ignore" in label else TARGET))
    try:
        return paint_shapes(drawn, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every picture with its JSON; one without the other is an error. `<stem>_new.json` is the same with a box."""
    files = sorted(folder.iterdir())
    pictures = {path.stem: path for path in files if path.suffix.lower() in PICTURES}
    notes = {path.stem: path for path in files if path.suffix == ".json"}
    notes = {stem: path for stem, path in notes.items() if stem.removesuffix("_new") not in notes.keys() - {stem}}
    for stem in sorted(pictures.keys() ^ notes.keys()):
        there, needs = (pictures[stem], ".json") if stem in pictures else (notes[stem], "|".join(PICTURES))
        raise FileNotFoundError(f"{there} has no partner {folder / stem}{needs}")
    if not pictures:
        raise FileNotFoundError(f"no pictures in {folder}; expected x.jpg with x.json")
    return [(pictures[stem], notes[stem]) for stem in pictures]


def _explanations(root: Path, wanted: bool | None) -> dict[str, tuple]:
    """Picture name -> the dialogues of `Record.asked`; the last entry of a picture counts, as released."""
    if wanted is False:
        return {}
    places = [(f"{base}/explanatory/train.json",) for base in FOLDERS]
    if wanted is None and not any((root / place).is_file() for (place,) in places):
        return {}
    (path,) = locate(root, "explanations of ReasonSeg", *places)
    explained = {}
    for index, entry in enumerate(read_json(path, ENCODINGS)):
        image, query, outputs = (field(entry, key, f"{path}: entry {index}") for key in ("image", "query", "outputs"))
        explained[image] = ((Turn(query, (outputs,)),),)
    return explained


def _texts(entry: dict[str, Any], path: Path) -> list[str]:
    texts = field(entry, "text", str(path))
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path}: 'text' must be a list of one or more queries, got {texts!r}")
    return [text.strip() for text in texts]


def _false_premises(entry: dict[str, Any], path: Path) -> list[Target]:
    """An absent target per entry [question, is it a sentence, answer] of `false_premise_QA`."""
    found = []
    for index, item in enumerate(entry.get("false_premise_QA") or []):
        texts = (item[0], item[2]) if isinstance(item, list) and len(item) == 3 else (None, None)
        if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            raise ValueError(
                f"{path}: false_premise_QA[{index}] must be [question, true or false, answer], got {item!r}"
            )
        sentence = truth(item[1], f"{path}: false_premise_QA[{index}]: the flag of a sentence")
        found.append(Target(item[0].strip(), None, item[2].strip(), sentence=sentence))
    return found


def _equals(painted: Once, value: int) -> np.ndarray:
    return painted() == value
