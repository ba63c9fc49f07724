"""The view of towers that take an image as square tiles of one size, and as a whole next to them (InternVL)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.patch_view import normalised_by_level, read_processor
from data.types import Geometry
from data.views import IMAGENET_MEAN, IMAGENET_STD, _channels
from utils.limits import VIEW


@dataclass(frozen=True)
class TileView:
    """An image resized (PIL bicubic) to a grid of `side` x `side` tiles of about its ratio of sides, cut into them, row
    by row; where there are several, the whole image in the size of a tile comes last: (n, 3, side, side), pixel by
    pixel those of transformers' `GotOcr2ImageProcessorPil` as InternVL's processor calls it.

    The smaller image has its tokens like any tile. cell: pixels per side of an image token.
    """

    shows_all: ClassVar[bool] = True
    side: int
    cell: int
    min_tiles: int = 1
    max_tiles: int = 12
    mean: tuple[float, ...] = IMAGENET_MEAN  # on the 0..1 scale
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("min_tiles", "max_tiles"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of an image must be a whole number above 0, got {value!r}")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is larger than max_tiles {self.max_tiles}")
        VIEW.check(self.side, "the side of a tile")
        VIEW.check(math.isqrt(self.max_tiles) * self.side, f"the side of a square of max_tiles = {self.max_tiles}")

    @property
    def tile_tokens(self) -> int:
        return (self.side // self.cell) ** 2

    @property
    def most_tokens(self) -> int:
        return _with_whole(self.max_tiles) * self.tile_tokens

    def tokens(self, height: int, width: int) -> int:
        return _with_whole(math.prod(self.grid(height, width))) * self.tile_tokens

    def geometry(self, height: int, width: int) -> Geometry:
        rows, columns = self.grid(height, width)
        return Geometry((height, width), (rows * self.side, columns * self.side))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles: those whose ratio is nearest to the image's. Of several as near, the smallest,
        unless the image has more than half of the pixels of a larger one."""
        ratio, best = width / height, (1, 1)
        nearest = math.inf
        for rows, columns in _grids(self.min_tiles, self.max_tiles):
            distance = abs(ratio - columns / rows)
            large = height * width > 0.5 * self.side**2 * rows * columns
            if distance < nearest or (distance == nearest and large):
                nearest, best = distance, (rows, columns)
        return best

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.normalise(self.show(image))

    def show(self, image: np.ndarray) -> Tensor:
        rows, columns = self.grid(*image.shape[:2])
        tiles = self._resized(image, rows, columns).reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
        tiles = tiles.reshape(-1, self.side, self.side, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, self._resized(image, 1, 1)[None]])
        return torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)))

    def normalise(self, pixels: Tensor, originals: Sequence[tuple[int, int]] = ()) -> Tensor:
        return pixels if pixels.is_floating_point() else normalised_by_level(pixels, self.mean, self.std)

    def _resized(self, image: np.ndarray, rows: int, columns: int) -> np.ndarray:
        size = (columns * self.side, rows * self.side)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def tile_view(folder: Path, usual: TileView, pixels: tuple[int | None, int | None]) -> TileView:
    """The view that a folder describes, or a file. usual: of its tower; it gives what no file says, and the size of a
    tile. pixels: fewest and most of the grid, which count before the folder's number of tiles. Errors name the file.

    Whether to cut at all (`crop_to_patches`) is not read: InternVL's processor always does, whatever the file says.
    """
    file, values = read_processor(folder)
    size, side = values.get("size") or {}, usual.side
    if not isinstance(size, dict) or {size.get("height", side), size.get("width", side)} != {side}:
        raise ValueError(f"{file}: size is {size!r}, the vision tower was built for tiles of {side} x {side} pixels")
    if values.get("resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
        raise ValueError(f"{file}: resample {values['resample']!r} is not supported, only 3 (bicubic)")
    mean, std = (_channels(values, f"image_{key}", getattr(usual, key), file) for key in ("mean", "std"))
    low, high = pixels
    if high is not None and high < side**2:
        raise ValueError(f"model.tower.max_pixels {high} is less than one tile of {side} x {side} = {side**2} pixels")
    fewest = values.get("min_patches", usual.min_tiles) if low is None else math.ceil(low / side**2)
    most = values.get("max_patches", usual.max_tiles) if high is None else high // side**2
    if high is not None and low is None and isinstance(fewest, int):
        fewest = min(fewest, most)
    try:
        return replace(usual, mean=mean, std=std, min_tiles=fewest, max_tiles=most)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _with_whole(tiles: int) -> int:
    return tiles + (tiles > 1)


@functools.lru_cache
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of all grids of that many tiles, small ones first, and of equal ones the narrow ones."""
    sides = range(1, most + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if fewest <= rows * columns <= most]
    return tuple(sorted(grids, key=math.prod))
