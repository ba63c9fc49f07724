"""Qwen-VL folders as the library writes them, with random weights, small enough for milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from data.patch_view import PatchView
from model.checkpoints.architecture import Architecture
from model.checkpoints.config_file import read_config
from model.checkpoints.files import read_tensors
from model.checkpoints.layouts import Report, reading_table, to_model_names
from model.checkpoints.load import assemble, vlm_class
from model.checkpoints.weight_source import WeightSource
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.qwen_vl import QwenVL
from tests.tiny_model import SAM
from utils.config import ModelConfig, TowerConfig

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
VOCABULARY, IMAGE_PAD, SEG, EOS = 60, 50, 57, 2
TOKENS = {"image_token_id": IMAGE_PAD, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
        {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3_vl": (
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
        {"patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]},
    ),
}
PIXELS = TowerConfig(min_pixels=8 * 8 * 6, max_pixels=8 * 8 * 20)
RECIPE = ModelConfig(precision="fp32", tower=PIXELS)


def stock_model(family: str, seed: int = 0, *, tied: bool = False, **text: Any) -> PreTrainedModel:
    """The library's model, in evaluation mode, with weights of a size that lets every part matter."""
    config, kind = {
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    }[family]
    own_text, own_vision = PARTS[family]
    # copies, because the configuration classes complete what they are given in place
    rope = {"rope_parameters": dict(own_text["rope_parameters"])}
    parts = {"text_config": TEXT | own_text | rope | text, "vision_config": VISION | own_vision}
    model = kind(config(**parts, **TOKENS, tie_word_embeddings=tied)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "norm" not in name:
                weight.normal_(0, 0.2 if weight.dim() > 1 else 0.05, generator=generator)
    return cast(PreTrainedModel, model)


class Words:
    """As much of a tokenizer as the sizes of a model depend on."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def read_backbone(folder: Path, config: ModelConfig = RECIPE) -> tuple[Architecture, PatchView, dict[str, Tensor]]:
    """What `build_model` makes of a folder: its architecture with a tiny SAM, its view, its weights under our names."""
    values = read_config(folder)
    kind = vlm_class(values, str(folder))
    report = Report()
    tensors = to_model_names(read_tensors(folder), reading_table(kind.WEIGHT_NAMES, []), report)
    source = WeightSource(folder, values, tensors, report, finished=False)
    sizes, view = kind.config_for(source, config, cast(PreTrainedTokenizerBase, range(VOCABULARY - 5)))
    own = {name: tensor for name, tensor in source.tensors.items() if name.startswith("vlm.")}
    return Architecture(kind.NAME, sizes, "sam", SAM), cast(PatchView, view), own


def load_backbone(folder: Path, config: ModelConfig = RECIPE, attention: str = "sdpa") -> QwenVL:
    """The backbone in a folder, in evaluation mode."""
    plan, view, tensors = read_backbone(folder, config)
    vlm = VLMS[plan.vlm].build(plan.vlm_config, attention, view)
    vlm.load_state_dict({name.removeprefix("vlm."): tensor for name, tensor in tensors.items()})
    return cast(QwenVL, vlm.float().eval())


def segmenter(folder: Path, attention: str = "sdpa") -> SegModel:
    """That backbone with a random SAM and text MLP, in evaluation mode."""
    plan, view, tensors = read_backbone(folder)
    model = assemble(plan, attention, view, [SEG])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "norm" not in name:
                weight.normal_(0, 0.2 if weight.dim() > 1 else 0.02, generator=generator)
    model.load_state_dict(tensors, strict=False)
    return model.float().eval()
