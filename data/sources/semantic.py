"""Label-map sets: classes by label value, pictures paired with maps, records of the present classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.sources.base import Rows
from data.types import Record, Target
from utils.registry import unknown

Classes = str | Path | list[str] | tuple[str, ...] | None  # names to use, or a file with one a line; None: all
LABELS = Path(__file__).parents[1] / "labels"
PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Table:
    """Class names with their label values, in dataset order, and the values that stand for nothing.

    Masks are found by value, never by name: several values of one name are one class.
    """

    values: dict[str, tuple[int, ...]]
    void: frozenset[int]

    @classmethod
    def of(cls, entries: Iterable[tuple[int, str]], void: Iterable[int] = ()) -> Table:
        values: dict[str, tuple[int, ...]] = {}
        for value, name in entries:
            name = name.strip().lower()
            values[name] = (*values.get(name, ()), value)
        return cls(values, frozenset(void))

    def keep(self, names: list[str]) -> Table:
        """Only these classes, still in dataset order; the others become void."""
        for name in names:
            if name not in self.values:
                raise ValueError(unknown("class", name, self.values))
        kept = {name: values for name, values in self.values.items() if name in set(names)}
        return Table(kept, frozenset(self.known - {value for values in kept.values() for value in values}))

    @property
    def known(self) -> frozenset[int]:
        return self.void.union(*self.values.values())


class LabelMaps:
    """Pictures paired by stem with label maps: a record names the present classes and where each is.

    ignore_unknown: count label values that the dataset does not define as unlabelled instead of refusing the map.
    """

    def __init__(self, pairs: Rows, folders: tuple[Path, Path], table: Table, ignore_unknown: bool):
        self._pairs, (self._images, self._maps) = pairs, folders
        self._table, self._ignore_unknown = table, ignore_unknown
        self.vocabulary, self.classes = tuple(table.values), table.values

    def __len__(self) -> int:
        return len(self._pairs)

    def image_paths(self) -> list[str]:
        return [f"{self._images}/{name}" for name in self._pairs.pictures()]

    def annotation_paths(self) -> list[Path]:
        return [self._maps / self._pairs[index][1] for index in range(len(self))]

    def __getitem__(self, index: int) -> Record:
        image, path = self._pairs[index]
        labels = read_label_map(self._maps / path)
        present = set(np.flatnonzero(np.bincount(labels.ravel())).tolist())
        strangers = sorted(present - self._table.known)
        if strangers and not self._ignore_unknown:
            raise ValueError(
                f"{self._maps / path}: unknown label values {', '.join(map(str, strangers))}; is this map of another "
                "dataset or version? Set the option ignore_unknown to count them as unlabelled"
            )
        targets = tuple(
            Target(name, partial(_pixels, labels, values))
            for name, values in self._table.values.items()
            if not present.isdisjoint(values)
        )
        ignore = partial(_other_pixels, labels, tuple(v for values in self._table.values.values() for v in values))
        return Record(self._images / image, "classes", targets, self.vocabulary, ignore=ignore)


def shipped_labels(name: str) -> list[tuple[int, str]]:
    """(label value, class name) of `data/labels/<name>.txt`, one a line."""
    lines = (LABELS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [(int(value), rest) for value, _, rest in (line.partition(" ") for line in lines)]


def selected(table: Table, classes: Classes, root: Path) -> Table:
    """The table cut down to `classes`; a file is looked for below the dataset folder, then the working folder."""
    if classes is None:
        return table
    names, where = class_names(classes, root)
    try:
        return table.keep(names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def class_names(classes: Classes, root: Path) -> tuple[list[str], str]:
    """Lower-case names of the option `classes`, and where they stand."""
    where = "classes"
    if isinstance(classes, (str, Path)):
        files = [root / classes, Path(classes)]
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no class list {classes}; looked for {files[0]} and {files[1].absolute()}")
        classes, where = path.read_text(encoding="utf-8-sig").splitlines(), str(path)
    names = [name.strip().lower() for name in classes if name.strip()]
    if not names:
        raise ValueError(f"{where}: the class list is empty; name at least one class or leave the option out")
    return names, where


def paired(images: Path, maps: Path, picture_end: str = "", map_end: str = "") -> Rows:
    """[picture, label map] of every label map, by stem and subfolder; a map without a picture is an error."""
    pictures = {path[: -len(ext)]: path for path, ext in _files(images, PICTURES) if path.endswith(picture_end + ext)}
    rows, lonely = [], []
    for path, ext in _files(maps, (".png",)):
        if not path.endswith(map_end + ext):
            continue
        stem = path[: len(path) - len(map_end + ext)] + picture_end
        (rows if stem in pictures else lonely).append([pictures.get(stem, stem), path])
    if lonely:
        stem, path = lonely[0]
        raise FileNotFoundError(
            f"{len(lonely)} of {len(lonely) + len(rows)} label maps have no picture: {maps / path} needs "
            f"{images / stem}{'|'.join(PICTURES)}"
        )
    if not rows:
        raise FileNotFoundError(f"no label maps *{map_end}.png in {maps}")
    return Rows(rows, picture=0)


def read_label_map(path: Path) -> np.ndarray:
    """(H, W) unsigned label values; of a palette PNG the indices, not the colours."""
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise OSError(f"cannot read label map {path}: {error}") from None
    if labels.ndim != 2:
        raise ValueError(f"{path}: a label map has one channel, this one is {mode} of shape {labels.shape}")
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    if labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"{path}: label values from {labels.min()} to {labels.max()}; expected 0 to 65535")
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def _pixels(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


def _other_pixels(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    return np.isin(labels, values, invert=True)


def _files(folder: Path, extensions: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(path below `folder`, extension) in sorted order, subfolders included."""
    for where, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        below = os.path.relpath(where, folder).replace(os.sep, "/") + "/"
        for name in sorted(names):
            extension = os.path.splitext(name)[1]
            if extension.lower() in extensions:
                yield ("" if below == "./" else below) + name, extension
