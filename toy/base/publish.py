"""Writes what the base consists of: a SAM file under the upstream names and a Hugging Face LLaVA folder, in fp16."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, SamModel

from model.checkpoints.name_table import NameTable
from model.heads.sam_weights import SAM_NAMES
from toy.base.sizes import CLIP_MEAN, CLIP_STD, TOWER_SIDE

SAM_FILE, LLAVA_FOLDER = "sam_vit_toy.safetensors", "llava"
READABLE = 0o644  # safetensors writes files that only their owner may read
_PARTS = NameTable(
    [("vision_encoder.*", "encoder.*"), ("prompt_encoder.*", "prompts.*"), ("mask_decoder.*", "decoder.*")]
)
_UPSTREAM = NameTable(SAM_NAMES)


def save_sam(sam: SamModel, out: Path) -> Path:
    """Write `sam` to <out>/sam_vit_toy.safetensors, under upstream's names; its Fourier matrix is there once."""
    tensors = {key: value for key, value in sam.state_dict().items() if not key.startswith("shared_image_embedding.")}
    named = {
        _UPSTREAM.to_layout(_PARTS.to_model(key)): value.to(torch.float16).contiguous()
        for key, value in tensors.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"{SAM_FILE}.part"
    save_file(named, part)
    part.chmod(READABLE)
    part.replace(out / SAM_FILE)
    return out / SAM_FILE


def save_llava(llava: LlavaForConditionalGeneration, out: Path) -> Path:
    """Write `llava` and its image processor's settings to <out>/llava, beside the tokenizer that is there."""
    folder = out / LLAVA_FOLDER
    deepcopy(llava).to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(READABLE)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": TOWER_SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": TOWER_SIDE, "width": TOWER_SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder
