"""A tiny real assistant and a tiny real dataset for the tests of evaluation and chat."""

from __future__ import annotations

from pathlib import Path

from data.tokens import mask_ids
from systems.assistant import Assistant, load
from tests.records import OWN
from toy.world import __main__ as make_toy_dataset

CLASSES = "toy_classes/{source}.txt"
ON_PHOTOGRAPHS = {
    "camvid",
    "coco_photographs",
    "real_mini_qwen3_vl",
}  # recipes whose heads and classes do not fit the toy world


def tiny(system: str, *, eager: float = 0.0) -> Assistant:
    """Random published-format weights. eager: how much louder the first mask token is, so that masks are written."""
    assistant = load(OWN / system, device="cpu", model={"vision_tower": str(OWN / system / "clip")})
    if eager:
        token = mask_ids(assistant.tokenizer, assistant.system.tokens)[0]
        assistant.model.vlm.language.lm_head.weight.data[token] *= eager
    return assistant


def toy_world(folder: Path, *layouts: str, images: int = 8, val_images: int = 3) -> Path:
    counts = ["--images", str(images), "--val_images", str(val_images)]
    assert make_toy_dataset.main([str(folder), *counts, "--only", *layouts]) == 0
    return folder
