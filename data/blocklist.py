"""Keeps evaluation images out of training (contamination), recognising them across data sets."""

from __future__ import annotations

import filecmp
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.sources import Source, build_source
from data.sources.base import EmptySplit, image_paths
from utils.config import DatasetConfig
from utils.log import log

# The evaluation splits on COCO train2014 images. Each in order of preference: the released file, then SESAME's file of
# the same split, which leaves out images that other sets evaluate on.
UNC = ("unc", "unc_exclude_unified")
REFER_FAMILY = tuple(
    tuple(f"{name}|{split_by}|{split}" for split_by in files)
    for name, files, splits in (
        ("refcoco", UNC, ("val", "testA", "testB")),
        ("refcoco+", UNC, ("val", "testA", "testB")),
        ("refcocog", ("umd", "umd_exclude_unified"), ("val", "test")),
        ("grefcoco", ("unc",), ("val", "testA", "testB")),
        ("fprefcoco", ("berkeley_exclude_unified",), ("val",)),
        ("fprefcoco+", ("berkeley_exclude_unified",), ("val",)),
        ("fprefcocog", ("berkeley_exclude_unified",), ("val",)),
    )
    for split in splits
)
REFER_TRAINING = re.compile(r"(R-|fp|g)?refcoco[+g]?")  # the training sets that such a split can leak into
COCO_NAME = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12})")
COCO_NUMBER = re.compile(r"(\d{12})")  # the name of an image in COCO's own folders from 2017 on
TWELVE_DIGITS = re.compile(r"(?:COCO_\w+_)?(\d{12})")  # a name as COCO's, wherever the image lies
COCO_FOLDER = re.compile(r"(?:train|val|test|unlabeled)20(?:14|15|17)")


@dataclass(frozen=True)
class Rule:
    """A choice of `data.exclude_val`.

    splits: sources whose images are blocked; of each entry the first that exists.
    suites: also block the images that the recipe itself is evaluated on.
    applies: whether a training source, by name, loses its blocked images.
    """

    splits: tuple[tuple[str, ...], ...] = ()
    suites: bool = False
    applies: Callable[[str], bool] = lambda name: True


RULES = {
    "off": Rule(),
    "eval_suites": Rule(suites=True),
    "refer_family": Rule(REFER_FAMILY),  # what the LISA paper says of its training data
    "cross_refer": Rule(REFER_FAMILY, applies=lambda name: REFER_TRAINING.fullmatch(name) is not None),  # sesame.md 4.2
}


class ImageSet:
    """A set of images. An image is in it by its `picture_key`, or as a copy: people copy some of COCO's images, with
    their names, to folders of their own, where an equal number alone does not tell (their own images are numbered, too)
    but the bytes of the file do.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self.keys: set[str] = set()
        self._numbered: dict[str, set[str]] = defaultdict(set)  # twelve digits -> files that have them in their name
        for path in paths:
            self.keys.add(picture_key(path))
            if digits := TWELVE_DIGITS.fullmatch(Path(path).stem):
                self._numbered[digits[1]].add(path)

    def __contains__(self, path: str) -> bool:
        return self.has(path, picture_key(path))

    def has(self, path: str, key: str) -> bool:
        """The same where the image's key is known: it may take a look at the disk, and many sets may be asked."""
        if key in self.keys:
            return True
        digits = TWELVE_DIGITS.fullmatch(Path(path).stem)
        return digits is not None and any(_same_file(path, other) for other in self._numbered.get(digits[1], ()))

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Blocklist:
    """Images that are evaluated on; `splits` names the sources that they come from."""

    rule: str = "off"
    images: ImageSet = field(default_factory=ImageSet)
    splits: tuple[str, ...] = ()

    @classmethod
    def build(cls, rule: str, root: Path, suites: Sequence[DatasetConfig] = ()) -> Blocklist:
        """The blocklist of a recipe. suites: the sources that it is evaluated on.

        Splits of the rule that `root` lacks are left out with a warning. FileNotFoundError if it has none of them, or
        if a suite is missing.
        """
        choice = RULES[rule]
        evaluated = suites if choice.suites else ()
        sources = [(entry.source, build_source(entry.source, root, **entry.options)) for entry in evaluated]
        missing = []
        for names in choice.splits:
            name, source = _first_existing(names, root)
            if source is None:
                missing.append(name)
            else:
                sources.append((name, source))
        if choice.splits and not sources:
            raise FileNotFoundError(f"data.exclude_val {rule}: {root} has none of {', '.join(missing)}")
        if missing:
            log.warning("exclude_val %s goes without %s: not below %s", rule, ", ".join(missing), root)
        images = ImageSet(path for _, source in sources for path in image_paths(source))
        return cls(rule, images, tuple(name for name, _ in sources))

    def usable(self, name: str, source: Source) -> np.ndarray | range:
        """Indices of the records of the training source `name` whose image is not blocked."""
        if not self.images or not RULES[self.rule].applies(name.split("|")[0]):
            return range(len(source))
        blocked = np.fromiter((path in self.images for path in image_paths(source)), bool, len(source))
        usable = np.flatnonzero(~blocked)
        log.info("exclude_val %s: %s trains without %d of %d images", self.rule, name, blocked.sum(), len(source))
        return usable if blocked.any() else range(len(source))


def _first_existing(names: tuple[str, ...], root: Path) -> tuple[str, Source | None]:
    """The first of these sources that `root` has; without any, the first name and None."""
    for name in names:
        try:
            return name, build_source(name, root)
        except (FileNotFoundError, EmptySplit):
            continue
    return names[0], None


def picture_key(path: str | Path) -> str:
    """What identifies an image: COCO's number, which all its releases and derived sets share; else the file's path.

    So "COCO_train2014_000000000009.jpg" of RefCOCO and "train2017/000000000009.jpg" of COCO-Stuff have one key. Twelve
    digits in a folder that is not COCO's are a name like any other. Links are followed.
    """
    if number := _coco_number(Path(path)):  # without a look at the disk
        return f"coco {number}"
    real = os.path.realpath(path)
    number = _coco_number(Path(real))
    return f"coco {number}" if number else real


def _coco_number(path: Path) -> str | None:
    """The twelve digits of an image that is COCO's by its name, or by that of its folder."""
    found = COCO_NAME.fullmatch(path.stem)
    if not found and COCO_FOLDER.fullmatch(path.parent.name):
        found = COCO_NUMBER.fullmatch(path.stem)
    return found[1] if found else None


def _same_file(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # missing images are reported where they are read
        return False
