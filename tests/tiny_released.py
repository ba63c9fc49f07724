"""Folders of Sa2VA and UniPixel as they are published: their names, files and remote code, tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.tokens import load_tokenizer, mask_ids
from model.checkpoints.files import read_tensors
from model.heads.sam2 import Sam2Head
from systems.base import build_system
from tests.tiny_qwen import TEXT, stock_model
from tests.tiny_sam2 import SIZES, WIDTH, read, stock, write_original
from tests.tiny_words import tiny_qwen_tokenizer

# a released trunk, as model.heads.sam2_weights lists them: what its shapes do not show is known by them
KNOWN_TRUNK = (8, (1, 1, 2, 1), 1, (3,), (4, 2, 4, 2), 4)
FOLDERS = ("sa2va_qwen3_vl", "sa2va_qwen2_5_vl", "unipixel_qwen2_5_vl")
MARK = "code_of_the_folder_was_run"
# as released, for as many image tokens as there
PATCHES = {"qwen2_5_vl": {"patch_size": 14, "window_size": 112}, "qwen3_vl": {"patch_size": 16}}
LOUDER = 50.0  # the mask token's row of the output layer, so that random weights write it
REMOTE = {
    "AutoConfig": "configuration_released.ReleasedConfig",
    "AutoModel": "modeling_released.Sa2VAChatModelQwen",
    "AutoModelForCausalLM": "modeling_released.Sa2VAChatModelQwen",
}


def write_released(folder: Path, name: str) -> Path:
    """name: in FOLDERS."""
    system, family = name.split("_", 1)
    tokenizer = _write_words(folder, system, family)
    vlm = stock_model(family, vision=PATCHES[family], vocab_size=len(tokenizer), max_position_embeddings=8192)
    config = json.loads(vlm.config.to_json_string())
    weights = {f"model.{key}": value for key, value in vlm.state_dict().items()}
    weights["model.lm_head.weight"][mask_ids(tokenizer, build_system(system).tokens)[0]] *= LOUDER
    prompts = 2 if system == "unipixel" else 1
    write = {"sa2va": _sa2va, "unipixel": _unipixel}[system]
    tensors, values = write(weights, config, _sam2(folder), _projection(TEXT["hidden_size"], prompts * WIDTH))
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    _write_code(folder)
    return folder


def _sa2va(
    weights: dict[str, Tensor], config: dict[str, Any], sam2: dict[str, Tensor], layers: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """sa2va.md 2.2: one `model.` in front of the library's names, the rest next to it."""
    tensors = {**weights, **{f"grounding_encoder.sam2_model.{key}": value for key, value in sam2.items()}}
    for place, (weight, bias) in zip((0, 2), (layers[:2], layers[2:]), strict=True):
        tensors |= {f"text_hidden_fcs.{place}.weight": weight, f"text_hidden_fcs.{place}.bias": bias}
    named = {"architectures": ["Sa2VAChatModelQwen"], "model_type": "sa2va_chat", "template": "qwen_chat"}
    return tensors, {**config, **named, "auto_map": REMOTE}


def _unipixel(
    weights: dict[str, Tensor], config: dict[str, Any], sam2: dict[str, Tensor], layers: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """unipixel.md 1: the names of older releases of the library, and parts for regions and frames."""
    old = {"model.model.visual.": "visual.", "model.model.language_model.": "model.", "model.lm_head.": "lm_head."}
    tensors = {}
    for key, value in weights.items():
        prefix = next(prefix for prefix in old if key.startswith(prefix))
        tensors[old[prefix] + key.removeprefix(prefix)] = value
    tensors |= {f"sam2.{key}": value for key, value in sam2.items()}
    tensors |= {"seg_head.0.weight": torch.ones(len(layers[0])), "seg_head.1.weight": layers[0]}
    tensors |= {"seg_head.1.bias": layers[1], "seg_head.3.weight": layers[2], "seg_head.3.bias": layers[3]}
    regions = ("ref_encoder.no_mask_embed.weight", "ref_proj.1.bias", "tem_emb.weight", "msk_proj.0.weight")
    tensors |= {name: torch.zeros(2) for name in regions}
    flat = {**{key: value for key, value in config.items() if key != "text_config"}, **config["text_config"]}
    named = {"architectures": ["PixelQwen2_5_VLForConditionalGeneration"], "model_type": "pixel_qwen2_5_vl"}
    return tensors, {**flat, **named, "conv_type": "chatml", "sam2_hidden_tokens": 2, "sam2_image_size": 768}


def _write_words(folder: Path, system: str, family: str) -> Any:
    tiny_qwen_tokenizer(folder, version=2 if "2" in family else 3)
    tokenizer = load_tokenizer(folder, build_system(system).tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _sam2(folder: Path) -> dict[str, Tensor]:
    """In upstream's names, the memory of videos among them."""
    source = folder / "sam2"
    stock("sam2").save_pretrained(source)
    file = write_original(cast(Sam2Head, read("sam2", source, sizes=SIZES)), folder / "sam2.pt")
    tensors = read_tensors(file)
    file.unlink()
    for written in source.iterdir():
        written.unlink()
    source.rmdir()
    return tensors


def _projection(width: int, out: int) -> list[Tensor]:
    """Weight and bias of both layers."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((width, width), (width,), (out, width), (out,))
    return [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]


def _write_code(folder: Path) -> None:
    """What a loader that trusts the folder would import; it leaves a mark."""
    code = f"from pathlib import Path\nPath({str(folder / MARK)!r}).touch()\nraise SystemExit('code was run')\n"
    for name in ("configuration_released", "modeling_released", "tokenization_released", "sam2"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_released.ReleasedTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
