"""Toy scenes in the on-disk layouts of real data sets.

To add a layout: write a function that takes a World and returns a one-line summary, and list it in LAYOUTS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from toy.world.layouts import false_premise, grefer, muse, openimages, own, parts, reason, refer, semantic, vqa
from toy.world.layouts.world import POOLS, World

__all__ = ["LAYOUTS", "POOLS", "Layout", "World"]


@dataclass(frozen=True)
class Layout:
    """`write` takes its training scenes from `pool`; layouts of one pool share their images."""

    pool: str
    write: Callable[[World], str]


LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout("ade20k", semantic.ade20k),
    "cocostuff": Layout("coco2017", semantic.cocostuff),
    "cityscapes": Layout("cityscapes", semantic.cityscapes),
    "mapillary": Layout("mapillary", semantic.mapillary),
    "refcoco": Layout("coco2014", refer.refcoco),
    "refcoco+": Layout("coco2014", refer.refcoco_plus),
    "refcocog": Layout("coco2014", refer.refcocog),
    "refclef": Layout("saiapr", refer.refclef),
    "reason_seg": Layout("reason_seg", reason.reason_seg),
    "llava_instruct": Layout("coco2017", vqa.llava_instruct),
    "paco_lvis": Layout("coco2017", parts.paco_lvis),
    "pascal_part": Layout("ade20k", parts.pascal_part),
    "partimagenet": Layout("saiapr", parts.partimagenet),
    "openimage": Layout("mapillary", openimages.openimage),
    "grefcoco": Layout("coco2014", grefer.grefcoco),
    "refzom": Layout("coco2014", grefer.refzom),
    **{f"R-{name}": Layout("coco2014", partial(false_premise.denied, name=name)) for name in false_premise.STYLES},
    **{f"fp{name}": Layout("coco2014", partial(false_premise.corrected, name=name)) for name in false_premise.STYLES},
    "pascal_context": Layout("cityscapes", semantic.pascal_context),
    "pascal_voc": Layout("cityscapes", semantic.pascal_voc),
    "vqa": Layout("cityscapes", vqa.short_answers),
    "muse": Layout("coco2017", muse.muse),
    "coco": Layout("coco2017", own.coco),
    "folder": Layout("cityscapes", own.folder),
    "jsonl": Layout("cityscapes", own.jsonl),
}
