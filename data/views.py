"""The two views of an image: the vision tower's and the mask encoder's (lisa.md 1.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.resize import Size, resize_bilinear, resize_crop
from data.types import Geometry
from utils.limits import VIEW
from utils.plain import read_mapping

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROP_FIRST = 32  # ratio of the sides beyond which only the part that the centre crop keeps is resized
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # on the 0..255 scale
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Resample = Literal["bilinear", "pil_bicubic"]


@dataclass(frozen=True)
class ClipView:
    """Shortest edge to `edge` (PIL bicubic), centre crop of `size`, normalised: (3, size, size) float32.

    edge: None is `size`, so that only the longer side is cut.
    """

    shows_all: ClassVar[bool] = False  # the centre crop cuts the longer side
    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    edge: int | None = None
    cell: int = field(default=14, compare=False)  # pixels per side of an image token; the backbone sets it

    @property
    def most_tokens(self) -> int:
        return (self.size // self.cell) ** 2

    def tokens(self, height: int, width: int) -> int:
        return self.most_tokens

    def geometry(self, height: int, width: int) -> Geometry:
        """A centre crop has no padding: `resized` is the full view, and the cropped borders are not recorded."""
        return Geometry((height, width), (self.size, self.size))

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.normalise(self.show(image)[None])[0]

    def show(self, image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        edge = self.edge or self.size
        scaled = int(edge * max(height, width) / min(height, width))
        height, width = (edge, scaled) if height <= width else (scaled, edge)  # of the resized image
        top, left = (height - self.size) // 2, (width - self.size) // 2
        if scaled > CROP_FIRST * edge:  # a strip of a few pixels, which would become gigabytes at this height
            crop = resize_crop(image, (height, width), (top, left), self.size)
        else:
            resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            crop = resized[top : top + self.size, left : left + self.size]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))

    def normalise(self, pixels: Tensor, originals: Sequence[Size] = ()) -> Tensor:
        return _normalise(pixels, [255 * value for value in self.mean], [255 * value for value in self.std])


@dataclass(frozen=True)
class PaddedView:
    """Longest side to `size` (PIL bilinear with antialias), normalised, zeros right and below: (3, size, size).

    mean, std: on the 0..255 scale.
    """

    shows_all: ClassVar[bool] = True
    size: int
    mean: tuple[float, ...] = SAM_MEAN
    std: tuple[float, ...] = SAM_STD
    cell: int = field(default=14, compare=False)  # as in ClipView

    @property
    def most_tokens(self) -> int:
        return (self.size // self.cell) ** 2

    def tokens(self, height: int, width: int) -> int:
        return self.most_tokens

    def geometry(self, height: int, width: int) -> Geometry:
        scale = self.size / max(height, width)
        return Geometry((height, width), (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))))

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.normalise(self.show(image)[None], [image.shape[:2]])[0]

    def show(self, image: np.ndarray) -> Tensor:
        height, width = self.geometry(*image.shape[:2]).resized
        padded = np.zeros((3, self.size, self.size), np.uint8)
        padded[:, :height, :width] = resize_bilinear(image, (height, width))
        return torch.from_numpy(padded)

    def normalise(self, pixels: Tensor, originals: Sequence[Size]) -> Tensor:
        if pixels.is_floating_point():
            return pixels
        numbers = _normalise(pixels, self.mean, self.std)
        for image, original in zip(numbers, originals, strict=True):
            height, width = self.geometry(*original).resized
            image[:, height:] = 0  # after normalisation, as SAM pads: the mean colour
            image[:, :, width:] = 0
        return numbers


@dataclass(frozen=True)
class SamView:
    """SAM's padded view, and where the image lies in it."""

    size: int = 1024

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        return PaddedView(self.size)(image), self.geometry(*image.shape[:2])

    def show(self, image: np.ndarray) -> Tensor:
        return PaddedView(self.size).show(image)

    def normalise(self, pixels: Tensor, originals: Sequence[Size]) -> Tensor:
        return PaddedView(self.size).normalise(pixels, originals)

    def geometry(self, height: int, width: int) -> Geometry:
        return PaddedView(self.size).geometry(height, width)


@dataclass(frozen=True)
class SquareView:
    """The whole image squeezed to a square, without padding, normalised: (3, size, size) float32.

    mean, std: on the 0..1 scale. resample: `bilinear`, in floating point with antialias, which is SAM 2's own transform
    (unipixel.md 3); `pil_bicubic`, in bytes (sa2va.md 3.2).
    """

    size: int = 1024
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resample: Resample = "bilinear"

    def geometry(self, height: int, width: int) -> Geometry:
        return Geometry((height, width), (self.size, self.size))

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        return self.normalise(self.show(image)[None])[0], self.geometry(*image.shape[:2])

    def show(self, image: np.ndarray) -> Tensor:
        resized = self._resized(image)
        return resized if resized.dtype == torch.uint8 else (resized - _per_channel(self.mean)) / _per_channel(self.std)

    def normalise(self, pixels: Tensor, originals: Sequence[Size] = ()) -> Tensor:
        return _normalise(pixels, self.mean, self.std, scale=255)

    def resize(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (3, size, size) float32 on the 0..1 scale."""
        resized = self._resized(image)
        return resized.float() / 255 if resized.dtype == torch.uint8 else resized

    def _resized(self, image: np.ndarray) -> Tensor:
        """(3, size, size): uint8, or float32 on the 0..1 scale where the view resizes in floating point."""
        side = (self.size, self.size)
        if self.resample == "pil_bicubic":
            resized = np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC))
            return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        # a copy, because an array that was turned or mirrored has strides that torch does not take
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        return F.interpolate(pixels, side, mode="bilinear", antialias=True)[0]


@dataclass(frozen=True)
class StretchedView:
    """A tower's own `SquareView`: the full image with its sides scaled apart, (3, size, size) float32."""

    shows_all: ClassVar[bool] = True
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Resample = "pil_bicubic"
    cell: int = field(default=14, compare=False)  # as in ClipView

    @property
    def most_tokens(self) -> int:
        return (self.size // self.cell) ** 2

    def tokens(self, height: int, width: int) -> int:
        return self.most_tokens

    def geometry(self, height: int, width: int) -> Geometry:
        return Geometry((height, width), (self.size, self.size))

    def __call__(self, image: np.ndarray) -> Tensor:
        return self._square()(image)[0]

    def show(self, image: np.ndarray) -> Tensor:
        return self._square().show(image)

    def normalise(self, pixels: Tensor, originals: Sequence[Size] = ()) -> Tensor:
        return self._square().normalise(pixels)

    def _square(self) -> SquareView:
        return SquareView(self.size, self.mean, self.std, self.resample)


def load_view(folder: str | Path, usual: ClipView | StretchedView | None = None) -> ClipView | StretchedView:
    """The view that a tower's `preprocessor_config.json` describes: a square where `size` has height and width, else a
    centre crop. Without that file: `usual`, by default CLIP's, which also gives a mean and deviation that it lacks.

    folder: the folder of the tower, or the file itself. ValueError names the file if it describes another view.
    """
    file = Path(folder) if Path(folder).is_file() else Path(folder) / "preprocessor_config.json"
    usual = usual or ClipView()
    if not file.is_file():
        return usual
    values = read_mapping(file)
    if "size" not in values:
        raise ValueError(f"{file}: no size; it has {', '.join(values) or 'no keys'}")
    size, crops = values["size"], values.get("do_center_crop")
    edge = _edge(size, file)
    # a file may name a crop size that it does not use: configuration classes write their defaults
    crop = edge if crops is False else _edge(values.get("crop_size") or size, file)
    stats = [_channels(values, f"image_{key}", getattr(usual, key), file) for key in ("mean", "std")]
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        if size["height"] != size["width"] or crop != edge:
            raise ValueError(f"{file}: one square is supported, got size {size} and crop_size {crop}")
        bilinear = values.get("resample") == Image.Resampling.BILINEAR
        return StretchedView(edge, *stats, resample="bilinear" if bilinear else "pil_bicubic")
    if crop > edge:
        raise ValueError(f"{file}: crop_size {crop} is larger than size {edge}, which is not supported")
    return ClipView(crop, *stats, edge=None if edge == crop else edge)


class LanguageView(Protocol):
    """How a backbone sees an image. Its class chooses the view; `ClipView`, `StretchedView` and `PaddedView` are
    LLaVA's."""

    @property
    def shows_all(self) -> bool:
        """Whether all of the image is in the view, so that masks can be decoded from its features."""
        ...

    @property
    def most_tokens(self) -> int:
        """The largest number of positions that an image takes in a row."""
        ...

    def tokens(self, height: int, width: int) -> int:
        """Positions that an image of that size takes in a row."""
        ...

    def geometry(self, height: int, width: int) -> Geometry:
        """Where an image of that size lies in the view."""
        ...

    def __call__(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> the pixels that the backbone takes: an image (3, h, w) of the size of all others, or n
        patches of the image (n, C), or n tiles of it (n, 3, s, s). It is `normalise` of `show`."""
        ...

    def show(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> what the backbone sees of it in bytes, a quarter of what the pixels take on their way from
        a worker to the device; of a view that resizes in floating point, the pixels."""
        ...

    def normalise(self, pixels: Tensor, originals: Sequence[Size]) -> Tensor:
        """What `show` gives of the images of a batch -> float32 as the backbone takes it; floats pass. originals: the
        sizes (H, W) of these images."""
        ...


class SegView(Protocol):
    """How a mask head sees an image. Its class chooses the view: `SamView` pads to a square, `SquareView` squeezes."""

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

    def show(self, image: np.ndarray) -> Tensor:
        """As of a LanguageView: bytes, where the view can."""
        ...

    def normalise(self, pixels: Tensor, originals: Sequence[Size]) -> Tensor:
        """As of a LanguageView: (B, 3, S, S) float32."""
        ...


@dataclass(frozen=True)
class Views:
    """The views of one image. seg None: the mask head reuses the language-side features and their geometry."""

    language: LanguageView
    seg: SegView | None


def _normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], scale: float | None = None) -> Tensor:
    """(B, 3, h, w) uint8 -> float32, (x / scale - mean) / std per channel, one operation after another; floats pass.

    Tensors divide, not numbers: a GPU multiplies by the inverse of a number, which rounds otherwise than a CPU.
    """
    if pixels.is_floating_point():
        return pixels
    numbers = pixels.float()
    if scale:
        numbers /= torch.full((1,), scale, device=pixels.device)
    numbers -= _per_channel(mean).to(pixels.device)
    numbers /= _per_channel(std).to(pixels.device)
    return numbers


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _edge(size: Any, file: Path) -> int:
    """The side of a view in any spelling of image-processor files: 224, {"shortest_edge": 224}, {"height": 224}."""
    names = ("shortest_edge", "height", "longest_edge")
    side = next((size[name] for name in names if name in size), None) if isinstance(size, dict) else size
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ValueError(f"{file}: the size of the view must be a whole number above 0, got {size!r}")
    VIEW.check(side, str(file))
    return side


def _channels(values: dict[str, Any], key: str, usual: tuple[float, ...], file: Path) -> tuple[float, ...]:
    """The three numbers of `key` (image_mean or image_std) that normalise a view."""
    channels = values.get(key, usual)
    numbers = isinstance(channels, (list, tuple)) and all(isinstance(value, (int, float)) for value in channels)
    if not numbers or len(channels) != 3 or (key == "image_std" and not all(channels)):
        raise ValueError(f"{file}: {key} must be three numbers, of a deviation none 0, got {channels!r}")
    return tuple(channels)
