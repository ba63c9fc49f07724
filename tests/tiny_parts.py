"""Backbones and mask heads as folders and files, with random weights, small enough for milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from model.checkpoints.files import read_tensors
from tests.tiny_base import GOLDEN, base_tensors, write_base, write_sam
from tests.tiny_internvl import write_internvl
from tests.tiny_qwen import FAMILIES, stock_model
from tests.tiny_sam2 import SIDES, stock
from tests.tiny_words import tiny_qwen_tokenizer


def write_llava(folder: Path) -> dict[str, Any]:
    published = {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}
    return {"version": str(write_base(folder, base_tensors(published))), "vision_tower": str(GOLDEN / "clip")}


def write_qwen(folder: Path, family: str) -> dict[str, Any]:
    size = tiny_qwen_tokenizer(folder, version=3 if family == "qwen3_vl" else 2)
    stock_model(family, tied=True, vocab_size=size + 9, max_position_embeddings=4096).save_pretrained(folder)
    return {"version": str(folder), "vision_tower": None, "tower": {"min_pixels": 384, "max_pixels": 1280}}


def write_sam2(folder: Path, name: str) -> dict[str, Any]:
    stock(name).save_pretrained(folder)
    return {"vision_pretrained": str(folder), "image_size": SIDES[name]}


def write_sam1(folder: Path) -> dict[str, Any]:
    file = write_sam(folder.with_suffix(".pth"), read_tensors(GOLDEN))
    return {"vision_pretrained": str(file), "head_options": {"decoder_heads": 4}}


BASES: dict[str, Callable[[Path], dict[str, Any]]] = {"llava": write_llava, "internvl": write_internvl}
BASES |= {family: partial(write_qwen, family=family) for family in FAMILIES}
PIXEL = {"tower": {"pad": True}, "head_options": {"levels": [-2], "width": 32, "mlp_dim": 64}}
WEIGHTS: dict[str, Callable[[Path], dict[str, Any]]] = {"sam": write_sam1, "pixel": lambda _: PIXEL}
WEIGHTS |= {name: partial(write_sam2, name=name) for name in SIDES}


class Parts:
    """The section of a recipe about a backbone and a mask head, whose weights are written when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict[str, dict[str, Any]] = {}

    def __call__(self, backbone: str, head: str) -> dict[str, Any]:
        for name, write in ((backbone, BASES[backbone]), (head, WEIGHTS[head])):
            if name not in self.made:
                self.made[name] = write(self.folder / name)
        return {"mask_head": head, **self.made[backbone], **self.made[head]}
