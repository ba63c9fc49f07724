"""ReasonSeg: implicit queries about an image, with polygons in a labelme-like file (lisa.md 4.6, sesame.md 4.3)."""

from __future__ import annotations

import base64
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import (
    IMAGE_SUFFIXES,
    SOURCES,
    choice,
    field,
    image_size,
    is_data,
    locate,
    of_kind,
    read_bool,
    read_json,
    single_file,
)
from data.types import Record, Target, Turn
from utils.images import open_image, size_mismatch
from utils.masks import CachedMask, Size, paint_shapes
from utils.text import preview

TARGET, IGNORED = 1, 255
TEXTS = ("all", "first", "pair")
ENCODINGS = ("utf-8-sig", "cp1252")
NOTHING_INSIDE = ("point", "points", "line", "linestrip")  # labelme shapes without an area
FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg")


@SOURCES.register("ReasonSeg")
class ReasonSeg:
    """One record per image, whose texts all have the same mask; sentences are of kind "reason", phrases "phrase".

    Texts keep their outer blanks, as in the releases' training (lisa.md 4.6). SESAME's release also has questions about
    what is not there: they follow as absent targets, whose `correction` is the full answer, and each says by itself
    whether it is a sentence.

    split: one, or several with "_" between them (`train_val`).
    explanations: put those of `explanatory/train.json` into `Record.dialogues`; None: if that file exists.
    texts: which texts are targets: "all" rephrasings, or only the "first" true and the first false one (the published
        evaluation takes the first). "pair" is "first" for SESAME's evaluation of one true and one false question per
        image (sesame.md 6.4), and refuses an image without a false one.
    """

    def __init__(self, root: Path, split: str = "train", explanations: bool | None = None, texts: str = "all"):
        self._at_most = None if choice("texts of ReasonSeg", texts, TEXTS) == "all" else 1
        self._in_pairs = texts == "pair"
        self._files: list[tuple[Path, Path]] = []
        for part in split.split("_"):
            (folder,) = locate(root, f"ReasonSeg {part}", *((f"{base}/{part}",) for base in FOLDERS))
            self._files += _pairs(folder)
        self._explanations_by_name = _explanations(root, explanations)

    def __len__(self) -> int:
        return len(self._files)

    def image_paths(self) -> list[str]:
        return [str(image) for image, _ in self._files]

    def annotation_paths(self) -> list[Path]:
        return [path for _, path in self._files]

    def __getitem__(self, index: int) -> Record:
        image, path = self._files[index]
        entry = read_json(path, ENCODINGS)
        shapes, size = field(entry, "shapes", str(path), list), image_size(image)
        labelled = entry.get("imageHeight"), entry.get("imageWidth")
        if None not in labelled and labelled != size:
            raise ValueError(size_mismatch(image, f"{path} (imageHeight, imageWidth)", labelled, size))
        labels = CachedMask(partial(paint, shapes, size, path))
        mask = CachedMask(partial(_equals, labels, TARGET), f"{path}: shapes")
        true = [Target(text, mask) for text in _texts(entry, path)]
        false = _false_premises(entry, path)
        if self._in_pairs and not false:
            raise ValueError(
                f"{path}: 'false_premise_QA' has no question to pair with the true one. SESAME's release of ReasonSeg "
                "has one in every file; with texts: first, and in the suite ReasonSeg, the true one is enough"
            )
        return Record(
            image,
            "reason" if _is_sentence(entry, path) else "phrase",
            (*true[: self._at_most], *false[: self._at_most]),
            dialogues=self._explanations_by_name.get(image.name, ()),
            ignore=partial(_equals, labels, IGNORED),
        )


def paint(shapes: list[dict[str, Any]], size: Size, path: Path) -> np.ndarray:
    """(H, W) uint8 map: 0 background, 1 target, 255 ignored. Shapes with the label `flag` are left out."""
    areas = []
    for index, shape in enumerate(shapes):
        where = f"{path}: shapes[{index}]"
        label = field(shape, "label", where, str).lower()
        if label != "flag":
            areas.append((area_of(shape, size, where), IGNORED if "ignore" in label else TARGET))
    try:
        return paint_shapes(areas, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def area_of(shape: dict[str, Any], size: Size, where: str) -> Any:
    """A labelme shape of any type as `paint_shapes` takes it: [[x, y], ...] corners, or an (H, W) bool mask."""
    kind, points = shape.get("shape_type") or "polygon", field(shape, "points", where, list)
    if kind in NOTHING_INSIDE:
        raise ValueError(f"{where}: a shape of type {kind!r} encloses nothing; draw a polygon, rectangle or circle")
    if kind in ("polygon", "rotation"):
        return points
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"{where}: shape_type {preview(kind)} is not known; have: polygon, rectangle, circle, mask")
    if kind == "rectangle" and len(points) == 4:  # newer programs write all corners
        return points
    try:
        (x, y), (u, v) = ((float(x), float(y)) for x, y in points)
    except (TypeError, ValueError):
        what = {"circle": "its centre and a point of its rim"}.get(kind, "two opposite corners")
        raise ValueError(f"{where}: a {kind} has two points, {what}; got {preview(points)}") from None
    if kind == "mask":
        return _place_mask(shape, (min(x, u), min(y, v)), size, where)
    if kind == "rectangle":
        if x == u or y == v:
            raise ValueError(f"{where}: the rectangle {points} encloses nothing")
        return [[x, y], [u, y], [u, v], [x, v]]
    radius = math.hypot(u - x, v - y)
    if not radius or not math.isfinite(radius):
        raise ValueError(f"{where}: the circle {points} encloses nothing")
    steps = min(720, max(16, math.ceil(2 * math.pi * radius)))  # one corner per pixel of the rim, within limits
    angles = 2 * math.pi * np.arange(steps) / steps
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).tolist()


def _place_mask(shape: dict[str, Any], corner: tuple[float, float], size: Size, where: str) -> np.ndarray:
    """(H, W) bool: the small mask of a labelme shape of type mask, at its `corner` (x, y); cut at the image's edges."""
    if not isinstance(shape.get("mask"), str):
        raise ValueError(f"{where}: a shape of type 'mask' needs 'mask', the area as a PNG in base64; it has none")
    with open_image(Path(where), "the mask of", base64.b64decode(shape["mask"])) as image:
        small = np.asarray(image.convert("L")) > 0
    left, top = (round(value) for value in corner)
    mask = np.zeros(size, bool)
    window = mask[max(0, top) : top + small.shape[0], max(0, left) : left + small.shape[1]]  # a view into the mask
    window |= small[max(0, -top) :, max(0, -left) :][: window.shape[0], : window.shape[1]]
    return mask


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every image with its JSON file; FileNotFoundError for one without the other.

    `<stem>_new.json` is the same annotation with a box, and is left out where `<stem>.json` exists.
    """
    files = sorted(path for path in folder.iterdir() if is_data(path.name))
    images: dict[str, list[Path]] = {}
    notes: dict[str, list[Path]] = {}
    for path in files:
        kind = path.suffix.lower()
        if kind == ".json":
            notes.setdefault(path.stem, []).append(path)
        elif kind in IMAGE_SUFFIXES:
            images.setdefault(path.stem, []).append(path)
    # "a_new" is a second version of "a" only if there is an "a"; else it is an image of that name.
    notes = {stem: paths for stem, paths in notes.items() if stem.removesuffix("_new") not in notes.keys() - {stem}}
    for stem in sorted(images.keys() ^ notes.keys()):
        if stem in images:
            raise FileNotFoundError(f"{images[stem][0]} has no partner {folder / stem}.json")
        raise FileNotFoundError(f"{notes[stem][0]} has no partner {folder / stem}{'|'.join(IMAGE_SUFFIXES)}")
    if not images:
        raise FileNotFoundError(f"no images in {folder}; expected x.jpg with x.json")
    return [(single_file(images[stem], "image", folder), single_file(notes[stem], "JSON", folder)) for stem in images]


def _explanations(root: Path, wanted: bool | None) -> dict[str, tuple]:
    """Image name -> its explanation as `Record.dialogues`; of several entries the last counts, as released."""
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
    """Whether the texts of a file are sentences; otherwise they are phrases."""
    value = field(entry, "is_sentence", str(path))
    if value not in (True, False):
        raise ValueError(f"{path}: is_sentence must be true or false, got {preview(value)}")
    return bool(value)


def _texts(entry: dict[str, Any], path: Path) -> list[str]:
    """The queries of a file, one or more."""
    texts = field(entry, "text", str(path))
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path}: 'text' must be a list of one or more queries, got {texts!r}")
    return texts


def _false_premises(entry: dict[str, Any], path: Path) -> list[Target]:
    """An absent target per entry [question, whether it is a sentence, answer] of `false_premise_QA`."""
    targets = []
    for index, item in enumerate(entry.get("false_premise_QA") or []):
        question, flag, answer = item if isinstance(item, list) and len(item) == 3 else (None, None, None)
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise ValueError(
                f"{path}: false_premise_QA[{index}] must be [question, true or false, answer], got {item!r}"
            )
        sentence = read_bool(flag, f"{path}: false_premise_QA[{index}]: the flag of a sentence")
        targets.append(Target(question, None, answer, sentence=sentence))
    return targets


def _equals(labels: CachedMask, value: int) -> np.ndarray:
    return labels() == value
