"""SigLIP, and SigLIP 2 of a fixed resolution, whose checkpoints are of the same class."""

from __future__ import annotations

import re
from typing import ClassVar

from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from data.views import StretchedView
from model.vlm.towers.base import TOWERS, TowerFamily
from model.vlm.towers.clip import number_positions

HALF = (0.5, 0.5, 0.5)


@TOWERS.register("siglip", "siglip_vision_model")
class SiglipTower(TowerFamily):
    """No class token: an attention head pools the patches, which no patch feature needs and which is left out.

    The final norm belongs to that head: hidden states are raw, as LLaVA-NeXT and transformers' LLaVA read them.
    """

    NAME = "siglip_vision_model"
    LICENCE = "SigLIP: Apache-2.0"
    CONFIG, MODEL = SiglipVisionConfig, SiglipVisionModel
    KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    KEYS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    FIXED: ClassVar = {"vision_use_head": False}
    FILES = (
        ("vision_model.*", "*"),
        *((f"{part}.*", f"{part}.*") for part in ("embeddings", "encoder", "post_layernorm")),
    )
    UNUSED = re.compile(r"(vision_model\.)?head\..*|text_model\..*|logit_(scale|bias)|.*position_ids")
    LLAVA_FILES = (("vision_model.*", "*"),)

    STEM = ("embeddings",)
    LAYERS = "encoder.layers"
    CLASS_TOKEN = False
    SELECT = ("full", "patch")  # Hugging Face's "default" would drop the first patch
    POSITIONS = "embeddings.position_embedding.weight"

    @classmethod
    def usual_view(cls, side: int) -> StretchedView:
        return StretchedView(side, HALF, HALF)

    @classmethod
    def reset_buffers(cls, tower: PreTrainedModel) -> None:
        number_positions(tower)
