"""The view of towers that take an image in its own shape, cut into patches (Qwen2.5-VL, Qwen3-VL)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.types import Geometry
from data.views import CLIP_MEAN, CLIP_STD, _channels
from utils.limits import VIEW
from utils.log import log
from utils.plain import read_mapping

LONGEST = 200  # ratio of the sides; a longer strip is squeezed to it
FIRST_CELL, FIRST_MIN, FIRST_MAX = 28, 4 * 28**2, 16384 * 28**2  # of the first of two resizes (sa2va.md 3.1)


@dataclass(frozen=True)
class PatchView:
    """An image resized (PIL bicubic) to sides that are whole image tokens and to a number of pixels within limits, as
    (n, C) patches: pixel by pixel those of transformers' `Qwen2VLImageProcessorPil`.

    A token is `merge` x `merge` patches of `patch` x `patch` pixels. Patches stand token by token; one is a row of
    C = 3 * frames * patch * patch values, the channels first, of an image that is repeated over `frames`.

    resize: once; or twice, first to the nearest multiples of 28 pixels, as Sa2VA shows images in inference.
    """

    shows_all: ClassVar[bool] = True
    patch: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = CLIP_MEAN  # on the 0..1 scale
    std: tuple[float, ...] = CLIP_STD
    merge: int = 2
    frames: int = 2
    resize: str = "once"

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of the vision tower's images must be a whole number above 0, got {value!r}")
            VIEW.check(math.isqrt(value), f"the side of a square of {name} = {value}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        if self.resize not in ("once", "twice"):
            raise ValueError(f"model.tower.resize must be once or twice, got {self.resize!r}")

    @property
    def cell(self) -> int:
        """Pixels per side of an image token."""
        return self.patch * self.merge

    @property
    def most_tokens(self) -> int:
        # what rounding to whole tokens can give: sides are rounded down at the upper limit, but never below one token,
        # and up at the lower limit
        most, least = (pixels / self.cell**2 for pixels in (self.max_pixels, self.min_pixels))
        strip = math.sqrt(LONGEST)
        return int(max(most, strip * math.sqrt(most), least + (strip + 1 / strip) * math.sqrt(least) + 1))

    def tokens(self, height: int, width: int) -> int:
        height, width = self.geometry(height, width).resized
        return height * width // self.cell**2

    def geometry(self, height: int, width: int) -> Geometry:
        return Geometry((height, width), self._sizes(height, width)[-1])

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """The sizes (h, w) that an image is resized to, one after another."""
        size, sizes = (height, width), []
        if self.resize == "twice":
            size = smart_resize(*size, FIRST_CELL, FIRST_MIN, FIRST_MAX, least=FIRST_CELL)
            sizes.append(size)
        return [*sizes, smart_resize(*size, self.cell, self.min_pixels, self.max_pixels)]

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.normalise(self.show(image))

    def show(self, image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        if height * width > self.max_pixels:
            _tell_once(f"images of more than {self.max_pixels} pixels are shown smaller (model.tower.max_pixels)")
        if max(height, width) > LONGEST * min(height, width):
            _tell_once(f"images whose sides differ more than {LONGEST}-fold are squeezed to that ratio")
        shown = Image.fromarray(image)
        for rows, columns in self._sizes(height, width):
            shown = shown.resize((columns, rows), Image.Resampling.BICUBIC)
        return self._patches(np.asarray(shown))

    def cut(self, image: np.ndarray) -> Tensor:
        """(h, w, 3) uint8, of a size that `geometry` gives -> (n, C) float32 patches."""
        return self.normalise(self._patches(image))

    def _patches(self, image: np.ndarray) -> Tensor:
        """(n, C / frames) uint8: as `cut`, of one frame and in bytes."""
        rows, columns = (side // self.patch for side in image.shape[:2])
        block = (rows // self.merge, self.merge, self.patch, columns // self.merge, self.merge, self.patch, 3)
        patches = image.reshape(block).transpose(0, 3, 1, 4, 6, 2, 5)  # tokens, patches of a token, channels, pixels
        return torch.from_numpy(patches.reshape(rows * columns, 3 * self.patch**2))

    def normalise(self, pixels: Tensor, originals: Sequence[tuple[int, int]] = ()) -> Tensor:
        if pixels.is_floating_point():
            return pixels
        channels = normalised_by_level(pixels.unflatten(1, (3, -1)), self.mean, self.std)
        return channels[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)


def normalised_by_level(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(n, 3, ...) bytes -> float32: each looked up among what the 256 values of its channel become, in the number
    formats of the library, so that they are its own. mean, std: on the 0..1 scale."""
    levels = (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32)
    tables = [(levels - np.float32(centre)) / np.float32(spread) for centre, spread in zip(mean, std, strict=True)]
    values = torch.from_numpy(np.concatenate(tables)).to(pixels.device)
    first = 256 * torch.arange(3, device=pixels.device, dtype=torch.int32)  # of each channel's values
    return values[pixels.int() + first.view(3, *[1] * (pixels.dim() - 2))]


def smart_resize(height: int, width: int, cell: int, low: int, high: int, *, least: int = 0) -> tuple[int, int]:
    """The size that shows an image with about its own ratio of sides: multiples of `cell`, with a product of `low` to
    `high` but for what rounding adds at `low`.

    least: a side that rounds to less counts as that. A strip beyond LONGEST is taken as one of that ratio.
    """
    height, width = min(height, LONGEST * width), min(width, LONGEST * height)
    near_height, near_width = (max(least, round(side / cell) * cell) for side in (height, width))
    if near_height * near_width > high:
        shrink = math.sqrt(height * width / high)
        near_height, near_width = (max(cell, math.floor(side / shrink / cell) * cell) for side in (height, width))
    elif near_height * near_width < low:
        grow = math.sqrt(low / (height * width))
        near_height, near_width = (math.ceil(side * grow / cell) * cell for side in (height, width))
    return near_height, near_width


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder that describes its images, or that file itself, and the fields about images; none
    where there is no such file."""
    nested = folder / "processor_config.json"
    if nested.is_file() and (values := read_mapping(nested).get("image_processor")) is not None:
        if not isinstance(values, dict):  # a processor's file has a section for each of its parts, or none
            raise ValueError(f"{nested}: image_processor must be a mapping, got {values!r}")
        return nested, values
    file = folder if folder.is_file() else folder / "preprocessor_config.json"
    return file, read_mapping(file) if file.is_file() else {}


def pixel_limits(values: dict[str, Any], usual: tuple[int, int], file: Path) -> tuple[int, int]:
    """Fewest and most pixels of an image, in either spelling of image-processor files; the library prefers fields of
    their own to `size`."""
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"{file}: size must be a mapping with shortest_edge and longest_edge, got {size!r}")
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    low, high = (
        next((place[name] for place, name in ((values, own), (size, edge), (size, own)) if place.get(name)), default)
        for (own, edge), default in zip(names, usual, strict=True)
    )
    return low, high


def patch_view(folder: Path, usual: PatchView, changes: dict[str, Any]) -> PatchView:
    """The view that a folder describes. usual: of its tower; it gives what no file says, and the size of patches.
    changes: fields that count before the folder's. Errors name the file."""
    file, values = read_processor(folder)
    sizes = {"patch_size": usual.patch, "merge_size": usual.merge, "temporal_patch_size": usual.frames}
    for key, value in sizes.items():
        if values.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {values[key]!r}, the vision tower was built for {value}")
    if values.get("resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
        raise ValueError(f"{file}: resample {values['resample']!r} is not supported, only 3 (bicubic)")
    low, high = pixel_limits(values, (usual.min_pixels, usual.max_pixels), file)
    mean, std = (_channels(values, f"image_{key}", getattr(usual, key), file) for key in ("mean", "std"))
    fields: dict[str, Any] = {"min_pixels": low, "max_pixels": high, **changes}
    try:
        return replace(usual, mean=mean, std=std, **fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


@functools.cache
def _tell_once(message: str) -> None:
    """A warning, once per process."""
    log.warning("%s", message)
