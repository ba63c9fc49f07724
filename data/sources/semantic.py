"""What all label-map sets share: classes by label value, images paired with maps, records of the present classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import IMAGE_SUFFIXES, Rows, group_by_stem, list_files, name_of, single_file
from data.types import Record, Target
from utils.images import open_image, upright
from utils.log import log
from utils.registry import unknown
from utils.text import preview, read_text

Classes = str | Path | list[str] | tuple[str, ...] | None  # names to use, or a file with one per line; None: all
LABELS = Path(__file__).parents[1] / "labels"
LOSSY = ("JPEG", "MPO", "JPEG2000")  # may be lossless, but then nothing says so
MAPS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep label values as they are


@dataclass(frozen=True)
class Table:
    """Class names with their label values, in dataset order; the values of unlabelled pixels (void), and those of
    pixels that are known to be of no class (background).

    Several values with one name are one class.
    """

    values: dict[str, tuple[int, ...]]
    void: frozenset[int]
    background: frozenset[int] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[tuple[int, str]], void: Iterable[int] = (), background: Iterable[int] = ()) -> Table:
        """The table of (label value, name) entries; names become lower case."""
        values: dict[str, tuple[int, ...]] = {}
        for value, name in entries:
            name = name.strip().lower()
            if not name:
                raise ValueError(f"the label value {value} has an empty name")
            values[name] = (*values.get(name, ()), value)
        return cls(values, frozenset(void), frozenset(background))

    def keep(self, names: list[str]) -> Table:
        """Only these classes, still in dataset order; the others become void."""
        for name in names:
            if name not in self.values:
                raise ValueError(unknown("class", name, self.values))
        values = {name: values for name, values in self.values.items() if name in set(names)}
        return Table(values, self.known.difference(self.background, *values.values()), self.background)

    @property
    def known(self) -> frozenset[int]:
        """All label values that the dataset defines."""
        return self.void.union(self.background, *self.values.values())


class LabelMaps:
    """Images paired with label maps; a record names the classes that are present, and where each is.

    folders: of the images and of the label maps.
    ignore_unknown: count label values that the dataset does not define as unlabelled instead of refusing the map.
    hint: follows the message about unknown label values; "": the usual advice.

    `left_out` holds the unused files of the folders, by what is wrong with them.
    """

    def __init__(self, pairs: Pairs, folders: tuple[Path, Path], table: Table, ignore_unknown: bool, hint: str = ""):
        self._pairs = pairs.rows
        self.left_out = pairs.left_out
        self._images, self._maps = folders
        self._table = table
        self._ignore_unknown = ignore_unknown
        self._hint = hint
        self.vocabulary = tuple(table.values)
        self.classes = table.values

    def __len__(self) -> int:
        return len(self._pairs)

    def image_paths(self) -> list[str]:
        return [f"{self._images}/{name}" for name in self._pairs.image_names()]

    def annotation_paths(self) -> list[Path]:
        return [self._maps / path for _, path in self._pairs]

    def __getitem__(self, index: int) -> Record:
        image, path = self._pairs[index]
        # Read at once, unlike other masks: which classes are present is only in the map itself.
        labels = read_label_map(self._maps / path)
        present = values_in(labels)
        unknown_values = sorted(present - self._table.known)
        if unknown_values and not self._ignore_unknown:
            hint = self._hint or (
                "; is this map of another dataset or version? Set the option ignore_unknown to count them as unlabelled"
            )
            raise ValueError(f"{self._maps / path}: unknown label values {', '.join(map(str, unknown_values))}{hint}")
        targets = tuple(
            Target(name, partial(_pixels, labels, values))
            for name, values in self._table.values.items()
            if not present.isdisjoint(values)
        )
        labelled = (*(value for values in self._table.values.values() for value in values), *self._table.background)
        ignore = partial(_other_pixels, labels, labelled)
        return Record(self._images / image, "classes", targets, self.vocabulary, ignore=ignore)


def shipped_labels(name: str) -> list[tuple[int, str]]:
    """[(label value, class name), ...] of `data/labels/<name>.txt`, in its order."""
    lines = (LABELS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [(int(value), rest) for value, _, rest in (line.partition(" ") for line in lines)]


def select_classes(table: Table, classes: Classes, root: Path) -> Table:
    """The table reduced to `classes`; see `class_names` for where a file is looked for."""
    if classes is None:
        return table
    names, where = class_names(classes, root)
    try:
        return table.keep(names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def class_names(classes: Classes, root: Path) -> tuple[list[str], str]:
    """Lower-case names of the option `classes`, and where they come from, for messages.

    A file is looked for below the dataset folder, then below the working folder.
    """
    where = "classes"
    if isinstance(classes, (str, Path)):
        files = [root / classes, Path(classes)]
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no class list {classes}; looked for {files[0]} and {files[1].absolute()}")
        classes = read_text(path).splitlines()
        where = str(path)
    if not isinstance(classes, (list, tuple)):
        raise ValueError(f"{where}: expected a list of names, or a file with one per line, got {preview(classes)}")
    names = [name_of(name, f"classes[{index}]", where).lower() for index, name in enumerate(classes)]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"{where}: the class list is empty; name at least one class or leave the option out")
    return names, where


@dataclass(frozen=True)
class Pairs:
    """[image, label map] rows, and what was left out: what is wrong -> the files."""

    rows: Rows
    left_out: dict[str, list[str]] = field(default_factory=dict)


def pair_files(images: Path, maps: Path, image_end: str = "", map_end: str = "") -> Pairs:
    """Every label map with its image; both have the same subfolder and stem.

    image_end, map_end: what ends the stem of one kind and not of the other ("_leftImg8bit").
    A map without an image is an error, and so are two files of one stem. Images without a map, and files among the maps
    that are none, are left out and counted in a warning.
    """
    image_files = group_by_stem((path for path, kind in list_files(images) if kind in IMAGE_SUFFIXES), image_end)
    files = list(list_files(maps))
    labels = group_by_stem((path for path, kind in files if kind in MAPS), map_end)
    if lonely := [stem for stem in labels if stem not in image_files]:
        raise FileNotFoundError(
            f"{len(lonely)} of {len(labels)} label maps have no image: {maps / labels[lonely[0]][0]} needs "
            f"{images / lonely[0]}{image_end}{'|'.join(IMAGE_SUFFIXES)}"
        )
    others = group_by_stem((path for path, kind in files if kind not in MAPS), map_end)
    left_out = {
        f"images without a label map in {maps}": [
            paths[0] for stem, paths in image_files.items() if stem not in labels
        ],
        f"files in {maps} that are no label map ({', '.join(MAPS)}; JPEG changes label values)": [
            path for stem, paths in others.items() if stem in image_files for path in paths
        ],
    }
    left_out = {what: paths for what, paths in left_out.items() if paths}
    if not labels:
        parts = [f"no label maps *{map_end}.png in {maps}"]
        parts += [f"{len(paths)} {what}: {paths[0]}, ..." for what, paths in left_out.items()]
        raise FileNotFoundError("; ".join(parts))
    for what, paths in left_out.items():
        examples = paths[:3] if len(paths) <= 3 else [*paths[:3], "..."]
        log.warning("left out %d %s: %s", len(paths), what, ", ".join(examples))
    rows = [
        [single_file(image_files[stem], "image", images), single_file(paths, "label map", maps)]
        for stem, paths in labels.items()
    ]
    return Pairs(Rows(rows, image_key=0), left_out)


def read_label_map(path: Path) -> np.ndarray:
    """(H, W) uint8 or uint16 label values; of a palette PNG the indices, not the colours.

    ValueError for several channels or frames, for values that are not whole numbers from 0 to 65535, and for a palette
    of greys that may be the labels. OSError for a JPEG, whatever the file's name.
    """
    with open_image(path, "label map") as image:
        if image.format in LOSSY:
            raise ValueError(f"it is a {image.format}, which changes label values; make it again and save it as PNG")
        tile = next(iter(getattr(image, "tile", ())), None)
        largest = _largest_value(tile)
        inverted = tile is not None and "L;I" in (tile.args if isinstance(tile.args, tuple) else (tile.args,))
        mode, labels, frames = image.mode, np.asarray(upright(image)), getattr(image, "n_frames", 1)
        palette = image.getpalette("RGB") if mode == "P" else None  # decodes, which turns a TIFF: not before `upright`
    if labels.ndim != 2 or frames > 1:
        have = f"{frames} frames" if frames > 1 else f"{mode} of shape {labels.shape}"
        raise ValueError(f"{path}: a label map has one channel, this one is {have}")
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    if inverted:  # a TIFF in which 0 is white: Pillow turns its values into shades
        return np.iinfo(np.uint8).max - labels
    if palette is not None:
        _check_palette(path, labels, palette)
    if largest is not None:
        whole = np.iinfo(np.uint8 if mode == "L" else np.uint16).max
        labels = (labels.astype(np.int64) * largest + whole // 2) // whole  # rounds to the value of the file
        return labels.astype(np.uint8 if mode == "L" else np.uint16)
    integral = labels.dtype.kind in "ui" or bool((np.isfinite(labels) & (labels == np.floor(labels))).all())
    if not integral or labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
        what = "" if integral else ", some not whole"
        raise ValueError(f"{path}: label values from {labels.min()} to {labels.max()}{what}; expected 0 to 65535")
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def _largest_value(tile: Any) -> int | None:
    """The value that Pillow makes 255 (65535 in its mode I), those below in proportion; None if it keeps the values.

    tile: how it will decode the pixels. It scales grey of 2 and 4 bits, and PGM files with another largest value.
    """
    if tile is None:
        return None
    arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    if tile.codec_name.startswith("ppm") and len(arguments) > 1:
        return arguments[-1]
    return {"L;2": 3, "L;4": 15}.get(str(arguments[0])[:3])


def _check_palette(path: Path, labels: np.ndarray, palette: Sequence[int]) -> None:
    """ValueError where the indices of a grey label map are not its greys, as after a conversion to a palette or to GIF,
    which number the greys that occur. With colours an index is a label; so are 0 and 1 of black and another grey."""
    colours = [tuple(palette[start : start + 3]) for start in range(0, len(palette), 3)]
    if any(len(set(colour)) > 1 for colour in colours):
        return
    greys = {index: colours[index][0] for index in sorted(values_in(labels)) if index < len(colours)}
    is_binary = greys.keys() <= {0, 1} and greys.get(0, 0) == 0
    odd = [(index, grey) for index, grey in greys.items() if index != grey]
    if odd and not is_binary and len(set(greys.values())) == len(greys):
        index, grey = odd[0]
        raise ValueError(
            f"{path}: a palette of greys numbers them otherwise ({index} is the grey {grey}), so it is not clear which "
            "is the label; save the map as an 8-bit grey PNG"
        )


def values_in(labels: np.ndarray) -> set[int]:
    """The label values that occur."""
    return set(np.flatnonzero(np.bincount(labels.ravel())).tolist())


def _pixels(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


def _other_pixels(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    return np.isin(labels, values, invert=True)
