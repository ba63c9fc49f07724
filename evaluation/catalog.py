"""The benchmarks that are known by name: a split of a source with the way its answers are scored, one entry each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.sources import Source, build_source
from data.sources.base import image_paths
from data.types import Record
from evaluation import absent, several  # noqa: F401  (they register their scorers)
from evaluation.protocols import FORCED, TWO_PASS
from evaluation.scoring import SCORERS

DECIDED = ("generalised", "generalised_apart")  # metrics of forced answers in which the model decides what is there


@dataclass(frozen=True)
class Suite:
    """`name` is what users type and, unless `source` says otherwise, what `build_source` takes.

    present_only: ask about what is there, though the files may also ask about what is not.
    own: not one of the catalog; it states all options of its source itself.
    """

    name: str
    group: str
    metric: str  # a name in SCORERS
    needs: str  # the data, below the dataset folder
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    present_only: bool = False
    own: bool = False

    def open(self, dataset_dir: str | Path, options: dict[str, Any] | None = None) -> Source:
        """The pictures; missing data raise an error that names the paths. The suite's own options win over these."""
        source = build_source(self.source or self.name, dataset_dir, **{**(options or {}), **self.options})
        if self.own and len(source):
            self._check_kind(source[0].kind)
        return PresentOnly(source) if self.present_only else source

    @property
    def forced(self) -> str:
        """The protocol that "teacher_forced" means here; as published, two passes decide on absence."""
        return TWO_PASS if self.metric in DECIDED else FORCED

    @property
    def base(self) -> str:
        """The name in SOURCES."""
        return (self.source or self.name).split("|")[0]

    def _check_kind(self, kind: str) -> None:
        if kind not in SCORERS[self.metric].KINDS:
            fit = [name for name in SCORERS if kind in SCORERS[name].KINDS]
            raise ValueError(
                f"suite {self.name!r}: metric {self.metric!r} is for {' and '.join(SCORERS[self.metric].KINDS)} data, "
                f"{self.base} gives {kind!r}; metrics for these: {', '.join(fit)}"
            )


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
        )
        for split in ("val", "testA", "testB")
    ),
    Suite(
        "refzom|final|test",
        "generalised",
        "generalised_apart",
        "refzom: refs(final).p, instances.json, pictures",
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
