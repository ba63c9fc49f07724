"""How the vision tower sees a picture: its view, its grid of patches, the position table that fits the grid."""

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

from data.views import SAM_MEAN, SAM_STD, ClipView, LanguageView, PaddedView
from model.checkpoints.architecture import SECTION
from utils.config import TowerConfig
from utils.limits import VIEW
from utils.registry import unknown
from utils.renamed import find_config

POSITIONS = "vlm.tower.embeddings.position_embedding.weight"
CHOICES = {"stats": ("sam", "tower"), "positions": ("released", "correct")}


@dataclass(frozen=True)
class TowerInput:
    """A way of seeing, told by a folder's `config.json` and by the recipe (utils.recipe.TowerConfig has the words)."""

    size: int | None = None
    pad: bool = False
    stats: str = "sam"
    pool: int = 1
    positions: str = "released"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(unknown(f"model.tower.{name}", getattr(self, name), choices))
        for name, value in (("pool", self.pool), *([("size", self.size)] if self.size is not None else [])):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.tower.{name} must be 1 or more, got {value!r}")
            VIEW.check(value, f"model.tower.{name}")


def tower_input(values: dict[str, Any], asked: TowerConfig) -> TowerInput:
    """What `config.json` (ours or a published one) tells, with what the recipe asks on top."""
    told = values.get(SECTION, {}).get("sight")
    if told is not None and not (isinstance(told, dict) and told.keys() <= TowerInput.__dataclass_fields__.keys()):
        have = ", ".join(TowerInput.__dataclass_fields__)
        raise ValueError(f"config.json: {SECTION}.sight must be a mapping with some of {have}, got {told!r}")
    if told is None:
        told = {"size": values.get("resize_vision_tower_size")} if values.get("resize_vision_tower") else {}
        told |= {"pad": True, "pool": 2} if values.get("pad_train_clip_images") else {}  # the release always does both
    names = {"positions": "position_resize"}  # a field of saved folders, and its name in a recipe
    chosen = {name: getattr(asked, names.get(name, name)) for name in TowerInput.__dataclass_fields__}
    if asked.preprocessor:
        side = ClipView.load(_file(asked.preprocessor)).size
        if asked.size not in (None, side):
            raise ValueError(f"model.tower.size is {asked.size}, {asked.preprocessor} is for {side}")
        chosen["size"] = side
    return TowerInput(**{**told, **{name: value for name, value in chosen.items() if value is not None}})


def published_fields(sight: TowerInput) -> dict[str, Any]:
    """The same in a published `config.json`; nothing for a tower used as it was made."""
    values: dict[str, Any] = {}
    if sight.size:
        values |= {"resize_vision_tower": True, "resize_vision_tower_size": sight.size}
    return values | ({"pad_train_clip_images": True} if sight.pad else {})


def representable(sight: TowerInput) -> bool:
    """Whether a published `config.json` can tell all of it."""
    return sight == tower_input(published_fields(sight), TowerConfig())


def fit_tower(sizes: dict[str, Any], tensors: dict[str, Tensor], sight: TowerInput) -> dict[str, Any]:
    """The tower's sizes at the side that it shall see; a position table of the tower's own side is resized to it."""
    native, patch = sizes["image_size"] // sizes["patch_size"], sizes["patch_size"]
    size = sight.size or sizes["image_size"]
    grid = size // patch
    if size % patch or grid % sight.pool:
        raise ValueError(f"model.tower.size {size} does not divide into patches of {patch}, {sight.pool} a token")
    if grid != native and len(tensors.get(POSITIONS, ())) == native**2 + 1:
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS], grid, sight.positions)
    return {**sizes, "image_size": size}


def resize_positions(table: Tensor, grid: int, how: str) -> Tensor:
    """(1 + n * n, W) to (1 + grid * grid, W), bilinear in float32.

    correct: the class token's row stays, the patches' are resized. released (pixellm.md 1.2): the n * n first rows
    count as the patches, so the class token's is the first cell of the square, and the last patch's row stays.
    """
    table, side = table.float(), math.isqrt(len(table) - 1)
    first = 0 if how == "released" else 1
    square = table[first : first + side * side].T.reshape(1, -1, side, side)
    cells = F.interpolate(square, (grid, grid), mode="bilinear", align_corners=False)[0].flatten(1).T
    kept = table[-1:] if how == "released" else table[:1]
    return torch.cat([cells, kept] if how == "released" else [kept, cells])


def tower_view(folder: str | Path, size: int, sight: TowerInput, preprocessor: str | None = None) -> LanguageView:
    """What a tower of side `size` is shown. A padded view takes from the tower's own picture settings at most its
    mean and deviation; as released it takes SAM's (pixellm.md 1.3)."""
    own = ClipView.load(_file(preprocessor) if preprocessor else folder, size)
    if not sight.pad:
        return replace(own, size=size) if sight.size else own
    if sight.stats == "sam":
        return PaddedView(size, SAM_MEAN, SAM_STD)
    return PaddedView(size, *(tuple(float(value) for value in 255 * np.float64(part)) for part in (own.mean, own.std)))


def write_view(folder: Path, view: LanguageView) -> None:
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
