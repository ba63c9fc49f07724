"""Referring sets in the REFER toolkit's files: refs(<split_by>).p and instances.json (lisa.md 4.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import SOURCES, Rows, choice, field, locate, picture, read_json
from data.types import Record, Target
from utils.masks import OVERLAPS, Once, Size, segmentation_to_mask
from utils.safe_pickle import load_plain

FOLDERS = ("refer_seg/", "", "refer/")  # the level is there for training and missing for the released evaluation
COCO_2014 = (*((f"{base}images/mscoco/images/train2014",) for base in FOLDERS), ("coco/train2014",))
SAIAPR = tuple((f"{base}images/saiapr_tc-12",) for base in FOLDERS)

# The toolkit's rule: exact names, the letter of testA..C anywhere in the ref's split (RefCLEF has "testAB").
SPLITS: dict[str, Callable[[str], bool]] = {
    "train": lambda split: split == "train",
    "val": lambda split: split == "val",
    "test": lambda split: "test" in split,
    "testA": lambda split: "A" in split,
    "testB": lambda split: "B" in split,
    "testC": lambda split: "C" in split,
}
log = logging.getLogger(__name__)


class Refer:
    """One record a picture, one target a sentence; the sentences of one object share its mask.

    overlap: what pixels under several parts of one object are, see `segmentation_to_mask`.
    """

    def __init__(self, root: Path, name: str, split: str, *, split_by: str, images: tuple, overlap: str):
        choice(f"split of {name}", split, SPLITS)
        self._overlap = choice(f"overlap of {name}", overlap, OVERLAPS)
        self._refs, self._instances = locate(
            root,
            f"{name} {split_by}",
            *((f"{base}{name}/refs({split_by}).p", f"{base}{name}/instances.json") for base in FOLDERS),
        )
        (self._folder,) = locate(root, f"pictures of {name}", *images)
        self._rows = Rows(parse(self._refs, self._instances, split))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        targets = []
        for ref in row["refs"]:
            where = f"{self._instances}: annotation {ref['ann_id']} (ref {ref['ref_id']})"
            mask = Once(partial(draw, ref["segmentation"], tuple(row["size"]), self._overlap, where))
            targets += [Target(sentence, mask) for sentence in ref["sentences"]]
        image = picture(self._folder, row["file_name"], f"{self._instances}: image {row['image_id']}")
        return Record(image, "refer", tuple(targets))


@SOURCES.register("refclef")
def refclef(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refclef", split, split_by=split_by, images=SAIAPR, overlap=overlap)


@SOURCES.register("refcoco")
def refcoco(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refcoco", split, split_by=split_by, images=COCO_2014, overlap=overlap)


@SOURCES.register("refcoco+")
def refcoco_plus(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refcoco+", split, split_by=split_by, images=COCO_2014, overlap=overlap)


@SOURCES.register("refcocog")
def refcocog(root: Path, split: str = "train", split_by: str = "umd", overlap: str = "union") -> Refer:
    return Refer(root, "refcocog", split, split_by=split_by, images=COCO_2014, overlap=overlap)


def draw(segmentation: Any, size: Size, overlap: str, where: str) -> np.ndarray:
    """`segmentation_to_mask`, whose errors get the file and the entry."""
    try:
        return segmentation_to_mask(segmentation, size, overlap)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse(refs_path: Path, instances_path: Path, split: str) -> Iterator[dict[str, Any]]:
    """A row a picture of the split, in the order of the refs file; both files must agree."""
    refs = _chosen(load_plain(refs_path), refs_path, split)
    instances = read_json(instances_path)
    images, annotations = (_by_id(instances, key, instances_path) for key in ("images", "annotations"))
    pictures: dict[int, list[dict[str, Any]]] = {}
    silent = 0
    for ref in refs:
        where = f"{refs_path}: ref {ref.get('ref_id')}"
        sentences = [field(sentence, "sent", where).strip().lower() for sentence in field(ref, "sentences", where)]
        silent += sum(not sentence for sentence in sentences)
        annotation = _known(annotations, field(ref, "ann_id", where), "annotation", where, instances_path)
        kept = {
            "ref_id": ref.get("ref_id"),
            "ann_id": ref["ann_id"],
            "segmentation": field(annotation, "segmentation", f"{instances_path}: annotation {ref['ann_id']}"),
            "sentences": [sentence for sentence in sentences if sentence],
        }
        pictures.setdefault(field(ref, "image_id", where), []).append(kept)
    if silent:
        log.warning("%s: left out %d empty sentences of split %s", refs_path, silent, split)
    for image_id, refs_there in pictures.items():
        image = _known(images, image_id, "image", f"{refs_path}: ref {refs_there[0]['ref_id']}", instances_path)
        name, *size = (field(image, k, f"{instances_path}: image {image_id}") for k in ("file_name", "height", "width"))
        yield {"image_id": image_id, "file_name": name, "size": size, "refs": refs_there}


def _chosen(refs: Any, path: Path, split: str) -> list[dict[str, Any]]:
    if not isinstance(refs, list):
        raise ValueError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    chosen = [ref for i, ref in enumerate(refs) if SPLITS[split](field(ref, "split", f"{path}: ref number {i}"))]
    if not chosen:
        have = sorted({ref["split"] for ref in refs})
        raise ValueError(f"{path}: no ref of split {split!r} among {len(refs)}; it has {', '.join(have) or 'none'}")
    return chosen


def _by_id(instances: Any, key: str, path: Path) -> dict[int, dict[str, Any]]:
    return {
        field(entry, "id", f"{path}: {key}[{i}]"): entry for i, entry in enumerate(field(instances, key, str(path)))
    }


def _known(table: dict[int, Any], key: int, what: str, where: str, path: Path) -> Any:
    if key not in table:
        raise ValueError(f"{where}: names {what} {key}, which is not in {path}; are the two files of one release?")
    return table[key]
