"""Both rewritten attentions of SAM against the stock ones: equal up to rounding, and smaller."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SamMaskDecoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamAttention,
    SamTwoWayTransformer,
    SamVisionEncoder,
    SamVisionSdpaAttention,
)

from model.heads.sam_attention import (
    ChunkedGlobalAttention,
    FoldedCrossAttention,
    use_chunked_attention,
    use_folded_attention,
)


def encoder(kind: str = "sdpa") -> SamVisionEncoder:
    config = SamVisionConfig(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=4,
        mlp_dim=16,
        window_size=5,
        global_attn_indexes=[1],
        num_pos_feats=4,
    )
    config._attn_implementation = kind
    torch.manual_seed(0)
    made = SamVisionEncoder(config).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


@pytest.mark.parametrize("elements", [1, 2 * 2 * 5 * 12 * 144, 2**30])
def test_strips_give_what_the_whole_gives(monkeypatch, elements):
    """One row at a time, five and a rest, all at once."""
    monkeypatch.setattr("model.heads.sam_attention.CPU_CHUNK", elements)
    whole, strips = encoder(), encoder()
    use_chunked_attention(strips)
    assert [type(layer.attn) for layer in strips.layers] == [SamVisionSdpaAttention, ChunkedGlobalAttention]
    strips.load_state_dict(whole.state_dict())
    calls = []
    draw = ChunkedGlobalAttention._attend
    monkeypatch.setattr(
        ChunkedGlobalAttention, "_attend", staticmethod(lambda *a: calls.append(a[0].shape[2]) or draw(*a))
    )
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            strips(pixels).last_hidden_state, whole(pixels).last_hidden_state, atol=1e-6, rtol=1e-5
        )
    assert calls == {1: [1] * 12, 2**30: [12]}.get(elements, [5, 5, 2])


class Sizes(TorchDispatchMode):
    """Elements of the tensors that come out of operations."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        return result


def test_the_bias_never_exists_whole(monkeypatch):
    scores, largest = 2 * 144 * 144, []
    monkeypatch.setattr("model.heads.sam_attention.CPU_CHUNK", 1)
    for strips in (False, True):
        made = encoder()
        if strips:
            use_chunked_attention(made)
        with torch.no_grad(), Sizes() as sizes:
            made(torch.randn(1, 3, 48, 48))
        largest.append(max(sizes.seen))
    assert largest[1] < scores <= largest[0]


def test_eager_attention_stays_as_it_is():
    made = encoder("eager")
    use_chunked_attention(made)
    assert not any(isinstance(layer.attn, ChunkedGlobalAttention) for layer in made.layers)


CONFIG = SamMaskDecoderConfig(hidden_size=32, mlp_dim=16, num_attention_heads=4)


def initialised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    return module


@pytest.mark.parametrize(("asking", "asked"), [(6, 40), (40, 6), (6, 6)])
def test_both_directions_equal_the_released_attention(asking, asked):
    released = initialised(SamAttention(CONFIG))
    folded = FoldedCrossAttention(CONFIG)
    folded.load_state_dict(released.state_dict())
    inputs = [torch.randn(3, 1, size, 32, requires_grad=True) for size in (asking, asked, asked)]
    with torch.no_grad():
        expected, got = released(*inputs)[0], folded(*inputs)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((made(*inputs)[0] * weights).sum(), [*inputs, *made.parameters()])
        for made in (released, folded)
    ]
    for one, other in zip(*gradients, strict=True):  # every weight has a gradient
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_a_whole_transformer_keeps_its_names_and_its_results():
    released, folded = initialised(SamTwoWayTransformer(CONFIG)), use_folded_attention(SamTwoWayTransformer(CONFIG))
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
