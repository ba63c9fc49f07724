"""Random weights for recipes that train from scratch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Sam2Model

from data.tokens import load_tokenizer
from model.checkpoints.load import build_model
from systems.base import build_system
from tests.tiny_run import start, train_log
from toy.base import blank as make_blank_base
from toy.base.blank_parts import blank_sam
from toy.base.blank_qwen import blank_sam2
from toy.base.sam import reset_sam
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("REAL_DIR") or "real")


def prompt_dependence(sam: Any) -> float:
    """How much the logits of a cell differ between prompts, as a share of how much they differ between cells."""
    torch.manual_seed(1)
    prompts = 0.1 * torch.randn(1, 8, 1, 128)  # as different as those of an untrained text MLP
    image = torch.randn(1, 128, 16, 16)
    fine = [torch.randn(1, 16, 64, 64), torch.randn(1, 32, 32, 32)]  # of SAM 2's encoder, narrowed
    with torch.no_grad():
        logits, *_ = sam.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=torch.zeros(1, 128, 1, 1),
            multimask_output=False,
            **({"high_resolution_features": fine} if isinstance(sam, Sam2Model) else {}),
        )
    masks = logits[0, :, 0].flatten(1)
    return float(masks.std(0).mean() / masks.std(1).mean())


@pytest.mark.parametrize("blank", [blank_sam, blank_sam2])
def test_masks_depend_on_the_prompt_from_the_first_step(blank):
    torch.manual_seed(0)
    sam = blank()
    assert prompt_dependence(sam) > 0.5
    reset_sam(sam)  # torch's own weights, as a control
    assert prompt_dependence(sam) < 0.1


@pytest.mark.parametrize("backbone", make_blank_base.BACKBONES)
def test_the_same_seed_gives_the_same_files(tmp_path, backbone):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert make_blank_base.main([str(tmp_path / name), "--seed", seed, "--backbone", backbone]) == 0
    files = [sorted((tmp_path / name).rglob("*.safetensors")) for name in "abc"]
    same, other = ([[load_file(file) for file in found] for found in pair] for pair in (files[:2], files[::2]))
    assert len(files[0]) == 2
    assert all(torch.equal(one[key], two[key]) for one, two in zip(*same, strict=True) for key in one)
    assert any(not torch.equal(one[key], two[key]) for one, two in zip(*other, strict=True) for key in one)
    words = [sorted((tmp_path / name / backbone).glob("tokenizer*")) for name in "ab"]
    assert [file.read_bytes() for file in words[0]] == [file.read_bytes() for file in words[1]] != []


def test_the_recipe_knows_the_heads_of_the_decoder():
    heads = blank_sam().mask_decoder.config.num_attention_heads
    assert load_recipe(ROOT / "configs/real_mini.yaml").model.head_options["decoder_heads"] == heads


def test_the_recipe_builds_a_model_of_qwen3_vl_and_sam2(tmp_path):
    make_blank_base.main([str(tmp_path), "--backbone", "qwen3_vl"])
    parts = {"version": str(tmp_path / "qwen3_vl"), "vision_pretrained": str(tmp_path / "sam2")}
    recipe = load_recipe(ROOT / "configs/real_mini_qwen3_vl.yaml")
    spec = build_system(recipe.system, recipe.options).tokens
    tokenizer = load_tokenizer(parts["version"], spec)
    model = build_model(replace(recipe.model, **parts), spec, tokenizer)
    assert (model.architecture.vlm, model.architecture.head) == ("qwen3_vl", "sam2")
    assert model.report.missing == model.report.unexpected == []
    assert 40 <= model.vlm.view.tokens(480, 640) <= 64 and model.head.view.size == 256


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "coco").is_dir(), reason="photographs: set REAL_DIR to the folder that holds coco/")
def test_a_qwen3_vl_with_sam2_begins_to_fit_photographs(tmp_path):
    """The recipe of `scripts/real_mini.sh DATASET OUT qwen3_vl`, a fifth of its steps."""
    make_blank_base.main([str(tmp_path), "--backbone", "qwen3_vl"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/coco").symlink_to((REAL / "coco").resolve())  # the index is written next to it
    words = ["--dataset_dir", tmp_path / "data", "--log_base_dir", tmp_path, "--exp_name", "train", "--workers", "0"]
    words += ["--version", tmp_path / "qwen3_vl", "--vision_pretrained", tmp_path / "sam2", "--steps_per_epoch", "60"]
    start("train_ds.py", "--config", "configs/real_mini_qwen3_vl.yaml", *words, timeout=1800)
    first, *_, last = train_log(tmp_path / "train")
    assert last["ce"] < 0.1 * first["ce"], "which classes are there"
    assert last["dice"] < 0.8 * first["dice"], "and where"
    assert [file.name for file in (tmp_path / "train/pictures").iterdir()] == ["val_00000060.png"]
