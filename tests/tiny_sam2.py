"""Stock SAM 2 and SAM 3 trackers with random weights, small enough for milliseconds, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Config, Sam2Model, Sam3TrackerConfig, Sam3TrackerModel

from model.checkpoints.name_table import NameTable
from model.heads import HEADS, HeadContext
from model.heads.sam2 import Sam2Head
from model.heads.sam2_weights import SAM2_NAMES

WIDTH = 16
SIDES = {"sam2": 64, "sam3": 56}
DECODER = {"hidden_size": WIDTH, "mlp_dim": 24, "num_attention_heads": 4, "iou_head_hidden_dim": 12}
DECODER |= {"dynamic_multimask_via_stability": False}
TRUNK = {
    "hidden_size": 8,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}
HIDDEN = ("num_attention_heads_per_stage", "window_size_per_stage", "global_attention_blocks")
SIZES = {"backbone_config": {key: TRUNK[key] for key in HIDDEN}}  # what no shape shows
VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDES["sam3"],
    "patch_size": 7,
    "window_size": 4,
    "global_attn_indexes": [1],
    "pretrain_image_size": 28,
}


def stock(name: str, scales: tuple[float, ...] = (4.0, 2.0, 1.0)) -> Any:
    """The library's own model. scales: of SAM 3's neck."""
    side = SIDES[name]
    if name == "sam2":
        vision = {"backbone_config": {**TRUNK, "model_type": "sam2_hiera_det_model"}, "fpn_hidden_size": WIDTH}
        vision |= {"backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        prompts = {"hidden_size": WIDTH, "image_size": side, "patch_size": 16, "mask_input_channels": 8}
        parts = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": dict(DECODER)}
        model = Sam2Model(Sam2Config(**parts))
    else:
        vision = {"backbone_config": {**VIT, "model_type": "sam3_vit_model"}, "fpn_hidden_size": WIDTH}
        vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "scale_factors": list(scales)}
        prompts = {"hidden_size": WIDTH, "image_size": side, "patch_size": 7, "mask_input_channels": 8}
        parts = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": dict(DECODER)}
        model = Sam3TrackerModel(Sam3TrackerConfig(**parts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3, generator=generator)
        frequencies = model.shared_image_embedding.positional_embedding.normal_(generator=generator)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(frequencies)
    return model.eval()


def read(name: str, path: Path, **options: Any) -> Sam2Head:
    """The head with the weights of a file or folder, in evaluation mode."""
    tensors, options = HEADS[name].read_weights(path, options)
    return from_tensors(name, tensors, options)


def from_tensors(name: str, tensors: dict[str, Tensor], options: dict[str, Any], side: int | None = None) -> Sam2Head:
    context = HeadContext(1, 1, 1, 1, side=side or SIDES[name])
    with torch.device("meta"):
        head = HEADS[name].build(HEADS[name].config_for(tensors, options, context), "sdpa")
    assert isinstance(head, Sam2Head)
    head.load_state_dict(tensors, assign=True)
    head.reset_buffers()
    return head.eval()


def write_original(head: Sam2Head, file: Path, version: str = "2.1") -> Path:
    """A `sam2*.pt` with these weights: upstream's names below "model", the memory of videos among them."""
    table = NameTable(SAM2_NAMES)
    state = {str(table.to_layout(name)): tensor.clone() for name, tensor in head.state_dict().items()}
    memory = {"maskmem_tpos_enc": 7, "no_mem_pos_enc": 3, "no_obj_ptr": 2, "memory_encoder.out_proj.weight": 4}
    memory |= {"memory_attention.norm.weight": 2, "obj_ptr_proj.layers.0.weight": 2, "mask_downsample.weight": 4}
    if version == "2.1":
        memory |= {"no_obj_embed_spatial": 2, "obj_ptr_tpos_proj.weight": 2}
    torch.save({"model": state | {name: torch.zeros(size) for name, size in memory.items()}}, file)
    return file
