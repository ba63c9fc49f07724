"""Benchmarks by name. A suite is a split of a source with the way its answers are scored: one entry each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.sources import Source, build_source
from data.sources.base import image_paths
from data.types import Record
from evaluation import absent, several  # noqa: F401  (they register their scorers)
from evaluation.protocols import FORCED, TWO_PASS
from utils.registry import unknown


@dataclass(frozen=True)
class Suite:
    """`name` is what users type and, unless `source` says otherwise, what `build_source` takes.

    present_only: ask about what is there, though the files may also ask about what is not.
    """

    name: str
    group: str
    metric: str  # a name in SCORERS
    needs: str  # the data, below the dataset folder
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    present_only: bool = False
    forced: str = FORCED  # the protocol that "teacher_forced" means here; as published, two passes decide on absence

    def open(self, dataset_dir: str | Path, options: dict[str, Any] | None = None) -> Source:
        """The pictures; missing data raise an error that names the paths. The suite's own options win over these."""
        source = build_source(self.source or self.name, dataset_dir, **{**(options or {}), **self.options})
        return PresentOnly(source) if self.present_only else source

    @property
    def base(self) -> str:
        """The name in SOURCES."""
        return (self.source or self.name).split("|")[0]


class PresentOnly:
    """A source without its absent targets."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return replace(record, targets=tuple(target for target in record.targets if target.mask is not None))

    def image_paths(self) -> list[str]:
        return image_paths(self.source)


REFER_SETS = (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
FIRST_TEXT = {"texts": "first", "explanations": False}  # the published protocol asks the first rephrasing (lisa.md 3.3)

ENTRIES = (
    Suite("ade20k|val", "semantic", "semantic", "ade20k: images and annotations of validation"),
    Suite("cocostuff|val", "semantic", "semantic", "cocostuff/val2017, coco/val2017"),
    Suite("cityscapes|val", "semantic", "semantic", "cityscapes: gtFine/val, leftImg8bit/val"),
    Suite("mapillary|val", "semantic", "semantic", "mapillary: validation, and its config or panoptic JSON"),
    *(
        Suite(
            f"{name}|{split_by}|{split}", "refer", "overlap", f"{name}/refs({split_by}).p, instances.json, {pictures}"
        )
        for name, split_by, pictures, splits in (
            ("refcoco", "unc", "train2014", ("val", "testA", "testB")),
            ("refcoco+", "unc", "train2014", ("val", "testA", "testB")),
            ("refcocog", "umd", "train2014", ("val", "test")),
            ("refclef", "unc", "saiapr_tc-12", ("val", "testA", "testB", "testC")),
        )
        for split in splits
    ),
    *(
        Suite(
            f"grefcoco|unc|{split}",
            "generalised",
            "generalised",
            "grefcoco/grefs(unc).p or .json, instances.json",
            forced=TWO_PASS,
        )
        for split in ("val", "testA", "testB")
    ),
    Suite(
        "refzom|final|test",
        "generalised",
        "generalised_apart",
        "refzom: refs(final).p, instances.json, pictures",
        forced=TWO_PASS,
    ),
    *(
        Suite(f"{name}|{split_by}_exclude_unified|{split}", group, metric, f"{name}/refs({split_by}_exclude_unified).p")
        for name, split_by, group, metric in (
            *((f"fp{name}", "berkeley", "premise", "premise") for name in ("refcoco", "refcoco+", "refcocog")),
            *((f"R-{name}", split_by, "premise", "premise") for name, split_by in REFER_SETS),
            *((name, split_by, "refer_apart", "overlap") for name, split_by in REFER_SETS),
        )
        for split in ("val", "test")
    ),
    Suite("ReasonSeg|val", "reason", "overlap", "ReasonSeg/val", FIRST_TEXT, present_only=True),
    Suite("ReasonSeg|test", "reason", "overlap", "ReasonSeg/test", FIRST_TEXT, present_only=True),
    *(
        Suite(f"muse|{split}", "multi", "matched", f"muse_{split}.json, COCO pictures below refer_seg/images")
        for split in ("val", "test_few", "test_many")
    ),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in ENTRIES}
GROUPS = tuple(dict.fromkeys(suite.group for suite in ENTRIES))
ALIASES = {suite.name.split("|")[0]: suite.name for suite in ENTRIES if suite.group == "semantic"}  # as flags name them
ALIASES["MultiReasonSeg|val"] = "muse|val"


def find_suites(patterns: Iterable[str]) -> list[Suite]:
    """The suites of names, groups (`semantic`, `all`), names of semantic sets (`ade20k`) and globs (`refcoco*|val`).

    In the order asked, each once. A pattern that finds nothing raises and lists the choices.
    """
    found: dict[str, Suite] = {}
    for pattern in patterns:
        hits = [suite for suite in ENTRIES if _fits(suite, pattern)]
        if not hits:
            raise ValueError(unknown("suite", pattern, (*SUITES, *GROUPS, "all")))
        found |= {suite.name: suite for suite in hits}
    if not found:
        raise ValueError(f"no suite named; have: {', '.join(SUITES)}, and the groups {', '.join(GROUPS)}, all")
    return list(found.values())


def table() -> str:
    """What `--list` prints: name, group, metric, data needed."""
    rows = [("suite", "group", "metric", "data below the dataset folder")]
    rows += [(suite.name, suite.group, suite.metric, suite.needs) for suite in ENTRIES]
    name, group, metric = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(f"{row[0]:<{name}}  {row[1]:<{group}}  {row[2]:<{metric}}  {row[3]}" for row in rows)


def _fits(suite: Suite, pattern: str) -> bool:
    if pattern in ("all", suite.name, suite.group) or ALIASES.get(pattern) == suite.name:
        return True
    return any(mark in pattern for mark in "*?[") and fnmatch.fnmatchcase(suite.name, pattern)
