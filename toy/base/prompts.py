"""Training prompts for SAM, points and boxes, with the masks they stand for: things, parts, and all of one class."""

from dataclasses import dataclass

import numpy as np

from toy.base.dense import read_spots
from toy.base.pictures import Sample
from toy.base.sizes import PATCH, SCENE_SIDE
from toy.world.scene import Scene, Thing

PROMPTS = 6  # per image
POINTS = 3  # per prompt of several points
KINDS = ("single", "levels", "single", "several")  # of successive batches
MASK_SIDE = SCENE_SIDE // PATCH * 4  # of the decoder's output
MIN_PART = 24  # pixels of a part that is prompted for


@dataclass(frozen=True)
class Region:
    """A mask (H, W) bool that a prompt may stand for, and its relative frequency."""

    mask: np.ndarray
    weight: float


def prompt_sample(scene: Scene, step: int, rng: np.random.Generator) -> Sample:
    """Pixels, dense targets, and prompts of one kind; the kind follows from the step, so a batch has one kind.

    single: PROMPTS / 2 points on things, then PROMPTS / 2 boxes; one mask each (token 0).
    levels: PROMPTS points; three masks each (tokens 1 to 3): the part at the point, the thing, all of its class.
    several: PROMPTS sets of points inside one region; one mask each (token 0).
    """
    spots = read_spots(scene, SCENE_SIDE // PATCH)
    sample = {"pixels": scene.image.transpose(2, 0, 1), "codes": spots.codes, "boxes": spots.boxes}
    kind = KINDS[step % len(KINDS)]
    if kind == "single":
        clicks = [_one_point(scene, rng) for _ in range(PROMPTS // 2)]
        regions = _sample_regions(_regions(scene), PROMPTS - PROMPTS // 2, rng)
        sample["points"] = np.stack([point for point, _ in clicks])[:, None]
        sample["corners"] = np.stack([_jitter_box(mask, rng) for mask in regions])
        masks = [[thing.mask] for _, thing in clicks] + [[mask] for mask in regions]
    elif kind == "levels":
        clicks = [_one_point(scene, rng) for _ in range(PROMPTS)]
        sample["points"] = np.stack([point for point, _ in clicks])[:, None]
        masks = [_levels(scene, thing, point) for point, thing in clicks]
    else:
        regions = _sample_regions(_regions(scene), PROMPTS, rng)
        sample["points"] = np.stack([_spread(mask, rng) for mask in regions])
        masks = [[mask] for mask in regions]
    sample["masks"] = np.stack([np.stack([shrink(mask) for mask in group]) for group in masks])
    return sample


def shrink(mask: np.ndarray) -> np.ndarray:
    """Number of mask pixels per cell of the decoder's output, (MASK_SIDE, MASK_SIDE) uint8."""
    fold = SCENE_SIDE // MASK_SIDE
    return mask.reshape(MASK_SIDE, fold, MASK_SIDE, fold).sum((1, 3), dtype=np.uint8)


def _one_point(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Thing]:
    things = scene.things
    weights = np.array([0.5 if thing.stuff else 1.0 for thing in things])
    thing = things[rng.choice(len(things), p=weights / weights.sum())]
    return _points(thing.mask, 1, rng)[0], thing


def _points(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) float32 x, y of pixels of the mask."""
    pixels = np.flatnonzero(mask)
    rows, columns = np.divmod(pixels[rng.integers(len(pixels), size=count)], mask.shape[1])
    return np.stack([columns, rows], axis=1).astype(np.float32)


def _spread(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(POINTS, 2): farthest-point sampling, so that every piece of the mask is likely to get a point."""
    options = _points(mask, 5 * POINTS, rng)
    points = [options[0]]
    while len(points) < POINTS:
        distance = np.min([np.abs(options - point).sum(1) for point in points], axis=0)
        points.append(options[distance.argmax()])
    return np.stack(points)


def _regions(scene: Scene) -> list[Region]:
    regions = [Region(thing.mask, 0.5 if thing.stuff else 1.0) for thing in scene.things]
    for name in {thing.name for thing in scene.objects}:
        same = [thing.mask for thing in scene.objects if thing.name == name]
        if len(same) > 1:
            regions.append(Region(np.logical_or.reduce(same), 1.0))
    parts = [mask for thing in scene.objects for mask in thing.parts.values() if mask.sum() >= MIN_PART]
    return regions + [Region(mask, 2.0 / len(parts)) for mask in parts]  # together the weight of two things


def _sample_regions(regions: list[Region], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    weights = np.array([region.weight for region in regions])
    return [regions[i].mask for i in rng.choice(len(regions), count, p=weights / weights.sum())]


def _jitter_box(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(4,) float32: the mask's box with each side moved by about 4 %, at most 6 pixels."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    sides = np.tile(box[2:] - box[:2], 2)
    return np.clip(box + np.clip(rng.normal(size=4) * 0.04 * sides, -6, 6), 0, SCENE_SIDE - 1).astype(np.float32)


def _levels(scene: Scene, thing: Thing, point: np.ndarray) -> list[np.ndarray]:
    """From small to large; where the point is on no part, the thing stands for it."""
    column, row = point.astype(int)
    part = next((mask for mask in thing.parts.values() if mask[row, column]), thing.mask)
    same = np.logical_or.reduce([other.mask for other in scene.things if other.name == thing.name])
    return [part, thing.mask, same]
