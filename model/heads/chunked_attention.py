"""SAM's attention over the whole picture, some rows of queries at a time.

Its bias by relative position is as large as all scores, 4096 x 4096 a head at 1024 pixels, and copied on the way. In
strips it never exists whole and, on a CPU, stays in the cache. The result is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionSdpaAttention

CPU_STRIP, GPU_STRIP = 2**21, 2**26  # elements of the bias at once


class ChunkedGlobalAttention(SamVisionSdpaAttention):
    """`SamVisionSdpaAttention` with the same weights."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        """(B, h, w, C) to the same shape; attention weights are never given."""
        batch, height, width, _ = hidden_states.shape
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.num_attention_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query, key, value = heads.contiguous()  # each (B, heads, h, w, D)
        across = self.get_rel_pos(height, height, self.rel_pos_h), self.get_rel_pos(width, width, self.rel_pos_w)
        limit = CPU_STRIP if query.device.type == "cpu" else GPU_STRIP
        rows = max(1, limit * height // (query[..., 0].numel() * height * width))
        strips = zip(query.split(rows, 2), across[0].split(rows), strict=True)
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        drawn = [self._attend(strip, key, value, far, across[1]) for strip, far in strips]
        joined = torch.cat(drawn, dim=2).transpose(1, 2)  # (B, h * w, heads, D)
        return self.proj(joined.reshape(batch, height, width, -1)), None

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, heads, s, w, D) queries to (B, heads, s * w, D); relative positions (s, h, D) and (w, w, D)."""
        vertical = torch.einsum("bnhwc,hkc->bnhwk", query, rows)
        horizontal = torch.einsum("bnhwc,wkc->bnhwk", query, columns)
        bias = (vertical[..., :, None] + horizontal[..., None, :]).flatten(2, 3).flatten(3)
        return F.scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=bias)


def use_chunked_attention(encoder: SamVisionEncoder) -> SamVisionEncoder:
    """Puts StripAttention into the layers that look at the whole picture. Before any weights are there."""
    for layer in encoder.layers:
        if layer.window_size == 0 and isinstance(layer.attn, SamVisionSdpaAttention):
            layer.attn = ChunkedGlobalAttention(encoder.config, 0)
    return encoder
