"""Contamination: which pictures may not be trained on because they are evaluated on, recognised across data sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sources import Source, build_source
from data.sources.base import EmptySplit, image_paths
from utils.config import DatasetConfig
from utils.log import log

# The evaluation splits on COCO train2014 pictures; of each the released file, or the one that another paper cleaned.
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
COCO = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")


@dataclass(frozen=True)
class Rule:
    """A choice of `data.exclude_val`. `suites`: what the recipe itself is evaluated on.

    splits: of each entry the first source that is there.
    """

    splits: tuple[tuple[str, ...], ...] = ()
    suites: bool = False
    applies: Callable[[str], bool] = lambda name: True  # to the training source of this name


RULES = {
    "off": Rule(),
    "eval_suites": Rule(suites=True),
    "refer_family": Rule(REFER_FAMILY),  # what the LISA paper says of its training data
    "cross_refer": Rule(REFER_FAMILY, applies=lambda name: REFER_TRAINING.fullmatch(name) is not None),  # sesame.md 4.2
}


@dataclass(frozen=True)
class Blocklist:
    """Pictures (`picture_key`) that are evaluated on; `splits` are those they come from."""

    rule: str = "off"
    keys: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ()

    @classmethod
    def build(cls, rule: str, root: Path, suites: Sequence[DatasetConfig] = ()) -> Blocklist:
        """The blocklist of a recipe. `suites`: the sources that it is evaluated on.

        Splits of the rule that `root` does not hold are left out with a warning; none at all is an error, as is a
        missing suite.
        """
        named, missing = RULES[rule], []
        evaluated = suites if named.suites else ()
        found = [(entry.source, build_source(entry.source, root, **entry.options)) for entry in evaluated]
        for names in named.splits:
            name, source = _first_there(names, root)
            if source is None:
                missing.append(name)
            else:
                found.append((name, source))
        if named.splits and not found:
            raise FileNotFoundError(f"data.exclude_val {rule}: {root} has none of {', '.join(missing)}")
        if missing:
            log.warning("exclude_val %s goes without %s: not below %s", rule, ", ".join(missing), root)
        keys = frozenset(picture_key(path) for _, source in found for path in image_paths(source))
        return cls(rule, keys, tuple(name for name, _ in found))

    def usable(self, name: str, source: Source) -> np.ndarray | range:
        """The records of the training source `name` whose picture is not on the list."""
        if not self.keys or not RULES[self.rule].applies(name.split("|")[0]):
            return range(len(source))
        blocked = np.fromiter((picture_key(path) in self.keys for path in image_paths(source)), bool, len(source))
        usable = np.flatnonzero(~blocked)
        log.info("exclude_val %s: %s trains without %d of %d pictures", self.rule, name, blocked.sum(), len(source))
        return usable if blocked.any() else range(len(source))


def _first_there(names: tuple[str, ...], root: Path) -> tuple[str, Source | None]:
    for name in names:
        try:
            return name, build_source(name, root)
        except (FileNotFoundError, EmptySplit):
            continue
    return names[0], None


def picture_key(path: str | Path) -> str:
    """What tells a picture: COCO's number, the same in all its releases and in what is built on them; else the file."""
    number = COCO.fullmatch(Path(path).stem)
    return f"coco {number[1]}" if number else os.path.abspath(path)
