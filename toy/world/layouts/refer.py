"""Referring sets in the REFER toolkit's files: RefCOCO, RefCOCO+, RefCOCOg and RefCLEF (lisa.md 4.4)."""

from toy.world.expressions import POSITIONAL, Expression, expressions
from toy.world.layouts.refsets import RefSet, write_refs
from toy.world.layouts.world import World
from toy.world.scene import Scene
from toy.world.words import noun

UNC = (
    "refs(unc).p",
    "refs(unc_exclude_unified).p",
)  # SESAME's selection leaves out images shared between sets; no toy image is
UMD = ("refs(umd).p", "refs(umd_exclude_unified).p")


def refcoco(world: World) -> str:
    """Short phrases, with words of position."""
    return write_refs(world, RefSet("refcoco", UNC, phrases))


def refcoco_plus(world: World) -> str:
    """Short phrases without any word of position."""
    return write_refs(world, RefSet("refcoco+", UNC, looks_only))


def refcocog(world: World) -> str:
    """Full descriptions: looks and relation."""
    return write_refs(world, RefSet("refcocog", UMD, descriptions, tests="test"))


def refclef(world: World) -> str:
    """Short phrases; masks as lists of run lengths, images in nested folders."""
    return write_refs(world, RefSet("refclef", UNC[:1], phrases, tests="testABC", pool="saiapr"))


def phrases(scene: Scene) -> list[Expression]:
    return [Expression(item.text.removeprefix("the "), item.targets, item.kind) for item in expressions(scene)]


def looks_only(scene: Scene) -> list[Expression]:
    return [item for item in phrases(scene) if item.kind not in POSITIONAL]


def descriptions(scene: Scene) -> list[Expression]:
    """ "the large red car left of the house": a relation that holds for one object, and how that object looks."""
    items = []
    for item in expressions(scene):
        thing = scene.things[item.targets[0]]
        if item.kind == "relation":
            text = item.text.replace(thing.name, noun(thing, size=True), 1)
            items.append(Expression(text, item.targets, item.kind))
    return items
