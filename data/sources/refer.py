"""Referring sets in the REFER toolkit's files: refs(<split_by>).p and instances.json (lisa.md 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.readers.coco_file import Table, by_id, id_of, rasterize, released_mask, size_of, valid_polygons
from data.sources.base import (
    SOURCES,
    EmptySplit,
    Fault,
    attempt,
    choice,
    field,
    file_below,
    file_field,
    indexed_rows,
    locate,
    read_json,
)
from data.types import Record, Target
from utils.log import log
from utils.masks import OVERLAPS, CachedMask
from utils.safe_pickle import load_plain

FOLDERS = ("refer_seg/", "", "refer/")  # the releases have this level in training, but not in evaluation
COCO_2014 = (*((f"{base}images/mscoco/images/train2014",) for base in FOLDERS), ("coco/train2014",))
SAIAPR = tuple((f"{base}images/saiapr_tc-12",) for base in FOLDERS)
OTHER_HALF = "val2014"  # next to train2014, for images with names like COCO_val2014_*

# The toolkit's rule: names must be equal, but of testA to testC only the letter must occur in the ref's split (RefCLEF
# has "testAB").
SPLITS: dict[str, Callable[[str], bool]] = {
    "train": lambda split: split == "train",
    "val": lambda split: split == "val",
    "test": lambda split: "test" in split,
    "testA": lambda split: "A" in split,
    "testB": lambda split: "B" in split,
    "testC": lambda split: "C" in split,
}
# (sentence, where) -> (whether it is true of the image, what is there instead)
PremiseReader = Callable[[dict[str, Any], str], tuple[bool, str | None]]


class Refer:
    """One record per image, one target per sentence, as the file spells it; the sentences of one ref share its mask.

    If a ref has several annotations (`ann_id` is a list), its mask is their union; without any, its targets are absent.

    files: pairs of refs and instances files to look for, below the dataset folder. images: folders to look for.
    overlap: what pixels under several parts of one object are, see `segmentation_to_mask`.
    read_premise: whether a sentence is true of the image; None: all are.
    bad_polygons: "raise", or "drop" polygons that are none, with a warning that counts them.
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
        read_premise: PremiseReader | None = None,
        bad_polygons: str = "raise",
    ):
        choice(f"split of {name}", split, SPLITS)
        choice(f"bad_polygons of {name}", bad_polygons, ("raise", "drop"))
        self._overlap = choice(f"overlap of {name}", overlap, OVERLAPS)
        refs, self._instances = locate(root, name, *files)
        self.files = (refs, self._instances)
        (self._folder,) = locate(root, f"images of {name}", *images)
        options = split, read_premise, bad_polygons == "drop"
        self._rows = indexed_rows(root, parse, self.files, *options, image_key="file_name")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        targets = []
        for ref in row["refs"]:
            where = f"{self._instances}: annotation {', '.join(map(str, ref['ann_ids']))} (ref {ref['ref_id']})"
            shapes, size = ref["segmentations"], tuple(row["size"])
            mask = CachedMask(partial(rasterize, shapes, size, self._overlap, where), where)
            # With "exclude" the mask itself is already that of the released readers.
            released = released_mask(shapes, size, where) if self._overlap == "union" else None
            for text, present, correction in ref["sentences"]:
                if present:
                    targets.append(Target(text, mask, correction, released_mask=released))
                else:
                    targets.append(Target(text, None, correction))
        name = row["file_name"]
        image = file_below(self._image_folder(name), name, f"{self._instances}: image {row['image_id']}")
        return Record(image, "refer", tuple(targets))

    def image_paths(self) -> list[str]:
        return [f"{self._image_folder(name)}/{name}" for name in self._rows.image_names()]

    def _image_folder(self, name: Any) -> Path:
        """The folder of an image: val2014's for COCO_val2014_* that are not in the main one."""
        in_other_half = str(name).startswith(f"COCO_{OTHER_HALF}") and not (self._folder / name).is_file()
        return self._folder.with_name(OTHER_HALF) if in_other_half else self._folder


def refer_files(name: str, split_by: str) -> tuple[tuple[str, str], ...]:
    """Where the refs and instances files of a set may be."""
    return tuple((f"{base}{name}/refs({split_by}).p", f"{base}{name}/instances.json") for base in FOLDERS)


@SOURCES.register("refclef")
def refclef(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refclef", split, files=refer_files("refclef", split_by), images=SAIAPR, overlap=overlap)


@SOURCES.register("refcoco")
def refcoco(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    """split_by "unc_exclude_unified" is SESAME's release without images of other sets' evaluation splits."""
    return Refer(root, "refcoco", split, files=refer_files("refcoco", split_by), overlap=overlap)


@SOURCES.register("refcoco+")
def refcoco_plus(root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union") -> Refer:
    return Refer(root, "refcoco+", split, files=refer_files("refcoco+", split_by), overlap=overlap)


@SOURCES.register("refcocog")
def refcocog(root: Path, split: str = "train", split_by: str = "umd", overlap: str = "union") -> Refer:
    """split_by: "umd", "google" (no test split) or SESAME's "umd_exclude_unified"."""
    return Refer(root, "refcocog", split, files=refer_files("refcocog", split_by), overlap=overlap)


def parse(
    refs_path: Path, instances_path: Path, split: str, read_premise: PremiseReader | None, drop_bad_polygons: bool
) -> Iterator[Any]:
    """A row per image of the split, in the order of the refs file.

    ValueError where the two files contradict each other. Empty sentences, and with `drop_bad_polygons` broken polygons,
    are left out and counted in a warning.
    """
    refs = _refs_of_split(load_plain(refs_path) if refs_path.suffix == ".p" else read_json(refs_path), refs_path, split)
    instances = read_json(instances_path)
    images, annotations = (by_id(instances, key, instances_path) for key in ("images", "annotations"))
    refs_of_image: dict[Any, list[dict[str, Any]]] = {}
    empty = dropped = 0
    for ref in refs:
        where = f"{refs_path}: ref {ref.get('ref_id')}"
        row = attempt(partial(_ref, ref, where, annotations, images, read_premise))
        if isinstance(row, Fault):
            yield row
            continue
        if drop_bad_polygons:
            shapes = [valid_polygons(shape) for shape in row["segmentations"]]
            dropped += sum(len(old) - len(new) for old, new in zip(row["segmentations"], shapes, strict=True))
            row["segmentations"] = shapes
        empty += sum(not text.strip() for text, _, _ in row["sentences"])
        row["sentences"] = [entry for entry in row["sentences"] if entry[0].strip()]
        refs_of_image.setdefault(row.pop("image_id"), []).append(row)
    if empty:
        log.warning("%s: left out %d empty sentences of split %s", refs_path, empty, split)
    if dropped:
        log.warning("%s: left out %d broken polygons of split %s", instances_path, dropped, split)
    for number, image_refs in refs_of_image.items():
        image, where = images[number], f"{instances_path}: image {number}"
        yield attempt(partial(_row, number, image, image_refs, where), image.get("file_name"))


def _row(number: Any, image: dict[str, Any], refs: list[dict[str, Any]], where: str) -> dict[str, Any]:
    name, size = file_field(image, "file_name", where), size_of(image, where)
    return {"image_id": number, "file_name": name, "size": size, "refs": refs}


def _ref(
    ref: dict[str, Any], where: str, annotations: Table, images: Table, read_premise: PremiseReader | None
) -> dict[str, Any]:
    """The part of a ref that the rows need, with the id of its image, which must be that of its annotations."""
    number = images.key(field(ref, "image_id", where), "image", where)
    numbers = [annotations.key(value, "annotation", where) for value in annotation_ids(ref, where)]
    shapes = []
    for annotation in numbers:
        entry, place = annotations[annotation], f"{annotations.path}: annotation {annotation}"
        home = id_of(field(entry, "image_id", place), place, "image_id")
        # Refs and instances of different releases have the same ids for different annotations: this notices the mix.
        if home != number and images.key(home, "image", place) != number:
            raise ValueError(
                f"{where}: is of image {number}, but its annotation {annotation} is of image {home} in "
                f"{annotations.path}; are the two files of one release?"
            )
        shapes.append(field(entry, "segmentation", place))
    sentences = [_sentence(one, bool(numbers), read_premise, where) for one in field(ref, "sentences", where, list)]
    return {
        "image_id": number,
        "ref_id": ref.get("ref_id"),
        "ann_ids": numbers,
        "segmentations": shapes,
        "sentences": sentences,
    }


def annotation_ids(ref: dict[str, Any], where: str) -> list[int]:
    """The annotations of a ref; [] and [-1] mean that its sentences name nothing in the image.

    ValueError if `no_target`, where a ref has it, says otherwise.
    """
    numbers = field(ref, "ann_id", where)
    if not isinstance(numbers, list):
        numbers = [numbers]
    elif numbers == [-1]:
        numbers = []
    if ref.get("no_target", not numbers) != (not numbers):
        raise ValueError(f"{where}: no_target is {ref['no_target']}, but ann_id is {ref['ann_id']}")
    return numbers


def _sentence(
    sentence: Any, has_annotation: bool, read_premise: PremiseReader | None, where: str
) -> tuple[str, bool, str | None]:
    """(text, whether it names something in the image, correction)."""
    text = field(sentence, "sent", where)
    if not isinstance(text, str):
        raise ValueError(f"{where}: a sentence is {text!r}; expected text")
    is_true, correction = True, None
    if read_premise is not None:
        is_true, correction = read_premise(sentence, f"{where}: sentence {text!r}")
    return text, is_true and has_annotation, None if is_true else correction


def _refs_of_split(refs: Any, path: Path, split: str) -> list[dict[str, Any]]:
    """The refs of a split; EmptySplit if there is none."""
    if not isinstance(refs, list):
        raise ValueError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    in_split = SPLITS[split]
    matching = [ref for i, ref in enumerate(refs) if in_split(field(ref, "split", f"{path}: ref number {i}", str))]
    if not matching:
        have = sorted({ref["split"] for ref in refs})
        raise EmptySplit(f"{path}: no ref of split {split!r} among {len(refs)}; it has {', '.join(have) or 'none'}")
    return matching
