"""What a LLaVA asks of its vision tower, whatever the family.

A family is a `TowerFamily` in a file next to this one, registered in `TOWERS` under the values that `model_type` has in
its `config.json`. It has no state: the tower itself is a stock module of transformers, whose weights are named
`vlm.tower.*`. Everything outside goes through the members below and never into a tower's modules.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from torch import Tensor, cat, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from data.views import ClipView, StretchedView
from model.checkpoints.name_table import Pair
from utils.registry import Registry, unknown

TOWERS: Registry[type[TowerFamily]] = Registry("vision tower")  # model_type of config.json -> family
DEFAULT = "clip_vision_model"  # of a configuration without model_type, as in old LLaVA files
REFUSED = dict.fromkeys(
    ("siglip2", "siglip2_vision_model"),
    "variable resolution (NaFlex) is not supported; the SigLIP 2 checkpoints of a fixed resolution are of "
    "model_type siglip and can be used",
)


class TowerFamily:
    """Vision transformers of one architecture: B square images -> hidden states of their patches."""

    NAME: ClassVar[str]  # its own name in TOWERS, written as `model_type`
    LICENCE: ClassVar[str] = "as the weights that it started from say"  # usual of the family's weights, for model cards
    CONFIG: ClassVar[type[PreTrainedConfig]]
    MODEL: ClassVar[type[PreTrainedModel]]
    KEYS: ClassVar[tuple[str, ...]]  # of CONFIG that are read and kept; others, e.g. dropouts, keep their defaults
    FIXED: ClassVar[dict[str, Any]] = {}  # values that CONFIG has here whatever a file says
    FILES: ClassVar[tuple[Pair, ...]]  # names in the tower's own folder, in every layout that can be read, and in MODEL
    UNUSED: ClassVar[re.Pattern[str]]  # full names in that folder, or in MODEL, of weights that no feature needs
    LLAVA_FILES: ClassVar[tuple[Pair, ...]]  # names in a LLaVA folder (after `vision_tower.`) and in MODEL

    STEM: ClassVar[tuple[str, ...]]  # modules before the layers
    LAYERS: ClassVar[str]  # the module list of transformer blocks
    NORM: ClassVar[str | None] = None  # a final norm, which then applies to the last hidden state; None: states are raw
    CLASS_TOKEN: ClassVar[bool] = True  # it comes first; register tokens follow it
    FEATURE_LAYER: ClassVar[int] = -2  # the hidden state that is projected, unless a folder or a recipe names one
    # `vision_feature_select_strategy` (Hugging Face) or `mm_vision_select_feature` (original LLaVA) of patch features
    SELECT: ClassVar[tuple[str, ...]] = ("default", "patch")
    MASKS: ClassVar[bool] = True  # whether its attention takes a mask, which a padded view needs

    POSITIONS: ClassVar[str | None] = None  # its position table, one row per token; None: rotary
    RESIZES: ClassVar[tuple[str, ...]] = ("correct",)  # choices of model.tower.position_resize
    MODE: ClassVar[str] = "bicubic"
    ANTIALIAS: ClassVar[bool] = False
    ANY_SIDE: ClassVar[bool] = False  # trained at several sides: its preprocessor file, not its table, gives the usual
    STATS: ClassVar[str] = "tower"  # the usual choice of model.tower.stats
    PUBLISHED: ClassVar[bool] = False  # whether programs that read the published layout can have such a tower

    @classmethod
    def usual_view(cls, side: int) -> ClipView | StretchedView:
        """The view where no preprocessor file describes one."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The configuration, from a `config.json` of the tower (all of it or its vision side) or a LLaVA's. The
        library's defaults are written out, because the next release may have other ones."""
        vision = values.get("vision_config", values)
        given = {key: vision[key] for key in cls.KEYS if vision.get(key) is not None}
        complete = cls.CONFIG(**given).to_dict()
        kept = {key: complete[key] for key in cls.KEYS if complete.get(key) is not None}
        return {"model_type": cls.NAME, **kept, **cls.FIXED}

    @classmethod
    def build(cls, sizes: dict[str, Any], attention: str) -> PreTrainedModel:
        """An uninitialised tower. attention: sdpa or eager."""
        config = cls.CONFIG(**{key: value for key, value in {**sizes, **cls.FIXED}.items() if key != "model_type"})
        config._attn_implementation = attention
        return cls.MODEL(config)

    @classmethod
    def prefix(cls, config: PreTrainedConfig) -> int:
        """Tokens before the patches: the class token and registers."""
        return int(cls.CLASS_TOKEN) + getattr(config, "num_register_tokens", 0)

    @classmethod
    def layers(cls, tower: PreTrainedModel, pixels: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """(B, 3, side, side) -> hidden states of the patches, (B, patches, W) each: 0 the embedding, k the output of
        layer k, the last one after NORM. mask: (B, 1, 1, tokens), added to attention scores."""
        output = tower(pixels, output_hidden_states=True, attention_mask=mask)
        states = output.hidden_states
        if cls.NORM:
            states = (*states[:-1], output.last_hidden_state)
        first = cls.prefix(tower.config)
        return tuple(state[:, first:] for state in states)

    @classmethod
    def used_parts(cls, tower: PreTrainedModel, feature_layer: int) -> list[nn.Module]:
        """The modules that hidden state `feature_layer` comes from; those above it get no gradient."""
        blocks = tower.get_submodule(cls.LAYERS)
        assert isinstance(blocks, nn.ModuleList)
        # of N layers, state -2 is state N - 1, which is the output of layer N - 1
        count = feature_layer if feature_layer >= 0 else len(blocks) + 1 + feature_layer
        parts: list[nn.Module] = [tower.get_submodule(name) for name in cls.STEM] + [blocks[:count]]
        if cls.NORM and count == len(blocks):
            parts.append(tower.get_submodule(cls.NORM))
        return parts

    @classmethod
    def resize_positions(cls, table: Tensor, grid: int, how: str) -> Tensor:
        """(..., [1 +] n * n, W) position embeddings -> (..., [1 +] grid * grid, W) in float32, as the stock class
        resizes them in its forward pass; the class token's row stays. how: one of RESIZES."""
        rows = table.float().reshape(-1, table.shape[-1])
        first = int(cls.CLASS_TOKEN)
        side = math.isqrt(len(rows) - first)
        square = rows[first:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        cells = F.interpolate(square, (grid, grid), mode=cls.MODE, align_corners=False, antialias=cls.ANTIALIAS)
        patches = cells.permute(0, 2, 3, 1).reshape(grid * grid, -1)
        return cat([rows[:first], patches]).reshape(*table.shape[:-2], -1, table.shape[-1])

    @classmethod
    def reset_buffers(cls, tower: PreTrainedModel) -> None:
        """Computes the tables that no weight file holds, on the device of the weights."""


def tower_family(values: dict[str, Any], where: str) -> type[TowerFamily]:
    """The family of a tower's `config.json` or of a LLaVA's `vision_config`. where: the file, for messages."""
    kind = values.get("vision_config", values).get("model_type")
    if not kind:  # in old files the whole model names the family, or nothing does
        kind = values["model_type"] if str(values.get("model_type")) in TOWERS else DEFAULT
    kind = str(kind)
    if kind in REFUSED:
        raise ValueError(f"{where}: no vision tower {kind!r}: {REFUSED[kind]}")
    if kind not in TOWERS:
        raise ValueError(f"{where}: " + unknown(TOWERS.kind, kind, TOWERS))
    return TOWERS[kind]
