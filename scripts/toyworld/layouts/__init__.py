"""Toy scenes in the on-disk layouts of real data sets. To add one: a function from World to a line of summary, here."""

from collections.abc import Callable
from dataclasses import dataclass

from toyworld.layouts import reason, refer, semantic, vqa
from toyworld.layouts.world import POOLS, World

__all__ = ["LAYOUTS", "POOLS", "Layout", "World"]


@dataclass(frozen=True)
class Layout:
    """`write` draws its training pictures from `pool`; layouts of one pool share their pictures."""

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
}
