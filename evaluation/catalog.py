"""The benchmarks that are known by name: a split of a source with the way its answers are scored, one entry each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.sources import Source, build_source
from data.sources.base import first_of
from evaluation.metrics import exact  # noqa: F401  (they register their scorers)
from evaluation.metrics import matched as several  # noqa: F401  (they register their scorers)
from evaluation.metrics import no_target as absent  # noqa: F401  (they register their scorers)
from evaluation.metrics.scorers import SCORERS
from evaluation.protocols import FORCED, GENERATED, TWO_PASS
from evaluation.wrappers import Grouped, PresentOnly

TWO_PASS_METRICS = (
    "generalised",
    "generalised_apart",
)  # metrics of forced answers in which the model decides what is there


@dataclass(frozen=True)
class Suite:
    """`name` is what users type and, unless `source` says otherwise, what `build_source` takes.

    present_only: ask about what is there, though the files may also ask about what is not.
    groups: ask for several targets in one question, in groups of these sizes in turn.
    own: not one of the catalog; it states all options of its source itself.
    """

    name: str
    group: str
    metric: str  # a name in SCORERS
    needs: str  # the data, below the dataset folder
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    present_only: bool = False
    groups: tuple[int, ...] = ()
    own: bool = False

    def open(self, dataset_dir: str | Path, options: dict[str, Any] | None = None) -> Source:
        """The pictures; missing data raise an error that names the paths. The suite's own options win over these."""
        source = build_source(self.source or self.name, dataset_dir, **{**(options or {}), **self.options})
        if not len(source):
            raise ValueError(f"suite {self.name!r}: {self.base} holds no picture; there is nothing to score")
        if self.own and (kind := first_of(source, lambda record: record.kind)):
            self._check_kind(kind)
        source = PresentOnly(source) if self.present_only else source
        return Grouped(source, self.groups) if self.groups else source

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it apart from another suite of its name: where its data come from and how they are scored."""
        return {
            "source": self.source or self.name,
            "suite_options": self.options,
            "metric": self.metric,
            "present_only": self.present_only,
            "groups": self.groups,
        }

    @property
    def teacher_forced_protocol(self) -> str:
        """The protocol that "teacher_forced" means here; as published, two passes decide on absence."""
        return TWO_PASS if self.metric in TWO_PASS_METRICS else FORCED

    @property
    def protocols(self) -> str:
        """The default, and what stands for the published way of giving the answer."""
        return f"{GENERATED}, {self.teacher_forced_protocol}"

    @property
    def set(self) -> str:
        """The name without its split."""
        return self.name.split("|")[0]

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


REFERRING = (  # set, whose split, pictures, splits (lisa.md 4.4)
    ("refcoco", "unc", "train2014", ("val", "testA", "testB")),
    ("refcoco+", "unc", "train2014", ("val", "testA", "testB")),
    ("refcocog", "umd", "train2014", ("val", "test")),
    ("refclef", "unc", "saiapr_tc-12", ("val", "testA", "testB", "testC")),
)
FIRST_TEXT = {"texts": "first", "explanations": False}  # the published protocol asks the first rephrasing (lisa.md 3.3)
PAIR = {"texts": "pair", "explanations": False}  # one true and one false question per picture (sesame.md 6.4)
ALL_TEXTS = {"texts": "all", "explanations": False}
TOGETHER = (6, 5, 4)  # expressions in a question of multi-RefCOCO (pixellm.md 6.2)

ENTRIES = (
    Suite("ade20k|val", "semantic", "semantic", "ade20k: images and annotations of validation"),
    Suite("cocostuff|val", "semantic", "semantic", "cocostuff/val2017, coco/val2017"),
    Suite("cityscapes|val", "semantic", "semantic", "cityscapes: gtFine/val, leftImg8bit/val"),
    Suite(
        "mapillary|val",
        "semantic",
        "semantic",
        "mapillary v1.2, 65 classes: validation, and its config or panoptic JSON",
        {"version": "v1.2"},
    ),
    Suite(
        "mapillary-v2.0|val",
        "semantic-v2.0",
        "semantic",
        "mapillary v2.0: validation, config_v2.0.json",
        {"version": "v2.0"},
        source="mapillary|val",
    ),
    *(
        Suite(name, "open", "semantic", f"VOCdevkit/{year}: JPEGImages, {maps}, ImageSets/{lists}/val.txt")
        for name, year, maps, lists in (
            ("pascal_context|val", "VOC2010", "SegmentationClassContext", "SegmentationContext"),
            ("pascal_voc|val", "VOC2012", "SegmentationClass", "Segmentation"),
        )
    ),
    *(
        Suite(f"{name}|{by}|{split}", "refer", "overlap", f"{name}/refs({by}).p, instances.json, {pictures}")
        for name, by, pictures, splits in REFERRING
        for split in splits
    ),
    *(
        Suite(
            f"multi{name}|{by}|{split}",
            "multi_refer",
            "overlap",
            f"as {name}|{by}|{split}; {', '.join(map(str, TOGETHER))} expressions in a question",
            source=f"{name}|{by}|{split}",
            groups=TOGETHER,
        )
        for name, by, _, splits in REFERRING[:3]
        for split in splits
    ),
    *(
        Suite(f"grefcoco|unc|{split}", "gref", "generalised", "grefcoco/grefs(unc).p or .json, instances.json")
        for split in ("val", "testA", "testB")
    ),
    Suite("refzom|final|test", "zom", "generalised_apart", "refzom: refs(final).p, instances.json, pictures"),
    *(
        Suite(f"{name}|{by}|{split}", group, "premise", f"{name}/refs({by}).p, instances.json, train2014")
        for group, before, one in (("fp", "fp", "berkeley"), ("r", "R-", None))
        for name, by in ((f"{before}{name}", f"{one or own}_exclude_unified") for name, own, *_ in REFERRING[:3])
        for split in ("val", "test")
    ),
    *(
        Suite(
            f"apart-{name}|{split}",
            "refer_apart",
            "overlap",
            f"{name}/refs({by}_exclude_unified).p, instances.json, train2014",
            source=f"{name}|{by}_exclude_unified|{split}",
        )
        for name, by, *_ in REFERRING[:3]
        for split in ("val", "test")
    ),
    *(
        Suite(f"ReasonSeg|{split}", "reason", "overlap", f"ReasonSeg/{split}", FIRST_TEXT, present_only=True)
        for split in ("val", "test")
    ),
    *(
        Suite(
            f"ReasonSeg-all|{split}",
            "reason_all",
            "overlap",
            f"ReasonSeg/{split}; every rephrasing is asked",
            ALL_TEXTS,
            source=f"ReasonSeg|{split}",
            present_only=True,
        )
        for split in ("val", "test")
    ),
    Suite(
        "ReasonSeg-premise|val",
        "reason_premise",
        "premise",
        "ReasonSeg/val with false_premise_QA in every file, SESAME's release",
        PAIR,
        source="ReasonSeg|val",
    ),
    *(
        Suite(f"muse|{split}", "muse", "matched", f"muse_{split}.json, COCO pictures below refer_seg/images")
        for split in ("val", "test_few", "test_many")
    ),
    Suite("vqa|val", "vqa", "exact", "vqa/val.json: a list of image, question, answer or answers; the pictures beside"),
)
