"""COCO-style annotation files: entries by id, masks of one or several annotations; every error says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import field
from utils.masks import Size, segmentation_to_mask

CORNERS = 3  # a polygon has at least this many


def by_id(data: Any, key: str, path: Path) -> dict[Any, dict[str, Any]]:
    """The entries of the list `data[key]` by their `id`; two of one id are an error."""
    table: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(field(data, key, str(path))):
        where = f"{path}: {key}[{index}]"
        number = field(entry, "id", where)
        if number in table:
            raise ValueError(f"{where}: the id {number} is given twice; ids must be unique")
        table[number] = entry
    return table


def known(table: dict[Any, Any], key: Any, what: str, where: str, path: Path) -> Any:
    """`table[key]`, or a ValueError that names both files."""
    if key not in table:
        raise ValueError(f"{where}: names {what} {key}, which is not in {path}; are the two files of one release?")
    return table[key]


def size_of(image: dict[str, Any], where: str) -> Size:
    """(H, W) as the file gives it; both must be whole numbers above 0."""
    size = [field(image, key, where) for key in ("height", "width")]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(f"{where}: height and width must be whole numbers above 0, got {size[0]!r} and {size[1]!r}")
    return size[0], size[1]


def draw(segmentations: list[Any], size: Size, overlap: str, where: str) -> np.ndarray:
    """(H, W) bool, the union of the annotations' masks; errors get the file and the entry."""
    mask = np.zeros(size, bool)
    try:
        for segmentation in segmentations:
            mask |= segmentation_to_mask(segmentation, tuple(size), overlap)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return mask


def whole_polygons(segmentation: Any) -> Any:
    """Without the polygons of an odd number of coordinates or too few points, which some released readers skip."""
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if isinstance(part, dict) or _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 2 * CORNERS and len(part) % 2 == 0
