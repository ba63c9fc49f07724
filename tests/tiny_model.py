"""A SegModel of real parts with random weights, small enough for milliseconds, and a batch for it."""

from __future__ import annotations

from typing import cast

import torch

from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from model.checkpoints.architecture import Architecture
from model.checkpoints.load import assemble
from model.heads.sam import SamHead
from model.seg_model import SegModel
from model.vlm.llava import Llava

VOCABULARY, SEG, SIDE, EOS = 40, 37, 64, 2
LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SAM = {
    "vision_config": {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "mlp_dim": 24,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": {"hidden_size": 16, "mask_input_channels": 8, "image_size": SIDE, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 24,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
        "layer_norm_eps": 1e-5,
    },
}
LLAVA = {"language": LANGUAGE, "tower": TOWER, "projector_depth": 2, "feature_layer": -2}
PLAN = Architecture("llava", LLAVA, "sam", SAM)


def tiny_model(seed: int = 0, plan: Architecture = PLAN) -> SegModel:
    """Evaluation mode, float32; weights of a size that lets every part matter."""
    model = assemble(plan).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "norm" not in name:
                weight.normal_(0, 0.3 if weight.dim() > 1 else 0.02, generator=generator)
    return model


def llava_of(model: SegModel) -> Llava:
    """The backbone, as its own class."""
    return cast(Llava, model.vlm)


def sam_of(model: SegModel) -> SamHead:
    """The mask head, as its own class."""
    return cast(SamHead, model.head)


def tiny_batch(seed: int = 0, masks: bool = True) -> Batch:
    """Two images of different sizes with two rows and one, right-padded, three masks (or none)."""
    generator = torch.Generator().manual_seed(seed)
    image = [IMAGE_ID] * 4
    rows = [
        [1, 5, *image, 6, 7, 8, SEG, 9, SEG, EOS],
        [1, 5, *image, 10, 11, 12, 13, EOS, 0, 0],
        [1, 5, *image, 14, 15, SEG, EOS, 0, 0, 0],
    ]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, :7] = IGNORE_ID
    labels[(ids == 0).nonzero(as_tuple=True)] = IGNORE_ID
    positions = (ids == SEG).nonzero()
    if not masks:
        positions = positions[:0]
    geometry = [Geometry((20, 30), (43, 64)), Geometry((25, 10), (64, 26))]
    truth = [
        (torch.rand(n, *place.original, generator=generator) > 0.5).float()
        for n, place in zip((2, 1), geometry, strict=True)
    ]
    return Batch(
        pixels=torch.randn(2, 3, 16, 16, generator=generator),
        seg_pixels=torch.randn(2, 3, SIDE, SIDE, generator=generator),
        ids=ids,
        labels=labels,
        attention=ids != 0,
        row_image=torch.tensor([0, 0, 1]),
        mask_rows=positions[:, 0],
        mask_positions=positions[:, 1:] - 1,
        masks=truth if masks else [image_masks[:0] for image_masks in truth],
        geometry=geometry,
        names=["a.jpg", "b.jpg"],
        ignore=[None, None],
    )
