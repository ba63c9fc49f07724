"""How a CLIP tower sees an image: its view, its grid of patches, the position table that fits the grid."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.views import SAM_MEAN, SAM_STD, ClipView, PaddedView
from model.checkpoints.config_file import SECTION
from utils.config import TowerConfig
from utils.limits import VIEW
from utils.registry import unknown
from utils.renamed import find_config

POSITIONS = "vlm.tower.embeddings.position_embedding.weight"
CHOICES = {"stats": ("sam", "tower"), "positions": ("released", "correct")}


@dataclass(frozen=True)
class TowerInput:
    """What a tower is shown, given by a folder's `config.json` and by the recipe (utils.recipe.TowerConfig explains the
    fields)."""

    size: int | None = None
    pad: bool = False
    stats: str = "sam"
    pool: int = 1
    positions: str = "released"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(unknown(f"model.tower.{name}", getattr(self, name), choices))
        sizes = {"pool": self.pool}
        if self.size is not None:
            sizes["size"] = self.size
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.tower.{name} must be 1 or more, got {value!r}")
            VIEW.check(value, f"model.tower.{name}")


def tower_input(values: dict[str, Any], config: TowerConfig) -> TowerInput:
    """What `config.json` (ours or a published one) says, overridden by the fields that the recipe sets."""
    names = TowerInput.__dataclass_fields__.keys()
    fields: Any = values.get(SECTION, {}).get("sight")
    if fields is None:
        fields = _published_input(values)
    elif not (isinstance(fields, dict) and fields.keys() <= names):
        raise ValueError(
            f"config.json: {SECTION}.sight must be a mapping with some of {', '.join(names)}, got {fields!r}"
        )
    recipe_names = {"positions": "position_resize"}  # a field of saved folders -> its name in a recipe
    overrides: dict[str, Any] = {name: getattr(config, recipe_names.get(name, name)) for name in names}
    if config.preprocessor:
        side = ClipView.load(_file(config.preprocessor)).size
        if config.size not in (None, side):
            raise ValueError(f"model.tower.size is {config.size}, {config.preprocessor} is for {side}")
        overrides["size"] = side
    return TowerInput(**{**fields, **{name: value for name, value in overrides.items() if value is not None}})


def _published_input(values: dict[str, Any]) -> dict[str, Any]:
    """The same from the flags that a published `config.json` keeps."""
    fields: dict[str, Any] = {}
    if values.get("resize_vision_tower"):
        fields["size"] = values.get("resize_vision_tower_size")
    if values.get("pad_train_clip_images"):
        fields |= {"pad": True, "pool": 2}  # the release has one flag for both
    return fields


def published_fields(shown: TowerInput) -> dict[str, Any]:
    """The inverse of `_published_input`: the flags; none for a tower that is used as it was trained."""
    values: dict[str, Any] = {}
    if shown.size:
        values |= {"resize_vision_tower": True, "resize_vision_tower_size": shown.size}
    if shown.pad:
        values["pad_train_clip_images"] = True
    return values


def representable(shown: TowerInput) -> bool:
    """Whether a published `config.json` has fields for all of it: it must read back equal."""
    return shown == tower_input(published_fields(shown), TowerConfig())


def fit_tower(sizes: dict[str, Any], tensors: dict[str, Tensor], shown: TowerInput) -> dict[str, Any]:
    """The tower's sizes at the side that it is shown, which may differ from the one it was trained at; its position
    table in `tensors` is resized to that side in place."""
    patch = sizes["patch_size"]
    native = sizes["image_size"] // patch
    size = shown.size or sizes["image_size"]
    grid = size // patch
    if size % patch or grid % shown.pool:
        raise ValueError(
            f"model.tower.size {size} does not divide into patches of {patch}, {shown.pool} per token side"
        )
    # A finished checkpoint holds a table of the shown side already, while the sizes next to it may still be the CLIP's:
    # only a table of the native side is resized. The extra row is the class token's.
    if grid != native and len(tensors.get(POSITIONS, ())) == native**2 + 1:
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS], grid, shown.positions)
    return {**sizes, "image_size": size}


def resize_positions(table: Tensor, grid: int, how: str) -> Tensor:
    """(1 + n * n, W) position embeddings, class token first, -> (1 + grid * grid, W): bilinear, in float32.

    how: "correct" resizes the patches' rows and leaves the class token's where it is. "released" (pixellm.md 1.2) is
    off by one row, and weights trained with it need it: the first n * n rows count as the patches and the last row as
    the one to leave. For n = 2, with the class token's row c and the patches' p0 ... p3:

                    resized as a square     left as it is    rows of the result
        correct     p0 p1 / p2 p3           c                c, then the cells
        released    c p0 / p1 p2            p3               the cells, then p3
    """
    table = table.float()
    side = math.isqrt(len(table) - 1)
    released = how == "released"
    first = 0 if released else 1
    square = table[first : first + side * side].T.reshape(1, -1, side, side)
    cells = F.interpolate(square, (grid, grid), mode="bilinear", align_corners=False)[0].flatten(1).T
    return torch.cat([cells, table[-1:]]) if released else torch.cat([table[:1], cells])


def tower_view(
    folder: str | Path, size: int, shown: TowerInput, preprocessor: str | None = None
) -> ClipView | PaddedView:
    """The view of a tower of side `size`. A padded view takes from the tower's own preprocessor file at most its mean
    and deviation; as released it takes SAM's (pixellm.md 1.3)."""
    own = ClipView.load(_file(preprocessor) if preprocessor else folder, size)
    if not shown.pad:
        return replace(own, size=size) if shown.size else own
    if shown.stats == "sam":
        return PaddedView(size, SAM_MEAN, SAM_STD)
    return PaddedView(size, _to_bytes(own.mean), _to_bytes(own.std))


def _to_bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """From the 0..1 scale of preprocessor files to the 0..255 scale of a PaddedView."""
    return tuple(float(value) for value in 255 * np.asarray(values, np.float64))


def write_view(folder: Path, view: ClipView | PaddedView) -> None:
    """`preprocessor_config.json` as `ClipView.load` and transformers read it."""
    padded = isinstance(view, PaddedView)
    scale = 255 if padded else 1
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"longest_edge" if padded else "shortest_edge": view.size},
        "resample": 2 if padded else 3,
        "do_center_crop": not padded,
        **({"do_pad": True} if padded else {}),
        "crop_size": {"height": view.size, "width": view.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / scale for value in view.mean],
        "image_std": [value / scale for value in view.std],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _file(preprocessor: str) -> Path:
    file = find_config(preprocessor)
    if not file.is_file():
        raise FileNotFoundError(f"model.tower.preprocessor: no file {file}; expected an image-processor JSON")
    return file
