"""Folding a picture's projections into the prompts changes nothing but rounding, whichever side asks."""

from __future__ import annotations

import pytest
import torch
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamAttention, SamTwoWayTransformer

from model.heads.folded_attention import FoldedCrossAttention, use_folded_attention

CONFIG = SamMaskDecoderConfig(hidden_size=32, mlp_dim=16, num_attention_heads=4)


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    return module


@pytest.mark.parametrize(("asking", "asked"), [(6, 40), (40, 6), (6, 6)])
def test_both_directions_equal_the_released_attention(asking, asked):
    released = drawn(SamAttention(CONFIG))
    folded = FoldedCrossAttention(CONFIG)
    folded.load_state_dict(released.state_dict())
    query, key, value = torch.randn(3, 1, asking, 32), torch.randn(3, 1, asked, 32), torch.randn(3, 1, asked, 32)
    with torch.no_grad():
        expected, got = released(query, key, value)[0], folded(query, key, value)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    folded(query, key, value)[0].sum().backward()  # training takes the released path
    assert folded.k_proj.bias.grad is not None


def test_a_whole_transformer_keeps_its_names_and_its_results():
    released, folded = drawn(SamTwoWayTransformer(CONFIG)), use_folded_attention(SamTwoWayTransformer(CONFIG))
    folded.load_state_dict(released.state_dict())
    given = {
        "point_embeddings": torch.randn(2, 1, 6, 32),
        "image_embeddings": torch.randn(2, 32, 8, 8),
        "image_positional_embeddings": torch.randn(2, 32, 8, 8),
        "attention_similarity": None,
    }
    with torch.no_grad():
        for one, other in zip(released(**given), folded(**given), strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
