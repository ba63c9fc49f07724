"""Causal attention in strips: the values and gradients of sdpa, and only where the future is hidden anyway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.vlm import causal_strips
from model.vlm.causal_strips import STRIP, attend


def layer(heads: int, key_heads: int, *, causal: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_causal=causal, num_key_value_groups=heads // key_heads)


def inputs(length: int, heads: int, key_heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and the mask of packed dialogues: each sees what all share and what is before it in its own."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, number, length, 8, dtype=torch.float64) for number in (heads, key_heads, key_heads)]
    dialogue = torch.tensor([0, 1, 2]).repeat_interleave(length // 3 + 1)[:length]
    visible = (dialogue[:, None] == dialogue) | (dialogue == 0)
    return [tensor.requires_grad_() for tensor in tensors], visible.tril().expand(2, 1, -1, -1)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("length", [2 * STRIP, 3 * STRIP + 17])
def test_values_and_gradients_are_those_of_sdpa(length, key_heads, monkeypatch):
    tensors, mask = inputs(length, 4, key_heads)
    expected, _ = sdpa_attention_forward(layer(4, key_heads), *tensors, mask, scaling=0.3)
    calls: list[Any] = []

    def watched(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return sdpa_attention_forward(*given, **options)

    monkeypatch.setattr(causal_strips, "sdpa_attention_forward", watched)
    got, _ = attend(layer(4, key_heads), *tensors, mask, scaling=0.3)
    assert len(calls) == length // STRIP
    scores = [call[1].shape[2] * call[2].shape[2] for call in calls]  # queries by keys
    assert sum(scores) <= 0.76 * length**2
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((values * weights).sum(), tensors) for values in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_to_later_positions_is_left_alone():
    """Of a layer that is not causal, as in a vision tower."""
    tensors, _ = inputs(2 * STRIP, 4, 4)
    everything = torch.ones(2, 1, 2 * STRIP, 2 * STRIP, dtype=torch.bool)
    module = layer(4, 4, causal=False)
    expected, _ = sdpa_attention_forward(module, *tensors, everything)
    assert torch.equal(attend(module, *tensors, everything)[0], expected)


@pytest.mark.parametrize("mask", ["none", "cached"])
def test_without_a_mask_or_with_a_cache_it_is_sdpa(mask):
    tensors, visible = inputs(2 * STRIP, 4, 4)
    if mask == "cached":  # the last positions see the keys of all before them
        tensors[0] = tensors[0][:, :, -STRIP - 1 :]
        visible = visible[:, :, -STRIP - 1 :]
    given = None if mask == "none" else visible
    expected, _ = sdpa_attention_forward(layer(4, 4), *tensors, given)
    assert torch.equal(attend(layer(4, 4), *tensors, given)[0], expected)
