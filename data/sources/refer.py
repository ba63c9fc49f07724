"""Referring sets in the REFER toolkit's files: refs(<split_by>).p and instances.json (lisa.md 4.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.readers.coco_file import Table, by_id, id_of, rasterize, released_mask, size_of, whole_polygons
from data.sources.base import (
    SOURCES,
    EmptySplit,
    Fault,
    attempt,
    choice,
    field,
    indexed_rows,
    locate,
    picture,
    read_json,
)
from data.types import Record, Target
from utils.masks import OVERLAPS, CachedMask
from utils.safe_pickle import load_plain

FOLDERS = ("refer_seg/", "", "refer/")  # the level is there for training and missing for the released evaluation
COCO_2014 = (*((f"{base}images/mscoco/images/train2014",) for base in FOLDERS), ("coco/train2014",))
SAIAPR = tuple((f"{base}images/saiapr_tc-12",) for base in FOLDERS)
OTHER_HALF = "val2014"  # beside train2014, for the pictures that are called COCO_val2014_*

# The toolkit's rule: exact names, the letter of testA..C anywhere in the ref's split (RefCLEF has "testAB").
SPLITS: dict[str, Callable[[str], bool]] = {
    "train": lambda split: split == "train",
    "val": lambda split: split == "val",
    "test": lambda split: "test" in split,
    "testA": lambda split: "A" in split,
    "testB": lambda split: "B" in split,
    "testC": lambda split: "C" in split,
}
Sentence = Callable[
    [dict[str, Any], str], tuple[bool, str | None]
]  # (sentence, where) -> (is it there, what is instead)
log = logging.getLogger(__name__)


class Refer:
    """One record a picture, one target a sentence, spelt as in the file; the sentences of one ref share its mask.

    A ref of several annotations (`ann_id` is a list) is one target whose mask is their union; a ref of none is absent.
    overlap: what pixels under several parts of one object are, see `segmentation_to_mask`. said: reads from a sentence
    whether it is true; None: all are. bad_polygons: "raise", or "drop" what is no polygon (and say how many).
    """

    def __init__(
        self,
        root: Path,
        name: str,
        split: str,
        *,
        files: tuple[tuple[str, str], ...],
        images: tuple[tuple[str], ...] = COCO_2014,
        overlap: str = "union",
        said: Sentence | None = None,
        bad_polygons: str = "raise",
    ):
        choice(f"split of {name}", split, SPLITS)
        choice(f"bad_polygons of {name}", bad_polygons, ("raise", "drop"))
        self._overlap = choice(f"overlap of {name}", overlap, OVERLAPS)
        self.files = self._refs, self._instances = tuple(locate(root, name, *files))
        (self._folder,) = locate(root, f"pictures of {name}", *images)
        options = split, said, bad_polygons == "drop"
        self._rows = indexed_rows(root, parse, self.files, *options, picture="file_name")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        targets = []
        for ref in row["refs"]:
            where = f"{self._instances}: annotation {', '.join(map(str, ref['ann_ids']))} (ref {ref['ref_id']})"
            shapes, size = ref["segmentations"], tuple(row["size"])
            mask = CachedMask(partial(rasterize, shapes, size, self._overlap, where), where)
            summed = released_mask(shapes, size, where) if self._overlap == "union" else None
            for text, there, correction in ref["sentences"]:
                target = (
                    Target(text, mask, correction, released_mask=summed) if there else Target(text, None, correction)
                )
                targets.append(target)
        name = row["file_name"]
        image = picture(self._home(name), name, f"{self._instances}: image {row['image_id']}")
        return Record(image, "refer", tuple(targets))

    def image_paths(self) -> list[str]:
        return [f"{self._home(name)}/{name}" for name in self._rows.pictures()]

    def _home(self, name: Any) -> Path:
        """The folder of a picture."""
        elsewhere = str(name).startswith(f"COCO_{OTHER_HALF}") and not (self._folder / name).is_file()
        return self._folder.with_name(OTHER_HALF) if elsewhere else self._folder


def refer_files(name: str, split_by: str) -> tuple[tuple[str, str], ...]:
    """Where the two files of a set may be, one level up or down."""
    return tuple((f"{base}{name}/refs({split_by}).p", f"{base}{name}/instances.json") for base in FOLDERS)


@SOURCES.register("refclef")
def refclef(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refclef", split, files=refer_files("refclef", split_by), images=SAIAPR, overlap=overlap)


@SOURCES.register("refcoco")
def refcoco(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    """split_by "unc_exclude_unified" is SESAME's release without pictures of other sets' evaluation splits."""
    return Refer(root, "refcoco", split, files=refer_files("refcoco", split_by), overlap=overlap)


@SOURCES.register("refcoco+")
def refcoco_plus(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refcoco+", split, files=refer_files("refcoco+", split_by), overlap=overlap)


@SOURCES.register("refcocog")
def refcocog(root: Path, split: str = "train", split_by: str = "umd", overlap: str = "union") -> Refer:
    """split_by: "umd", "google" (no test split) or SESAME's "umd_exclude_unified"."""
    return Refer(root, "refcocog", split, files=refer_files("refcocog", split_by), overlap=overlap)


def parse(
    refs_path: Path, instances_path: Path, split: str, said: Sentence | None, drop_bad_polygons: bool
) -> Iterator[Any]:
    """A row a picture of the split, in the order of the refs file; both files must agree."""
    refs = _chosen(load_plain(refs_path) if refs_path.suffix == ".p" else read_json(refs_path), refs_path, split)
    instances = read_json(instances_path)
    images, annotations = (by_id(instances, key, instances_path) for key in ("images", "annotations"))
    pictures: dict[Any, list[dict[str, Any]]] = {}
    silent = dropped = 0
    for ref in refs:
        where = f"{refs_path}: ref {ref.get('ref_id')}"
        read = attempt(partial(_ref, ref, where, annotations, images, said))
        if isinstance(read, Fault):
            yield read
            continue
        if drop_bad_polygons:
            whole = [whole_polygons(shape) for shape in read["segmentations"]]
            dropped += sum(len(shape) - len(rest) for shape, rest in zip(read["segmentations"], whole, strict=True))
            read["segmentations"] = whole
        silent += sum(not text.strip() for text, _, _ in read["sentences"])
        read["sentences"] = [entry for entry in read["sentences"] if entry[0].strip()]
        pictures.setdefault(read.pop("image_id"), []).append(read)
    if silent:
        log.warning("%s: left out %d empty sentences of split %s", refs_path, silent, split)
    if dropped:
        log.warning("%s: left out %d broken polygons of split %s", instances_path, dropped, split)
    for number, refs_there in pictures.items():
        image, where = images[number], f"{instances_path}: image {number}"
        yield attempt(partial(_row, number, image, refs_there, where), image.get("file_name"))


def _row(number: Any, image: dict[str, Any], refs: list[dict[str, Any]], where: str) -> dict[str, Any]:
    name, size = field(image, "file_name", where, str), size_of(image, where)
    return {"image_id": number, "file_name": name, "size": size, "refs": refs}


def _ref(ref: dict[str, Any], where: str, annotations: Table, images: Table, said: Sentence | None) -> dict[str, Any]:
    """What is kept of a ref, with the id of its picture, which must be that of its annotations."""
    number = images.key(field(ref, "image_id", where), "image", where)
    numbers = [annotations.key(value, "annotation", where) for value in annotation_ids(ref, where)]
    shapes = []
    for annotation in numbers:
        entry, place = annotations[annotation], f"{annotations.path}: annotation {annotation}"
        home = id_of(field(entry, "image_id", place), place, "image_id")
        if home != number and images.key(home, "image", place) != number:
            raise ValueError(
                f"{where}: is of image {number}, but its annotation {annotation} is of image {home} in "
                f"{annotations.path}; are the two files of one release?"
            )
        shapes.append(field(entry, "segmentation", place))
    sentences = [_sentence(one, bool(numbers), said, where) for one in field(ref, "sentences", where, list)]
    kept = {"ref_id": ref.get("ref_id"), "ann_ids": numbers, "segmentations": shapes, "sentences": sentences}
    return {"image_id": number, **kept}


def annotation_ids(ref: dict[str, Any], where: str) -> list[int]:
    """The annotations of a ref. In a list, none or the single number -1 means that its sentences name nothing there."""
    numbers = field(ref, "ann_id", where)
    numbers = (numbers if numbers != [-1] else []) if isinstance(numbers, list) else [numbers]
    if ref.get("no_target", not numbers) != (not numbers):
        raise ValueError(f"{where}: no_target is {ref['no_target']}, but ann_id is {ref['ann_id']}")
    return numbers


def _sentence(sentence: Any, has_annotation: bool, said: Sentence | None, where: str) -> tuple[str, bool, str | None]:
    """(text, is it there, correction)."""
    text = field(sentence, "sent", where)
    if not isinstance(text, str):
        raise ValueError(f"{where}: a sentence is {text!r}; expected text")
    there, correction = said(sentence, f"{where}: sentence {text!r}") if said else (True, None)
    return text, there and has_annotation, None if there else correction


def _chosen(refs: Any, path: Path, split: str) -> list[dict[str, Any]]:
    if not isinstance(refs, list):
        raise ValueError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    chosen = [ref for i, ref in enumerate(refs) if SPLITS[split](field(ref, "split", f"{path}: ref number {i}", str))]
    if not chosen:
        have = sorted({ref["split"] for ref in refs})
        raise EmptySplit(f"{path}: no ref of split {split!r} among {len(refs)}; it has {', '.join(have) or 'none'}")
    return chosen
