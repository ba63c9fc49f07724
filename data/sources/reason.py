"""ReasonSeg: implicit queries about a picture, polygons in a labelme-like file beside it (lisa 4.6, sesame 4.3)."""

from __future__ import annotations

import base64
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import (
    PICTURES,
    SOURCES,
    choice,
    field,
    is_data,
    locate,
    of_kind,
    only,
    picture_size,
    read_json,
    shortened,
)
from data.sources.false_premise import truth
from data.types import Record, Target, Turn
from utils.images import opened
from utils.masks import CachedMask, Size, paint_shapes

TARGET, IGNORED = 1, 255
TEXTS = ("all", "first", "pair")
ENCODINGS = ("utf-8-sig", "cp1252")
NOTHING_INSIDE = ("point", "points", "line", "linestrip")  # labelme shapes that enclose nothing
FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg")


@SOURCES.register("ReasonSeg")
class ReasonSeg:
    """Every text of a picture has the same mask; a sentence is of kind "reason", a phrase of kind "phrase". Texts keep
    their outer blanks, as in the releases' training (lisa.md 4.6).

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

    def annotation_paths(self) -> list[Path]:
        return [path for _, path in self._files]

    def __getitem__(self, index: int) -> Record:
        image, path = self._files[index]
        entry = read_json(path, ENCODINGS)
        painted = CachedMask(partial(paint, field(entry, "shapes", str(path), list), picture_size(image), path))
        mask = CachedMask(partial(_equals, painted, TARGET), f"{path}: shapes")
        true, false = [Target(text, mask) for text in _texts(entry, path)], _false_premises(entry, path)
        if self._paired and not false:
            raise ValueError(
                f"{path}: 'false_premise_QA' has no question to pair with the true one. SESAME's release of ReasonSeg "
                "has one in every file; with texts: first, and in the suite ReasonSeg, the true one is enough"
            )
        return Record(
            image,
            "reason" if _is_sentence(entry, path) else "phrase",
            (*true[: self._at_most], *false[: self._at_most]),
            dialogues=self._explained.get(image.name, ()),
            ignore=partial(_equals, painted, IGNORED),
        )


def paint(shapes: list[dict[str, Any]], size: Size, path: Path) -> np.ndarray:
    """(H, W) uint8 map: 0 background, 1 target, 255 ignored. Shapes labelled `flag` are not drawn."""
    drawn = []
    for index, shape in enumerate(shapes):
        where = f"{path}: shapes[{index}]"
        label = field(shape, "label", where, str).lower()
        if label != "flag":
            drawn.append((enclosed(shape, size, where), IGNORED if "ignore" in label else TARGET))
    try:
        return paint_shapes(drawn, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def enclosed(shape: dict[str, Any], size: Size, where: str) -> Any:
    """What `paint_shapes` takes for a labelme shape of any type: the corners of an area, or its (H, W) bool mask."""
    kind, points = shape.get("shape_type") or "polygon", field(shape, "points", where, list)
    if kind in NOTHING_INSIDE:
        raise ValueError(f"{where}: a shape of type {kind!r} encloses nothing; draw a polygon, rectangle or circle")
    if kind in ("polygon", "rotation"):
        return points
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"{where}: shape_type {shortened(kind)} is not known; have: polygon, rectangle, circle, mask")
    if kind == "rectangle" and len(points) == 4:  # newer programs write all corners
        return points
    try:
        (x, y), (u, v) = ((float(x), float(y)) for x, y in points)
    except (TypeError, ValueError):
        what = {"circle": "its centre and a point of its rim"}.get(kind, "two opposite corners")
        raise ValueError(f"{where}: a {kind} has two points, {what}; got {shortened(points)}") from None
    if kind == "mask":
        return _placed(shape, (min(x, u), min(y, v)), size, where)
    if kind == "rectangle":
        if x == u or y == v:
            raise ValueError(f"{where}: the rectangle {points} encloses nothing")
        return [[x, y], [u, y], [u, v], [x, v]]
    radius = math.hypot(u - x, v - y)
    if not radius or not math.isfinite(radius):
        raise ValueError(f"{where}: the circle {points} encloses nothing")
    angles = 2 * math.pi * np.arange(steps := min(720, max(16, math.ceil(2 * math.pi * radius)))) / steps
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).tolist()


def _placed(shape: dict[str, Any], corner: tuple[float, float], size: Size, where: str) -> np.ndarray:
    """The small mask of a labelme shape of type mask, in a mask of the picture's size."""
    if not isinstance(shape.get("mask"), str):
        raise ValueError(f"{where}: a shape of type 'mask' needs 'mask', the area as a PNG in base64; it has none")
    with opened(Path(where), "the mask of", base64.b64decode(shape["mask"])) as image:
        small = np.asarray(image.convert("L")) > 0
    left, top = (round(value) for value in corner)
    placed = np.zeros(size, bool)
    here = placed[max(0, top) : top + small.shape[0], max(0, left) : left + small.shape[1]]
    here |= small[max(0, -top) :, max(0, -left) :][: here.shape[0], : here.shape[1]]
    return placed


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every picture with its JSON; one without the other is an error. `<stem>_new.json` is the same with a box."""
    files = sorted(path for path in folder.iterdir() if is_data(path.name))
    pictures: dict[str, list[Path]] = {}
    notes: dict[str, list[Path]] = {}
    for path in files:
        if (kind := path.suffix.lower()) in PICTURES or kind == ".json":
            (notes if kind == ".json" else pictures).setdefault(path.stem, []).append(path)
    notes = {stem: paths for stem, paths in notes.items() if stem.removesuffix("_new") not in notes.keys() - {stem}}
    for stem in sorted(pictures.keys() ^ notes.keys()):
        there, needs = (pictures[stem][0], ".json") if stem in pictures else (notes[stem][0], "|".join(PICTURES))
        raise FileNotFoundError(f"{there} has no partner {folder / stem}{needs}")
    if not pictures:
        raise FileNotFoundError(f"no pictures in {folder}; expected x.jpg with x.json")
    return [(only(pictures[stem], "picture", folder), only(notes[stem], "JSON", folder)) for stem in pictures]


def _explanations(root: Path, wanted: bool | None) -> dict[str, tuple]:
    """Picture name -> the dialogues of `Record.asked`; the last entry of a picture counts, as released."""
    if wanted is False:
        return {}
    places = [(f"{base}/explanatory/train.json",) for base in FOLDERS]
    if wanted is None and not any((root / place).is_file() for (place,) in places):
        return {}
    (path,) = locate(root, "explanations of ReasonSeg", *places)
    explained = {}
    for index, entry in enumerate(of_kind(read_json(path, ENCODINGS), list, "the file", str(path))):
        where = f"{path}: entry {index}"
        image, query, outputs = (field(entry, key, where, str) for key in ("image", "query", "outputs"))
        explained[image] = ((Turn(query, (outputs,)),),)
    return explained


def _is_sentence(entry: dict[str, Any], path: Path) -> bool:
    value = field(entry, "is_sentence", str(path))
    if value not in (True, False):
        raise ValueError(f"{path}: is_sentence must be true or false, got {shortened(value)}")
    return bool(value)


def _texts(entry: dict[str, Any], path: Path) -> list[str]:
    texts = field(entry, "text", str(path))
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path}: 'text' must be a list of one or more queries, got {texts!r}")
    return texts


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
        found.append(Target(item[0], None, item[2], sentence=sentence))
    return found


def _equals(painted: CachedMask, value: int) -> np.ndarray:
    return painted() == value
