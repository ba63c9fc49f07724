"""DINOv3's vision transformers: rotary positions of two axes, so that any side needs no other table."""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, PreTrainedModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

from data.views import IMAGENET_MEAN, IMAGENET_STD, StretchedView
from model.vlm.towers.base import TOWERS, TowerFamily
from model.vlm.towers.dinov2 import without_mask_token

_EMBEDDINGS = ("cls_token", "register_tokens", "patch_embeddings.weight", "patch_embeddings.bias")


@TOWERS.register("dinov3_vit")
class Dinov3Tower(TowerFamily):
    """The last hidden state, after the final norm, is projected. Its positions are never moved at random, which is an
    augmentation of its pretraining."""

    NAME = "dinov3_vit"
    LICENCE = "DINOv3: DINOv3 License"
    CONFIG, MODEL = DINOv3ViTConfig, DINOv3ViTModel
    KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    KEYS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "rope_theta", "num_register_tokens")
    KEYS += ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp")
    FIXED: ClassVar = {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}
    FILES = (
        ("layer.*", "model.layer.*"),  # as released
        *((f"{part}.*", f"{part}.*") for part in ("embeddings", "model.layer", "norm")),
    )
    UNUSED = re.compile(r"embeddings\.mask_token|rope_embeddings\..*")
    LLAVA_FILES = (
        ("layer.*", "model.layer.*"),
        ("norm.*", "norm.*"),
        *((f"embeddings.{name}", f"embeddings.{name}") for name in _EMBEDDINGS),
    )

    STEM = ("embeddings",)
    LAYERS = "model.layer"
    NORM = "norm"
    FEATURE_LAYER = -1
    ANY_SIDE = True

    @classmethod
    def usual_view(cls, side: int) -> StretchedView:
        return StretchedView(side, IMAGENET_MEAN, IMAGENET_STD, "bilinear")

    @classmethod
    def build(cls, sizes: dict[str, Any], attention: str) -> PreTrainedModel:
        return without_mask_token(super().build(sizes, attention))

    @classmethod
    def reset_buffers(cls, tower: PreTrainedModel) -> None:
        rotary = DINOv3ViTRopePositionEmbedding(cast(DINOv3ViTConfig, tower.config))
        tower.rope_embeddings = rotary.to(cast(nn.LayerNorm, tower.norm).weight.device)
