"""Small backbones and mask heads with random weights, of the architectures as released."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, SamModel

from toy.base.blank_qwen import blank_sam2, write_qwen3_vl
from toy.base.llava import init_by_width
from toy.base.publish import save_llava, save_sam
from toy.base.sam import reset_sam, tell_prompts_apart
from toy.base.sizes import STATE_SCALE, TOWER_POSITIONS, TOWER_SIDE, llava_config, sam_config
from toy.base.tower import sine_grid
from toy.base.vocabulary import IMAGE_PATCH, added_ids, load_vocabulary

TOKENIZER = Path(__file__).parents[2] / "assets/toy/llava"
FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SAM_SIDE, PATCH = 256, 16  # pixels; the patch size is that of the tower, too
SAM_POSITIONS = 1.2  # amplitude of the sines that the position table starts from


def write(backbone: str, folder: Path, seed: int) -> Path:
    """Writes a backbone into `folder` and its mask head next to it; returns where the latter is."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[backbone](folder)


def write_llava(folder: Path) -> Path:
    """LLaVA in `folder`, SAM next to it, whose file is returned."""
    for name in FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    save_llava(blank_llava(folder), folder.parent)
    return save_sam(blank_sam(), folder.parent)


def write_qwen(folder: Path) -> Path:
    """Qwen3-VL in `folder`, SAM 2 next to it, whose folder is returned."""
    write_qwen3_vl(folder)
    sam = folder.with_name("sam2")
    blank_sam2().to(torch.float16).save_pretrained(sam)
    return sam


WRITERS = {"llava": write_llava, "qwen3_vl": write_qwen}


def blank_llava(folder: Path) -> LlavaForConditionalGeneration:
    """CLIP tower, projector and LLaMA with the vocabulary in `folder`."""
    pieces = load_vocabulary(folder)
    images = added_ids(pieces)
    vocabulary = pieces.get_piece_size() + len(images)
    config = llava_config(vocabulary, images[IMAGE_PATCH], patch=PATCH, tower_layers=5, width=192, inner=512, layers=3)
    llava = LlavaForConditionalGeneration(config)
    tower = llava.model.vision_tower.embeddings
    with torch.no_grad():
        sines = sine_grid(TOWER_SIDE // PATCH, tower.embed_dim)
        tower.position_embedding.weight[1:] = TOWER_POSITIONS * sines.flatten(0, 1)  # row 0 is the class position
        nn.init.normal_(tower.patch_embedding.weight, std=0.05)
    language = llava.model.language_model
    for module in (language, llava.model.multi_modal_projector):
        init_by_width(module)
    with torch.no_grad():
        nn.init.normal_(language.embed_tokens.weight)  # large against what the layers add: a word stays recognisable
        # The text MLP reads the normalised states, so that larger ones give mask queries that differ from the start;
        # dividing the output layer by the same factor leaves the token logits as they were.
        language.norm.weight *= STATE_SCALE
        llava.lm_head.weight /= STATE_SCALE
    return llava


def blank_sam() -> SamModel:
    """SAM whose masks depend on the prompt from the first step on."""
    side = SAM_SIDE // PATCH
    sam = SamModel(sam_config(SAM_SIDE, PATCH, encoder_width=128, window=side // 2, decoder_heads=4))
    reset_sam(sam)
    with torch.no_grad():
        positions = cast(nn.Parameter, sam.vision_encoder.pos_embed)  # None only without absolute positions
        positions.copy_(SAM_POSITIONS * sine_grid(side, positions.shape[-1])[None])
        nn.init.normal_(sam.vision_encoder.patch_embed.projection.weight, std=0.05)
    tell_prompts_apart(sam.mask_decoder)
    return sam
