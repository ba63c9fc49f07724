"""Causal attention with a mask on a CPU, in strips of queries.

torch's CPU kernel for `scaled_dot_product_attention` computes every score and then hides what the mask forbids; only
without a mask does it skip the half that lies in the future. Packed dialogues need a mask
(`model/vlm/prefix_packing.py`). So the queries are cut into strips, each of which is given the keys up to its last
position: five eighths of the scores with four strips. Values and gradients are the same up to rounding, and nothing
more is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STRIPS = "causal_strips"  # the name of `attend` among transformers' attention functions
STRIP = 192  # positions, about; shorter ones leave the kernel too little to do at once


def of_language(attention: str) -> str:
    """The implementation for a causal language model where `attention` is asked for: strips instead of sdpa, from which
    they differ on a CPU only."""
    return STRIPS if attention == "sdpa" else attention


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' sdpa: query (R, H, L, d), key and value (R, h, K, d), attention_mask (R, 1, L, K) ->
    (R, L, H, d)."""
    length = query.shape[2]
    causal = query.device.type == "cpu" and attention_mask is not None and length == key.shape[2]
    strips = length // STRIP if causal and getattr(module, "is_causal", False) else 1
    if strips < 2 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    ends = [length * (strip + 1) // strips for strip in range(strips)]
    outputs = [
        sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, :end], value[:, :, :end], attention_mask[:, :, start:end, :end],
            **options,
        )[0]
        for start, end in zip([0, *ends], ends, strict=False)
    ]  # fmt: skip
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(STRIPS, attend)
AttentionMaskInterface.register(STRIPS, sdpa_mask)
