"""Random weights for recipes that train from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import SamModel

from toy.base import blank as make_blank_base
from toy.base.sam import reset_sam
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def prompt_dependence(sam: SamModel) -> float:
    """How much the logits of a cell differ between prompts, as a share of how much they differ between cells."""
    torch.manual_seed(1)
    prompts = 0.1 * torch.randn(1, 8, 1, 128)  # as different as those of an untrained text MLP
    image = torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        logits, _ = sam.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=torch.zeros(1, 128, 1, 1),
            multimask_output=False,
        )
    masks = logits[0, :, 0].flatten(1)
    return float(masks.std(0).mean() / masks.std(1).mean())


def test_masks_depend_on_the_prompt_from_the_first_step():
    torch.manual_seed(0)
    sam = make_blank_base.blank_sam()
    assert prompt_dependence(sam) > 0.5
    reset_sam(sam)  # torch's own weights, as a control
    assert prompt_dependence(sam) < 0.1


def test_the_same_seed_gives_the_same_files_and_the_recipe_knows_their_heads(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert make_blank_base.main([str(tmp_path / name), "--seed", seed]) == 0
    files = [sorted((tmp_path / name).rglob("*.safetensors")) for name in "abc"]
    same, other = ([[load_file(file) for file in found] for found in pair] for pair in (files[:2], files[::2]))
    assert len(files[0]) == 2
    assert all(torch.equal(one[key], two[key]) for one, two in zip(*same, strict=True) for key in one)
    assert any(not torch.equal(one[key], two[key]) for one, two in zip(*other, strict=True) for key in one)
    heads = make_blank_base.blank_sam().mask_decoder.config.num_attention_heads
    assert load_recipe(ROOT / "configs/real_mini.yaml").model.head_options["decoder_heads"] == heads
