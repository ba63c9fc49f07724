"""DINOv2, without and with register tokens."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from data.views import IMAGENET_MEAN, IMAGENET_STD, ClipView
from model.vlm.towers.base import TOWERS, TowerFamily


def without_mask_token(tower: PreTrainedModel) -> PreTrainedModel:
    """The token that stands for hidden patches in the pretraining of DINO: no image needs it, and it would never get a
    gradient."""
    del cast(nn.Module, tower.embeddings).mask_token
    return tower


@TOWERS.register("dinov2")
class Dinov2Tower(TowerFamily):
    """The last hidden state, after the final norm, is projected: what its authors call the patch tokens.

    Its attention takes no mask in transformers.
    """

    NAME = "dinov2"
    LICENCE = "DINOv2: Apache-2.0"
    CONFIG, MODEL = Dinov2Config, Dinov2Model
    KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "num_channels", "image_size")
    KEYS += ("patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn")
    FILES = (
        ("dinov2.*", "*"),  # of a model with a head
        *((f"{part}.*", f"{part}.*") for part in ("embeddings", "encoder", "layernorm")),
    )
    UNUSED = re.compile(r"(.*\.)?embeddings\.mask_token|classifier\..*")
    LLAVA_FILES = (
        *((f"embeddings.{name}", f"embeddings.{name}") for name in ("cls_token", "position_embeddings")),
        *((f"{part}.*", f"{part}.*") for part in ("embeddings.patch_embeddings", "encoder.layer", "layernorm")),
    )

    STEM = ("embeddings",)
    LAYERS = "encoder.layer"
    NORM = "layernorm"
    FEATURE_LAYER = -1
    MASKS = False
    POSITIONS = "embeddings.position_embeddings"
    ANY_SIDE = True

    @classmethod
    def usual_view(cls, side: int) -> ClipView:
        return ClipView(side, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def build(cls, sizes: dict[str, Any], attention: str) -> PreTrainedModel:
        return without_mask_token(super().build(sizes, attention))


@TOWERS.register("dinov2_with_registers")
class Dinov2RegistersTower(Dinov2Tower):
    """DINOv2 with register tokens between class token and patches; its position table is resized with antialias."""

    NAME = "dinov2_with_registers"
    CONFIG, MODEL = Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    KEYS = (*Dinov2Tower.KEYS, "num_register_tokens")
    FILES = (("dinov2_with_registers.*", "*"), *Dinov2Tower.FILES[1:])
    LLAVA_FILES = (("embeddings.register_tokens", "embeddings.register_tokens"), *Dinov2Tower.LLAVA_FILES)
    ANTIALIAS = True
