"""The two views of a picture: what the vision tower sees and what the mask encoder sees (lisa.md 1.7)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.types import Geometry
from utils.images import check_file, opened
from utils.limits import VIEW
from utils.plain import read_mapping

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROP_FIRST = 32  # longest side in shortest ones from which only what the centre crop keeps is resized
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # on the 0..255 scale


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB as OpenCV reads it: EXIF orientation applied, 16 bit, palette, CMYK and grey converted.

    A missing, unreadable or truncated file, or one of more pixels than ASSISTANT_MAX_PIXELS, raises an OSError that
    names it; OpenCV alone would return a truncated JPEG with its lower part grey. Of an animation the first picture.
    """
    path = Path(path)
    check_file(path)
    data = path.read_bytes()
    _check_complete(data, path)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise OSError(f"cannot read picture {path}: {str(error).strip()}") from None
    if image is None:
        raise OSError(f"cannot read picture {path}: OpenCV does not know its format, or it is damaged")
    return image


@dataclass(frozen=True)
class ClipView:
    """Shortest edge to `size` (PIL bicubic), centre crop, normalised: (3, size, size) float32."""

    shows_all: ClassVar[bool] = False  # the centre crop cuts the longer side
    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def load(cls, folder: str | Path, size: int = 224) -> ClipView:
        """The view of a tower's `preprocessor_config.json` (its folder, or such a file by itself); CLIP's usual one at
        `size` where there is no such file."""
        file = Path(folder) if Path(folder).is_file() else Path(folder) / "preprocessor_config.json"
        if not file.is_file():
            return cls(size)
        values = read_mapping(file)
        if "size" not in values:
            raise ValueError(f"{file}: no size; it has {', '.join(values) or 'no keys'}")
        resize, crop = _edge(values["size"], file), _edge(values.get("crop_size", values["size"]), file)
        if resize != crop:
            raise ValueError(f"{file}: size {resize} and crop_size {crop} differ, which is not supported")
        stats = (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        return cls(crop, *(_channels(values, key, usual, file) for key, usual in stats))

    def geometry(self, height: int, width: int) -> Geometry:
        """The whole view is picture, so the cut edges are not told."""
        return Geometry((height, width), (self.size, self.size))

    def __call__(self, image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        scaled = int(self.size * max(height, width) / min(height, width))
        height, width = (self.size, scaled) if height <= width else (scaled, self.size)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        if scaled > CROP_FIRST * self.size:
            crop = _resized_part(image, (height, width), (top, left), self.size)
        else:
            resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            crop = resized[top : top + self.size, left : left + self.size]
        return _normalise(crop, 255 * np.float64(self.mean), 255 * np.float64(self.std))


@dataclass(frozen=True)
class PaddedView:
    """Longest side to `size` (PIL bilinear with antialias), normalised, zeros right and below: (3, size, size).

    mean, std: on the 0..255 scale.
    """

    shows_all: ClassVar[bool] = True
    size: int
    mean: tuple[float, ...] = SAM_MEAN
    std: tuple[float, ...] = SAM_STD

    def geometry(self, height: int, width: int) -> Geometry:
        scale = self.size / max(height, width)
        return Geometry((height, width), (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))))

    def __call__(self, image: np.ndarray) -> Tensor:
        height, width = self.geometry(*image.shape[:2]).resized
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        padded = torch.zeros(3, self.size, self.size)
        padded[:, :height, :width] = _normalise(resized, self.mean, self.std)
        return padded


@dataclass(frozen=True)
class SamView:
    """SAM's padded view, with the place of the picture in it."""

    size: int = 1024

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        return PaddedView(self.size)(image), self.geometry(*image.shape[:2])

    def geometry(self, height: int, width: int) -> Geometry:
        return PaddedView(self.size).geometry(height, width)


class LanguageView(Protocol):
    """How a backbone sees an image. Its class chooses the view; `ClipView` and `PaddedView` are LLaVA's."""

    @property
    def size(self) -> int:
        """Side of the square view, in pixels."""
        ...

    @property
    def shows_all(self) -> bool:
        """Whether all of the image is in the view, so that masks can be decoded from its features."""
        ...

    def geometry(self, height: int, width: int) -> Geometry:
        """Where an image of that size lies in the view."""
        ...

    def __call__(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> the pixels that the backbone takes."""
        ...


class SegView(Protocol):
    """How a mask head sees an image. Its class chooses the view; `SamView` is SAM's."""

    @property
    def size(self) -> int:
        """Side of the square view, in pixels."""
        ...

    def geometry(self, height: int, width: int) -> Geometry:
        """Where an image of that size lies in the view."""
        ...

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        """(H, W, 3) uint8 -> the pixels that the head takes, and where the image lies in them."""
        ...


@dataclass(frozen=True)
class Views:
    """What is made of one picture. seg None: the head reuses the language-side features, and their geometry."""

    language: LanguageView
    seg: SegView | None


def _resized_part(image: np.ndarray, size: tuple[int, int], corner: tuple[int, int], side: int) -> np.ndarray:
    """The square at `corner` of the picture resized to `size`, without the rest, which may be gigabytes. Equal to it
    but for rounding."""
    (height, width), (top, left) = size, corner
    down, across = image.shape[0] / height, image.shape[1] / width  # pixels of the picture in one that is resized
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=box))


def _normalise(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w) float32."""
    pixels = np.empty((3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(pixels):
        np.subtract(image[..., channel], np.float32(mean[channel]), out=plane)
        plane /= np.float32(std[channel])
    return torch.from_numpy(pixels)


def _check_complete(data: bytes, path: Path) -> None:
    """Decodes once with PIL, which notices a missing end; JPEGs at an eighth of the size, for speed."""
    with opened(path, data=data) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


def _edge(size: Any, file: Path) -> int:
    """224 in any of the spellings of image-processor files."""
    names = ("shortest_edge", "height", "longest_edge")
    side = next((size[name] for name in names if name in size), None) if isinstance(size, dict) else size
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ValueError(f"{file}: the size of the view must be a whole number above 0, got {size!r}")
    VIEW.check(side, str(file))
    return side


def _channels(values: dict[str, Any], key: str, usual: tuple[float, ...], file: Path) -> tuple[float, ...]:
    """The three numbers that normalise a view."""
    found = values.get(key, usual)
    numbers = isinstance(found, (list, tuple)) and all(isinstance(value, (int, float)) for value in found)
    if not numbers or len(found) != 3 or (key == "image_std" and not all(found)):
        raise ValueError(f"{file}: {key} must be three numbers, of a deviation none 0, got {found!r}")
    return tuple(found)
