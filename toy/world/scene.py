"""Scenes of the toy world: an image and all facts about it, both from one integer seed."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from toy.world.ground import STUFF, draw_ground
from toy.world.paint import Sprite, draw_object
from toy.world.shapes import COLORS, OBJECTS, PARTS

__all__ = ["CLASSES", "COLORS", "OBJECTS", "PARTS", "SIDE", "STUFF", "Scene", "Thing", "make_scene", "scene_seed"]

SIDE = 160  # pixels
CLASSES: tuple[str, ...] = (*OBJECTS, *STUFF)
ACROSS = {"small": (27, 36), "large": (45, 60)}  # longer side in pixels, so that the sizes never overlap
VISIBLE_SHARE, VISIBLE_PIXELS = 0.4, 60  # every object keeps at least this much in view, or the new one is not placed
PLACES = 12  # positions tried per object
SPLITS = ("base", "train", "val")


@dataclass(frozen=True, eq=False)
class Thing:
    """One visible thing: an object, or one kind of stuff. Masks are (H, W) bool and hold visible pixels only."""

    name: str
    stuff: bool
    color: str
    size: str
    mask: np.ndarray
    parts: dict[str, np.ndarray]
    depth: int  # larger is nearer; 0 for stuff

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""
        columns, rows = np.flatnonzero(self.mask.any(0)), np.flatnonzero(self.mask.any(1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, eq=False)
class Scene:
    """An image (H, W, 3) uint8 RGB and its things: stuff from the top, then objects from back to front."""

    seed: int
    image: np.ndarray
    things: tuple[Thing, ...]

    @property
    def objects(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.stuff)

    @property
    def stuff(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.stuff)


def scene_seed(split: str, index: int, seed: int = 0) -> int:
    """The seed of scene `index` of a split; those of "base" (pretraining), "train" and "val" never coincide."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} of toy scenes; have: {', '.join(SPLITS)}")
    if not (0 <= index < 1 << 32 and 0 <= seed < 1 << 24):
        raise ValueError(f"scene index {index} must be in [0, 2^32) and seed {seed} in [0, 2^24)")
    return SPLITS.index(split) << 56 | seed << 32 | index  # three fields of one integer, so no two can be equal


def make_scene(seed: int) -> Scene:
    """Render the scene of `seed`: the same seed always gives the same image and the same facts."""
    rng = np.random.default_rng(seed)
    image, bands, stuff_names = draw_ground(SIDE, rng)
    owner = np.full((SIDE, SIDE), -1, np.int8)  # index of the object at each pixel, -1 for background
    part_of = np.zeros((SIDE, SIDE), np.uint8)  # 1 + index of its part
    placed: list[tuple[str, str, str]] = []
    areas: list[int] = []  # pixels of each object before others hide some
    for name in _choose_names(rng):
        size = "large" if rng.random() < 0.5 else "small"
        color = list(COLORS)[rng.integers(len(COLORS))]
        sprite = draw_object(name, color=color, across=rng.uniform(*ACROSS[size]), rng=rng)
        corner = _find_place(sprite, owner, areas, rng)
        if corner is None:
            continue
        _paste(sprite, corner, image, owner, part_of, index=len(placed))
        placed.append((name, color, size))
        areas.append(int(np.count_nonzero(sprite.labels)))
    image += rng.integers(-8, 9, image.shape, dtype=np.int8)
    things = [Thing(n, True, "", "", (bands == i) & (owner < 0), {}, 0) for i, n in enumerate(stuff_names)]
    for index, (name, color, size) in enumerate(placed):
        mask = owner == index
        parts = {part: mask & (part_of == 1 + k) for k, part in enumerate(PARTS.get(name, ()))}
        visible = {part: pixels for part, pixels in parts.items() if pixels.any()}
        things.append(Thing(name, False, color, size, mask, visible, index + 1))
    return Scene(seed, np.clip(image, 0, 255).astype(np.uint8), tuple(things))


def _choose_names(rng: np.random.Generator) -> list[str]:
    """Class names of two to six objects; in 40 % of the scenes one class comes two or three times."""
    count = int(rng.integers(2, 7))
    names = [list(OBJECTS)[i] for i in rng.choice(len(OBJECTS), count, replace=False)]
    if rng.random() < 0.4:
        repeats = int(rng.integers(2, 4))
        names = ([names[0]] * repeats + names[1:])[: max(count, repeats)]
    return [names[i] for i in rng.permutation(len(names))]


def _find_place(
    sprite: Sprite, owner: np.ndarray, areas: list[int], rng: np.random.Generator
) -> tuple[int, int] | None:
    """A corner (x, y) where the sprite leaves earlier objects visible enough; usually one where it hides nothing."""
    height, width = sprite.labels.shape
    solid = sprite.labels > 0
    overlap_allowed = rng.random() < 0.25
    corners = np.stack([rng.integers(0, SIDE - width + 1, PLACES), rng.integers(0, SIDE - height + 1, PLACES)], axis=1)
    for x, y in corners.tolist():
        hidden = owner[y : y + height, x : x + width][solid]
        hidden = hidden[hidden >= 0]
        if not len(hidden):
            return x, y
        if overlap_allowed and _all_stay_visible(owner, hidden, areas):
            return x, y
    return None


def _all_stay_visible(owner: np.ndarray, hidden: np.ndarray, areas: list[int]) -> bool:
    left = np.bincount(owner[owner >= 0], minlength=len(areas)) - np.bincount(hidden, minlength=len(areas))
    return all(pixels >= max(VISIBLE_PIXELS, VISIBLE_SHARE * area) for pixels, area in zip(left, areas, strict=True))


def _paste(
    sprite: Sprite, corner: tuple[int, int], image: np.ndarray, owner: np.ndarray, part_of: np.ndarray, *, index: int
) -> None:
    (x, y), (height, width) = corner, sprite.labels.shape
    window = np.s_[y : y + height, x : x + width]
    image[window] = image[window] * (1 - sprite.coverage[..., None]) + sprite.rgb
    solid = sprite.labels > 0
    owner[window][solid] = index
    part_of[window][solid] = sprite.labels[solid]
