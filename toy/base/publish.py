"""Writes the base: a SAM file under the upstream names, a Hugging Face LLaVA folder, both fp16, a log and a README."""

import json
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, SamModel

from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import NameTable
from model.heads.sam_weights import SAM_NAMES
from systems.assistant import WEIGHTS, find_checkpoint
from systems.weights_recipe import CHECKPOINTS, RECIPE
from toy.base.sizes import CLIP_MEAN, CLIP_STD, TOWER_SIDE
from utils.config import Recipe, load_recipe, to_dict
from utils.files import write_atomically

SAM_FILE, LLAVA_FOLDER = "sam_vit_toy.safetensors", "llava"
READABLE = 0o644  # safetensors writes files that only their owner may read
_PARTS = NameTable(
    [("vision_encoder.*", "encoder.*"), ("prompt_encoder.*", "prompts.*"), ("mask_decoder.*", "decoder.*")]
)
_UPSTREAM = NameTable(SAM_NAMES)
LOG = "train_log.jsonl"
STAGES = {
    "tower": "vision tower alone",
    "llava": "LLaVA (tower, projector, language model)",
    "repeat": "its language model, repeating phrases",
    "sam": "SAM",
}
_TEXT = """# The toy base

The counterparts of LLaVA and SAM for the toy world, trained from scratch on procedural scenes by
`python -m toy.base` (its log: `{log}`). They never saw a mask token or a scene of the toy datasets, and no scene twice.

| file | what | bytes |
|---|---|---|
| `{folder}/` | a Hugging Face LLaVA folder: CLIP tower 128 px, patch 8, layer -2; LLaMA 256 wide | {llava} |
| `{sam}` | SAM under upstream's names: ViT 160 wide, 160 px, patch 8, prompts of 128 | {sam_bytes} |

All weights are fp16. The vocabulary has 1792 sentencepiece pieces, then `<im_patch>` (the `image_token_index`),
`<im_start>` and `<im_end>`, as LLaVA v1.1 has them. Places are one word each, column letter and row letter on a
16 x 16 grid.

| stage | training time, one core | steps | held-out figures |
|---|---|---|---|
{rows}

In the table, `present` and `find` ask for lists of classes, `shown` and `absent` are the accuracies on classes that
are and are not in view, `near` is the share of place words within one cell, `repeat` is of answers that repeat phrases
and `others` of those of the stage before; all are per token, with teacher forcing.
IoUs of SAM are at half the input side for points, boxes, several points, and part / thing / class levels.
"""


def save_sam(sam: SamModel, out: Path) -> Path:
    """Write `sam` to <out>/sam_vit_toy.safetensors, under the upstream names, with the Fourier matrix only once."""
    tensors = {key: value for key, value in sam.state_dict().items() if not key.startswith("shared_image_embedding.")}
    named = {
        cast(str, _UPSTREAM.to_layout(cast(str, _PARTS.to_model(key)))): value.to(torch.float16).contiguous()
        for key, value in tensors.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"{SAM_FILE}.part"
    save_file(named, part)
    part.chmod(READABLE)
    part.replace(out / SAM_FILE)  # at once: nobody reads half a file
    return out / SAM_FILE


def save_llava(llava: LlavaForConditionalGeneration, out: Path) -> Path:
    """Write `llava` and its image processor's settings to <out>/llava, which has the tokenizer already."""
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


def write_report(scratch: Path, out: Path) -> Path:
    """Concatenate the logs of all stages into <out>/train_log.jsonl and write <out>/README.md from them."""
    lines = [line for stage in STAGES for line in (scratch / f"{stage}.jsonl").read_text().splitlines()]
    (out / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    last = {entry["stage"]: entry for entry in map(json.loads, lines) if "held_out" in entry}
    text = _TEXT.format(
        log=LOG,
        folder=LLAVA_FOLDER,
        sam=SAM_FILE,
        llava=(out / LLAVA_FOLDER / "model.safetensors").stat().st_size,
        sam_bytes=(out / SAM_FILE).stat().st_size,
        rows="\n".join(_row(stage, entry) for stage, entry in last.items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    return out / "README.md"


def _row(stage: str, entry: dict) -> str:
    figures = ", ".join(f"{name} {value:.3f}" for name, value in entry["held_out"].items())
    return f"| {STAGES[stage]} | {entry['seconds'] / 60:.0f} min | {entry['step']} | {figures} |"


def save_assistant(run: Path, out: Path) -> None:
    """Writes the best checkpoint of `run`. Of its recipe only the system and the model are kept: the rest says where
    its data, its embeddings and its log were."""
    found = find_checkpoint(run)
    place = out / CHECKPOINTS / found.name
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in read_tensors(found / WEIGHTS).items()}
    save_file(tensors, place / WEIGHTS)
    (place / WEIGHTS).chmod(READABLE)
    write_atomically(out / CHECKPOINTS / "last", f"{found.name}\n")
    recipe, default = load_recipe(run), to_dict(Recipe())
    kept = {key: value for key, value in to_dict(recipe)["model"].items() if value != default["model"][key]}
    kept.pop("embedding_cache", None)
    content = {"system": recipe.system, "options": dict(recipe.options), "model": kept}
    write_atomically(out / RECIPE, yaml.safe_dump(content, sort_keys=False))
