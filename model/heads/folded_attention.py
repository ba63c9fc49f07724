"""Attention between a picture and a few prompts, without projecting the picture: less than half of SAM's decoding.

A picture of N = 4096 cells meets T = 6 prompts. The projections of the picture's side are multiplied into the prompts'
side (H heads make H * T vectors of it) and the sums are the same up to rounding. Training goes as released.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamAttention, SamTwoWayTransformer


class FoldedCrossAttention(SamAttention):
    """With the weights and the interface of SamAttention: (Q, 1, T or N, C) query, (Q, 1, N or T, C) key and value."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_similarity=None, **kwargs: Any) -> tuple:
        if torch.is_grad_enabled() or attention_similarity is not None:
            return super().forward(query, key, value, attention_similarity, **kwargs)
        ask = self._to_picture if query.shape[2] < key.shape[2] else self._from_picture
        return ask(query[:, 0], key[:, 0], value[:, 0])[:, None], None

    def _to_picture(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """T prompts look at N cells. The keys' bias adds the same to all scores of a prompt, so it has no effect."""
        folded = self._heads(self.q_proj(query) * self.scaling) @ self._rows(self.k_proj)  # (Q, H, T, C)
        weights = (folded.flatten(1, 2) @ key.mT).float().softmax(-1).to(value.dtype)  # (Q, H * T, N)
        seen = (weights @ value).view(folded.shape) @ self._rows(self.v_proj).mT  # (Q, H, T, D)
        return self.out_proj(seen.transpose(1, 2).flatten(2) + self.v_proj.bias)

    def _from_picture(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """N cells look at T prompts."""
        key, value = self._heads(self.k_proj(key) * self.scaling), self._heads(self.v_proj(value))  # (Q, H, T, D)
        folded = key @ self._rows(self.q_proj)  # (Q, H, T, C)
        offset = key @ self.q_proj.bias.view(self.num_attention_heads, -1, 1)  # (Q, H, T, 1)
        scores = torch.baddbmm(offset.flatten(1, 2), folded.flatten(1, 2), query.mT)  # (Q, H * T, N)
        weights = scores.float().unflatten(1, folded.shape[1:3]).softmax(2).to(value.dtype).flatten(1, 2)
        drawn = value @ self.out_proj.weight.T.unflatten(0, (self.num_attention_heads, -1))  # (Q, H, T, C)
        return torch.baddbmm(self.out_proj.bias, weights.mT, drawn.flatten(1, 2))

    def _rows(self, linear: nn.Linear) -> Tensor:
        """A projection's (H * D, C) weight as (H, D, C)."""
        return linear.weight.unflatten(0, (self.num_attention_heads, -1))

    def _heads(self, values: Tensor) -> Tensor:
        """(Q, T, H * D) to (Q, H, T, D)."""
        return values.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)


def use_folded_attention(transformer: SamTwoWayTransformer) -> SamTwoWayTransformer:
    """Its attention between picture and prompts replaced; to be called before weights are loaded."""
    for layer in transformer.layers:
        layer.cross_attn_token_to_image = FoldedCrossAttention(transformer.config)
        layer.cross_attn_image_to_token = FoldedCrossAttention(transformer.config)
    transformer.final_attn_token_to_image = FoldedCrossAttention(transformer.config)
    return transformer
