"""CLIP: the tower of every LLaVA that the systems were published with."""

from __future__ import annotations

import math
import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from data.views import ClipView
from model.vlm.towers.base import TOWERS, TowerFamily


@TOWERS.register("clip", "clip_vision_model")
class ClipTower(TowerFamily):
    NAME = "clip_vision_model"
    LICENCE = "CLIP: MIT"
    CONFIG, MODEL = CLIPVisionConfig, CLIPVisionModel
    KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    KEYS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")
    FILES = (
        ("vision_model.*", "*"),
        *((f"{part}.*", f"{part}.*") for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")),
    )
    # a CLIP folder also holds the text model and the projections to the space that both share
    UNUSED = re.compile(r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|.*position_ids")
    LLAVA_FILES = (("vision_model.*", "*"),)

    STEM = ("embeddings", "pre_layrnorm")
    LAYERS = "encoder.layers"
    POSITIONS = "embeddings.position_embedding.weight"
    RESIZES = ("released", "correct")
    STATS = "sam"
    PUBLISHED = True

    @classmethod
    def usual_view(cls, side: int) -> ClipView:
        return ClipView(side)

    @classmethod
    def resize_positions(cls, table: Tensor, grid: int, how: str) -> Tensor:
        """(1 + n * n, W) position embeddings, class token first, -> (1 + grid * grid, W): bilinear, in float32.

        how: "correct" resizes the patches' rows and leaves the class token's where it is. "released" (pixellm.md 1.2)
        is off by one row, and weights trained with it need it: the first n * n rows count as the patches and the last
        row as the one to leave. For n = 2, with the class token's row c and the patches' p0 ... p3:

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

    @classmethod
    def reset_buffers(cls, tower: PreTrainedModel) -> None:
        number_positions(tower)


def number_positions(tower: PreTrainedModel) -> None:
    """The row of the position table for each token: 0, 1, ..."""
    embeddings = cast(nn.Module, tower.embeddings)
    table = cast(nn.Embedding, embeddings.position_embedding)
    # not the length of the weight: ZeRO-3 divides it between processes
    positions = torch.arange(table.num_embeddings, device=table.weight.device)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
