"""The benchmarks that are known by name: each is a split of a source with the metric that scores its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.readers.index import keeping_faults
from data.sources import Source, build_source
from data.sources.base import first_of
from evaluation.metrics import SCORERS
from evaluation.protocols import FORCED, GENERATED, TWO_PASS
from evaluation.wrappers import Grouped, PresentOnly

TWO_PASS_METRICS = ("generalised", "generalised_apart")  # whose published protocol decides on absence in two passes


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    name: what users type and, unless `source` is set, what `build_source` takes. group: a name for several suites.
    metric: a name in SCORERS. needs: for users, the data below the dataset folder. options: of the source.
    present_only: ask only about present targets, although the files may hold absent ones. groups: ask for several
    targets per question, in groups of these sizes in turn. own: defined by a recipe or a file, not by this catalog; it
    states all options of its source itself.
    """

    name: str
    group: str
    metric: str
    needs: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    present_only: bool = False
    groups: tuple[int, ...] = ()
    own: bool = False

    def open(
        self, dataset_dir: str | Path, options: dict[str, Any] | None = None, *, keep_faults: bool = False
    ) -> Source:
        """The suite's records. The suite's own options win over `options`. keep_faults: a bad entry of a file is raised
        by its record, not here. Raises an error that names the paths where data are missing, and ValueError where there
        is no record or the metric cannot score this kind of record."""
        with keeping_faults(keep_faults):
            source = build_source(self.source or self.name, dataset_dir, **{**(options or {}), **self.options})
        if not len(source):
            raise ValueError(f"suite {self.name!r}: {self.base} holds no image; there is nothing to score")
        if self.own:  # those of the catalog fit
            kind = first_of(source, lambda record: record.kind)
            if kind:
                self._check_kind(kind)
        source = PresentOnly(source) if self.present_only else source
        return Grouped(source, self.groups) if self.groups else source

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from another suite of the same name: where its data come from, how they are scored."""
        return {
            "source": self.source or self.name,
            "suite_options": self.options,
            "metric": self.metric,
            "present_only": self.present_only,
            "groups": self.groups,
        }

    @property
    def teacher_forced_protocol(self) -> str:
        """What `teacher_forced` runs for this suite: plain teacher forcing, or two passes where absence is scored (as
        published)."""
        return TWO_PASS if self.metric in TWO_PASS_METRICS else FORCED

    @property
    def protocols(self) -> str:
        """The default protocol, and the one that `teacher_forced` stands for."""
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
        if kind not in SCORERS[self.metric].kinds:
            fit = [name for name in SCORERS if kind in SCORERS[name].kinds]
            raise ValueError(
                f"suite {self.name!r}: metric {self.metric!r} is for {' and '.join(SCORERS[self.metric].kinds)} data, "
                f"{self.base} gives {kind!r}; metrics for these: {', '.join(fit)}"
            )


REFERRING = (  # set, author of the split, folder of images, splits (lisa.md 4.4)
    ("refcoco", "unc", "train2014", ("val", "testA", "testB")),
    ("refcoco+", "unc", "train2014", ("val", "testA", "testB")),
    ("refcocog", "umd", "train2014", ("val", "test")),
    ("refclef", "unc", "saiapr_tc-12", ("val", "testA", "testB", "testC")),
)
FIRST_TEXT = {"texts": "first", "explanations": False}  # the published protocol asks the first rephrasing (lisa.md 3.3)
PAIR = {"texts": "pair", "explanations": False}  # one true and one false question per image (sesame.md 6.4)
ALL_TEXTS = {"texts": "all", "explanations": False}
GROUP_SIZES = (6, 5, 4)  # expressions per question of multi-RefCOCO (pixellm.md 6.2)

ENTRIES = (
    Suite("ade20k|val", "semantic", "semantic", "ade20k: images and annotations of validation"),
    Suite("cocostuff|val", "semantic", "semantic", "cocostuff/val2017, coco/val2017", {"table": "171"}),
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
        Suite(f"{name}|{by}|{split}", "refer", "overlap", f"{name}/refs({by}).p, instances.json, {images}")
        for name, by, images, splits in REFERRING
        for split in splits
    ),
    *(
        Suite(
            f"multi{name}|{by}|{split}",
            "multi_refer",
            "overlap",
            f"as {name}|{by}|{split}; {', '.join(map(str, GROUP_SIZES))} expressions in a question",
            source=f"{name}|{by}|{split}",
            groups=GROUP_SIZES,
        )
        for name, by, _, splits in REFERRING[:3]
        for split in splits
    ),
    *(
        Suite(f"grefcoco|unc|{split}", "gref", "generalised", "grefcoco/grefs(unc).p or .json, instances.json")
        for split in ("val", "testA", "testB")
    ),
    Suite("refzom|final|test", "zom", "generalised_apart", "refzom: refs(final).p, instances.json, images"),
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
        Suite(f"muse|{split}", "muse", "matched", f"muse_{split}.json, COCO images below refer_seg/images")
        for split in ("val", "test_few", "test_many")
    ),
    Suite("vqa|val", "vqa", "exact", "vqa/val.json: a list of image, question and answers; next to it the images"),
)
