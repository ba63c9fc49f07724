"""How a tower sees an image: its view, its grid of patches, the position table that fits the grid.

What differs from family to family is in model/vlm/towers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.views import SAM_MEAN, SAM_STD, ClipView, PaddedView, StretchedView, load_view
from model.checkpoints.config_file import SECTION
from model.vlm.towers import TOWERS, TowerFamily
from utils.config import TowerConfig
from utils.limits import VIEW
from utils.registry import unknown
from utils.renamed import find_config

OwnView = ClipView | StretchedView  # what a preprocessor file describes
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


def tower_input(values: dict[str, Any], config: TowerConfig, family: type[TowerFamily]) -> TowerInput:
    """What `config.json` (ours or a published one) says, overridden by the fields that the recipe sets."""
    names = TowerInput.__dataclass_fields__.keys()
    fields: Any = values.get(SECTION, {}).get("sight")
    if fields is None:
        fields = _published_input(values, family)
    if not (isinstance(fields, dict) and fields.keys() <= names):
        raise ValueError(
            f"config.json: {SECTION}.sight must be a mapping with some of {', '.join(names)}, got {fields!r}"
        )
    recipe_names = {"positions": "position_resize"}  # a field of saved folders -> its name in a recipe
    overrides: dict[str, Any] = {name: getattr(config, recipe_names.get(name, name)) for name in names}
    if config.preprocessor:
        side = load_view(_file(config.preprocessor)).size
        if config.size not in (None, side):
            raise ValueError(f"model.tower.size is {config.size}, {config.preprocessor} is for {side}")
        overrides["size"] = side
    shown = TowerInput(**fields | {name: value for name, value in overrides.items() if value is not None})
    if shown.positions not in family.RESIZES:
        raise ValueError(
            f"model.tower.position_resize: {shown.positions!r} is not for a tower of {family.NAME}; "
            f"have: {', '.join(family.RESIZES)}"
        )
    if shown.pad and not family.MASKS:
        raise ValueError(
            f"model.tower.pad: the attention of {family.NAME} takes no mask, so padding cannot be hidden from it; to "
            "show the full image, name a model.tower.preprocessor whose size has height and width (a square)"
        )
    return shown


def _published_input(values: dict[str, Any], family: type[TowerFamily]) -> dict[str, Any]:
    """The same from the flags that a published `config.json` keeps, and from what is usual of the family."""
    fields: dict[str, Any] = {"stats": family.STATS, "positions": family.RESIZES[0]}
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


def representable(shown: TowerInput, family: type[TowerFamily]) -> bool:
    """Whether a published `config.json` has fields for all of it: it must read back equal."""
    return shown == tower_input(published_fields(shown), TowerConfig(), family)


def tower_side(sizes: dict[str, Any], shown: TowerInput, own: OwnView) -> int:
    """Side of the view in pixels. own: what the tower's preprocessor file says, the last word where `shown` has no size
    and the family takes any."""
    return shown.size or (own.size if TOWERS[sizes["model_type"]].ANY_SIDE else sizes["image_size"])


def fit_tower(sizes: dict[str, Any], tensors: dict[str, Tensor], shown: TowerInput, own: OwnView) -> dict[str, Any]:
    """The tower's sizes at the side that it is shown, which may differ from the one it was trained at; its position
    table in `tensors` is resized to that side in place."""
    family, patch = TOWERS[sizes["model_type"]], sizes["patch_size"]
    native = sizes["image_size"] // patch
    size = tower_side(sizes, shown, own)
    grid = size // patch
    # a tower may have been built for a side with a rest that no patch covers (SigLIP: 384 in patches of 14)
    if (size % patch and size != sizes["image_size"]) or grid % shown.pool:
        raise ValueError(
            f"model.tower.size {size} does not divide into patches of {patch}, {shown.pool} per token side"
        )
    table = tensors.get(f"vlm.tower.{family.POSITIONS}")
    # A finished checkpoint holds a table of the shown side already, while the sizes next to it may still be the base's:
    # only a table of the native side is resized. The extra row is the class token's.
    if table is not None and grid != native and table.shape[-2] == native**2 + int(family.CLASS_TOKEN):
        tensors[f"vlm.tower.{family.POSITIONS}"] = family.resize_positions(table, grid, shown.positions)
    return {**sizes, "image_size": size}


def own_view(folder: str | Path, sizes: dict[str, Any], preprocessor: str | None = None) -> OwnView:
    """What the preprocessor file says, the recipe's or that in the tower's folder; without one, the family's usual
    view at the side of its position table. sizes: of the tower as it was built."""
    usual = TOWERS[sizes["model_type"]].usual_view(sizes["image_size"])
    return load_view(_file(preprocessor) if preprocessor else folder, usual)


def tower_view(own: OwnView, size: int, shown: TowerInput) -> OwnView | PaddedView:
    """The view of a tower of side `size`. A padded view takes from the tower's own preprocessor file at most its mean
    and deviation; as released it takes SAM's (pixellm.md 1.3)."""
    if not shown.pad:
        if shown.size not in (None, own.size):  # another view than the file's
            own = replace(own, size=size, **({"edge": None} if isinstance(own, ClipView) else {}))
        if own.size != size:
            raise ValueError(
                f"the preprocessor file is for a view of {own.size} pixels, the tower for {size}: set model.tower.size"
            )
        return own
    if shown.stats == "sam":
        return PaddedView(size, SAM_MEAN, SAM_STD)
    return PaddedView(size, _to_bytes(own.mean), _to_bytes(own.std))


def _to_bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """From the 0..1 scale of preprocessor files to the 0..255 scale of a PaddedView."""
    return tuple(float(value) for value in 255 * np.asarray(values, np.float64))


def write_view(folder: Path, view: OwnView | PaddedView) -> None:
    """`preprocessor_config.json` as `load_view` and transformers read it."""
    scale, kind = 1, "CLIPImageProcessor"
    if isinstance(view, PaddedView):
        scale, size, bilinear = 255, {"longest_edge": view.size}, True
    elif isinstance(view, StretchedView):
        kind, size = "SiglipImageProcessor", {"height": view.size, "width": view.size}
        bilinear = view.resample == "bilinear"
    else:
        size, bilinear = {"shortest_edge": view.edge or view.size}, False
    values = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": 2 if bilinear else 3,
        "do_center_crop": isinstance(view, ClipView),
        **({"do_pad": True} if isinstance(view, PaddedView) else {}),
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
