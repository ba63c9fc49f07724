"""A small Qwen3-VL folder and a small SAM 2 folder with random weights; the program is `python -m toy.base.blank`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Sam2Config,
    Sam2Model,
)

from data.qwen_tokenizer import PAD, START, STOP, WRAP
from systems.wording import WORDING
from toy.base.llava import init_by_width
from toy.base.sam import reset_sam, tell_prompts_apart
from toy.base.sizes import STATE_SCALE, TOWER_POSITIONS
from toy.base.tower import sine_grid
from toy.base.vocabulary import WORDS_FILE

PIECES = 1792
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PATCH, MERGE = 16, 2  # pixels of a patch, patches of an image token per side
TABLE_SIDE = 16  # of the tower's table of positions, in patches
LEAST_TOKENS, MOST_TOKENS = 32, 64  # of an image
SAM_SIDE, SAM_WIDTH, FIRST_STAGE = 256, 128, 32  # pixels; width of prompts; width of the encoder's first stage
SAM_POSITIONS = 0.5  # amplitude of the sines that the encoder's table of positions starts from


def write_qwen3_vl(folder: Path) -> None:
    """Tokenizer, weights and image settings, as the library writes them."""
    tokenizer = blank_tokenizer()
    tokenizer.save_pretrained(folder)
    blank_qwen3_vl(tokenizer).to(torch.float16).save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {
            "shortest_edge": LEAST_TOKENS * (PATCH * MERGE) ** 2,
            "longest_edge": MOST_TOKENS * (PATCH * MERGE) ** 2,
        },
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def blank_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with the rules of Qwen's, learned from the project's templates and the words of the toy world."""
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(_corpus(), PIECES, **options)
    tokenizer.add_tokens([PAD, START, STOP, *WRAP, IMAGE, VIDEO], special_tokens=True)
    return tokenizer


def _corpus() -> Iterator[str]:
    for file in (WORDS_FILE, *sorted(WORDING.glob("*.yaml"))):
        yield from file.read_text(encoding="utf-8").splitlines()


def blank_qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """Vision tower with deepstack and text model with M-RoPE."""
    width, tower_width = 192, 192
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    vision: dict[str, Any] = {
        "depth": 4,
        "hidden_size": tower_width,
        "intermediate_size": 4 * tower_width,
        "num_heads": 3,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": TABLE_SIDE**2,
        "deepstack_visual_indexes": [1, 2],
    }
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    names |= {"vision_start_token_id": WRAP[0], "vision_end_token_id": WRAP[1]}
    ids: dict[str, Any] = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    init_by_width(model)
    tower, language = model.model.visual, model.model.language_model
    with torch.no_grad():
        tower.pos_embed.weight.copy_(TOWER_POSITIONS * sine_grid(TABLE_SIDE, tower_width).flatten(0, 1))
        nn.init.normal_(tower.patch_embed.proj.weight, std=0.025)  # an image is two equal frames
        nn.init.normal_(language.embed_tokens.weight)
        language.norm.weight *= STATE_SCALE
        model.lm_head.weight /= STATE_SCALE
    return model


def blank_sam2() -> PreTrainedModel:
    """SAM 2 whose masks depend on the prompt from the first step on."""
    stages = [FIRST_STAGE * 2**stage for stage in range(4)]
    cells = SAM_SIDE // 4  # per side, of the finest level
    trunk: dict[str, Any] = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": FIRST_STAGE,
        "image_size": [SAM_SIDE, SAM_SIDE],
        "blocks_per_stage": [1, 2, 3, 1],
        "embed_dim_per_stage": stages,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [8, 8],
    }
    vision: dict[str, Any] = {
        "backbone_config": trunk,
        "backbone_channel_list": stages[::-1],
        "backbone_feature_sizes": [[cells // 2**level] * 2 for level in range(3)],
        "fpn_hidden_size": SAM_WIDTH,
    }
    prompts = {"hidden_size": SAM_WIDTH, "image_size": SAM_SIDE, "patch_size": 16}
    decoder = {"hidden_size": SAM_WIDTH, "mlp_dim": 512, "num_attention_heads": 4, "iou_head_hidden_dim": SAM_WIDTH}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    sam = Sam2Model(config)
    reset_sam(sam)
    backbone = sam.vision_encoder.backbone
    with torch.no_grad():
        backbone.pos_embed.copy_(SAM_POSITIONS * sine_grid(8, FIRST_STAGE).permute(2, 0, 1)[None])
    tell_prompts_apart(sam.mask_decoder)
    return sam
