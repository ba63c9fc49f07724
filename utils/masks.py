"""Annotations to masks: COCO polygons and RLE, painted shapes. A mask is (H, W) bool; sizes are (H, W).

What cannot be rasterized raises a ValueError that says why; the caller, who knows file and entry, adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from utils.limits import PIXELS
from utils.text import preview

Size = tuple[int, int]
OVERLAPS = ("union", "exclude")
FAR = 16  # a coordinate this many image sides away is damage, not a polygon that runs over the edge
OUTLINE = 4_000_000  # longest outline of a polygon, in pixels: COCO's code allocates 80 bytes for each, unchecked
DIGITS = 8  # most characters of a run in COCO's text form, 5 bits each: no mask has runs of more than 40 bits


def segmentation_to_mask(segmentation: Any, size: Size, overlap: str = "union") -> np.ndarray:
    """(H, W) bool of any COCO `segmentation`: polygons, one RLE, a list of RLEs (RefCLEF); an empty list is empty.

    overlap: what pixels covered by several parts become. "union": inside. "exclude": outside, which scores like the
        released readers (they sum the parts, and a pixel of value 2 counts as neither class; lisa.md 4.4, 6).
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"no overlap {overlap!r}; have: {', '.join(OVERLAPS)}")
    PIXELS.check(size[0] * size[1], f"a mask of {size[0]} x {size[1]} (height x width)")
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if not isinstance(segmentation, list):
        raise ValueError(f"a segmentation is a list of polygons or RLEs, got {type(segmentation).__name__}")
    if not segmentation:
        return np.zeros(size, bool)
    if not all(isinstance(part, dict) for part in segmentation):  # polygons, which must not be mixed with RLEs
        segmentation = _polygon_parts(segmentation, size)
    covered = np.zeros(size, np.uint16, order="F")  # number of parts over each pixel; down the columns, as runs go
    for part in segmentation:
        covered += _decode_rle(part, size)
    return covered > 0 if overlap == "union" else covered == 1


def polygons_to_mask(polygons: Sequence[Sequence[float]], size: Size) -> np.ndarray:
    """The union of flat polygons [x0, y0, x1, y1, ...], rasterized by COCO's code; parts outside are cut off."""
    return segmentation_to_mask(list(polygons), size)


def rle_to_mask(rle: dict[str, Any], size: Size) -> np.ndarray:
    """(H, W) bool of one RLE, `counts` compressed (str or bytes) or plain (list); its `size` must be the image's."""
    return segmentation_to_mask(rle, size)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """{"size": [H, W], "counts": str} of a mask, ready for JSON."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def paint_shapes(shapes: Sequence[tuple[Sequence[Sequence[float]], int]], size: Size) -> np.ndarray:
    """(H, W) uint8 map of (points, value) shapes, 0 elsewhere, as the ReasonSeg reader paints them (lisa.md 4.6).

    Points lose their fraction. A shape is its filled polygon together with its closed outline, one pixel wide. Larger
    shapes are painted first, so a smaller one overwrites them, whatever the values.
    """
    PIXELS.check(size[0] * size[1], f"a mask of {size[0]} x {size[1]} (height x width)")
    # Each mask is made twice, here and for painting: keeping thousands of them would fill the memory.
    areas = [int(_fill_shape(points, size).sum()) for points, _ in shapes]
    painted = np.zeros(size, np.uint8)
    for index in sorted(range(len(shapes)), key=lambda index: (areas[index], index), reverse=True):
        points, value = shapes[index]
        painted[_fill_shape(points, size)] = value
    return painted


class CachedMask:
    """A mask that is rasterized at the first call and then kept; targets with the same mask share one.

    where: the annotation file and the entry that it comes from, for messages about the mask.
    """

    def __init__(self, rasterize: Callable[[], np.ndarray], where: str = ""):
        self._rasterize = rasterize
        self.where = where
        self._mask: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        if self._mask is None:
            self._mask = self._rasterize()
        return self._mask


def _polygon_parts(polygons: list[Any], size: Size) -> list[dict[str, Any]]:
    """One RLE per polygon. Everything is checked first: COCO's code takes damage for coordinates, or crashes."""
    points = [_points(polygon, f"polygon {index}") for index, polygon in enumerate(polygons)]
    _refuse_normalised(np.concatenate(points), size)
    if all(_outside(polygon, size) for polygon in points):
        raise ValueError(f"every polygon lies outside the image of {size[0]} x {size[1]} (height x width)")
    for index, polygon in enumerate(points):
        _refuse_far(polygon, size, f"polygon {index}")
        _refuse_endless(polygon, f"polygon {index}")
    return coco.frPyObjects([polygon.ravel().tolist() for polygon in points], *size)


def as_flat(polygon: Any) -> Any:
    """[[x, y], ...], or OpenCV's [[[x, y]], ...], as [x, y, x, y, ...]; anything else unchanged."""
    if _all_lists_of(polygon, 1):
        polygon = [point for (point,) in polygon]
    return [number for point in polygon for number in point] if _all_lists_of(polygon, 2) else polygon


def _all_lists_of(values: Any, length: int) -> bool:
    """Whether this is a list of lists that all have this length."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (list, tuple)) and len(value) == length for value in values
    )


def _points(polygon: Any, what: str) -> np.ndarray:
    """(N, 2) float64 of a polygon, flat or in pairs; four numbers are refused, which COCO's code takes for a box."""
    polygon = as_flat(polygon)
    if isinstance(polygon, (list, tuple)) and any(isinstance(point, (list, tuple)) for point in polygon):
        raise ValueError(f"{what} is {preview(polygon)}; a point is x, y")
    if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
        have = f"{len(polygon)} numbers" if isinstance(polygon, (list, tuple)) else repr(polygon)
        raise ValueError(f"{what} has {have}; a polygon is x, y, x, y, ... of three or more points")
    return _numbers(polygon, what).reshape(-1, 2)


def _numbers(values: Any, what: str) -> np.ndarray:
    """float64 array of finite numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} holds something that is not a number") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds a coordinate that is not finite")
    return array


def _outside(points: np.ndarray, size: Size) -> bool:
    """Whether all points lie on the far side of one edge of the image."""
    limit = np.array([size[1], size[0]])
    return bool((points.max(axis=0) < 0).any() or (points.min(axis=0) > limit).any())


def _refuse_normalised(points: np.ndarray, size: Size) -> None:
    """Coordinates that all lie from 0 to 1 are fractions of the image's sides; as pixels they would be one pixel."""
    if len(points) >= 3 and min(size) > 1 and points.min() >= 0 and points.max() <= 1:
        raise ValueError(
            f"all coordinates lie between 0 and 1, in an image of {size[0]} x {size[1]} (height x width): they are "
            "normalised; multiply them by its width and height"
        )


def _refuse_far(points: np.ndarray, size: Size, what: str) -> None:
    if np.abs(points).max() > FAR * max(size):
        raise ValueError(f"{what} has the coordinate {np.abs(points).max():g} in an image of {size[0]} x {size[1]}")


def _refuse_endless(points: np.ndarray, what: str) -> None:
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > OUTLINE:
        raise ValueError(f"{what} has an outline of {length:.0f} pixel sides, more than the limit of {OUTLINE}")


def _fill_shape(points: Any, size: Size) -> np.ndarray:
    """(H, W) bool of a shape: corners, or a mask already."""
    if isinstance(points, np.ndarray) and points.dtype == bool:
        return points
    corners = _numbers(points, "a shape")
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise ValueError(f"a shape is [[x, y], ...] of one or more points, got {points!r}")
    if _outside(corners, size):
        raise ValueError(f"a shape lies outside the image of {size[0]} x {size[1]} (height x width)")
    _refuse_normalised(corners, size)
    _refuse_far(corners, size, "a shape")
    mask = np.zeros(size, np.uint8)
    polygon = [corners.astype(np.int32)]
    cv2.polylines(mask, polygon, isClosed=True, color=(1,), thickness=1)
    cv2.fillPoly(mask, polygon, (1,))
    return mask.astype(bool)


def _decode_rle(rle: Any, size: Size) -> np.ndarray:
    """(H, W) uint16 of 0 and 1.

    Decoded here because COCO's own code accepts runs with a wrong sum, and writes out of bounds where they are so large
    that the sum wraps. Runs alternate between outside and inside, starting outside, and go down the columns.
    """
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        raise ValueError("an RLE has the keys size and counts")
    if not isinstance(rle["size"], (list, tuple)) or list(rle["size"]) != list(size):
        raise ValueError(f"the RLE is of size {preview(rle['size'])}, the image of {list(size)} (height, width)")
    counts, total = rle["counts"], size[0] * size[1]
    if isinstance(counts, list):
        runs = _runs_of_list(counts, total)
    elif isinstance(counts, (str, bytes)):
        runs = _runs_of_text(counts, total)
    else:
        raise ValueError(f"the counts of an RLE are text or a list of whole numbers, got {preview(counts)}")
    if runs.sum() != total:  # cannot wrap: each is at most `total`
        raise ValueError(f"the runs of the RLE do not add up to {size[0]} x {size[1]} pixels; it is damaged")
    inside = (np.arange(len(runs)) % 2).astype(np.uint16)
    return np.repeat(inside, runs).reshape(size, order="F")


def _runs_of_list(counts: list[Any], total: int) -> np.ndarray:
    """Run lengths in COCO's plain form, whole numbers from 0 to `total`."""
    try:
        runs = np.asarray(counts) if counts else np.zeros(0, np.int64)
    except ValueError:  # nested lists of different lengths
        runs = np.zeros(0, object)
    if runs.dtype.kind not in "iuf" or runs.ndim != 1:
        raise ValueError("the counts of the RLE hold something that is not a number")
    return _check_runs(runs, total)


def _runs_of_text(counts: str | bytes, total: int) -> np.ndarray:
    """Run lengths in COCO's text form.

    A character minus 48 holds 5 bits of a number, lowest first; bit 5 says that more characters follow, and bit 4 of
    the last one is the sign. From the fourth number on, it is the difference to the run two places earlier, since
    neighbouring columns of an object have similar runs. "052O" holds 0, 5, 2 and 31 with the sign, 31 - 32 = -1: the
    runs are 0, 5, 2 and 5 - 1 = 4.

    All numbers are decoded at once: `ends` are the last characters of the numbers, `place` is the position of each
    character in its number.
    """
    packed = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    digits = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    if not len(digits) or not last[-1] or digits.min() < 0 or digits.max() > 63:
        raise ValueError("the counts of the RLE are damaged")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if place.max() > DIGITS:
        raise ValueError("the counts of the RLE are damaged")
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    _check_runs(np.abs(runs), total)  # two runs differ by `total` at most, so the sums below cannot overflow
    # Undo the differences: run i is the sum of the numbers i, i - 2, ... down to 1 or 2. The number at 2 is a length,
    # not a difference, so run 0 belongs to neither sum.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return _check_runs(runs, total)


def _check_runs(runs: np.ndarray, total: int) -> np.ndarray:
    """The runs as int64; ValueError unless all are whole numbers from 0 to `total`, so that no sum overflows."""
    good = (runs >= 0) & (runs <= total)  # False for NaN
    if runs.dtype.kind == "f":
        good &= runs == np.floor(runs)
    if not good.all():
        place = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"run {place} of the RLE is {runs[place]}; in a mask of {total} pixels runs are whole numbers from 0 to "
            f"{total}: it is damaged"
        )
    return runs.astype(np.int64)
