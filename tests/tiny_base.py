"""A tiny base LLaVA and SAM file, cut out of the recorded LISA checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints.files import write_tensors
from tests.records import OWN

GOLDEN = OWN / "lisa"
PIECES = 600  # of the golden tokenizer, without added tokens


def base_tensors(published: dict[str, Tensor], *, tower: bool = False) -> dict[str, Tensor]:
    """What an original LLaVA holds: no mask head, no text MLP, no added rows, the tower or not."""
    drop = ("model.visual_model.", "model.text_hidden_fcs.", *(() if tower else ("model.vision_tower.",)))
    kept = {name: tensor for name, tensor in published.items() if not name.startswith(drop)}
    return {name: tensor[:PIECES] if tensor.shape[0] == PIECES + 3 else tensor for name, tensor in kept.items()}


def write_base(
    folder: Path, tensors: dict[str, Tensor], config: dict | None = None, *, clip: bool = True, safe: bool = True
) -> Path:
    """A base LLaVA in the original layout, with tokenizer files and a CLIP folder next to its weights."""
    folder.mkdir(exist_ok=True)
    write_tensors(tensors, folder, safe=safe)
    plain = json.loads((GOLDEN / "config.json").read_text())
    for key in ("train_mask_decoder", "out_dim", "architectures"):
        plain.pop(key)
    wrong_ids = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        "vocab_size": PIECES,
    }  # as in published bases
    (folder / "config.json").write_text(json.dumps(config or plain | wrong_ids))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, folder / name)
    if clip:
        shutil.copytree(GOLDEN / "clip", folder / "clip", dirs_exist_ok=True)
    return folder


def write_sam(file: Path, published: dict[str, Tensor]) -> Path:
    """A `sam_vit_*.pth` with the mask head of a published checkpoint: upstream's names, a pickle of tensors."""
    prefix = "model.visual_model."
    torch.save({n.removeprefix(prefix): t for n, t in published.items() if n.startswith(prefix)}, file)
    return file
