"""Attention that is quick on CPUs with bf16 products: plain products and softmax, causal by blocks."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import SamModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.modeling_sam import SamVisionAttention

CAUSAL_BLOCKS = 2  # of the causal triangle; more waste less of it and cost more calls
MASKED = -1e4
IMPLEMENTATION = "toybase"


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, heads, Q, d) over (B, heads, K, d), with a mask (B, Q, K) added to the scores."""
    scores = query * scale @ key.transpose(2, 3)
    if mask is not None:
        scores.add_(mask[:, None])
    return scores.softmax(-1) @ value


def dialogue_mask(group: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, L), 0 where a position may look: backwards, at the opening (group 0) and at its own group (B, L)."""
    seen = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
    hidden = ~seen.tril()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, MASKED)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
):
    """The transformers signature; a mask, where there is one, is a `dialogue_mask`."""
    if attention_mask is None:
        return attend(query, key, value, scaling).transpose(1, 2), None
    length = query.shape[2]
    edges = [length * i // CAUSAL_BLOCKS for i in range(CAUSAL_BLOCKS + 1)]
    rows = [
        attend(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], scaling, attention_mask[:, start:stop, :stop]
        )
        for start, stop in pairwise(edges)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _interface)


class FoldedSamAttention(SamVisionAttention):
    """SAM's attention with its relative positions folded into one product: [q, q.Rh, q.Rw] x [k, row, column]."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        batch, height, width, _ = hidden_states.shape
        heads, count = self.num_attention_heads, height * width
        qkv = self.qkv(hidden_states).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * heads, count, -1).unbind(0)
        grid = query.view(batch * heads, height, width, -1)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, self.get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bhwc,wkc->bhwk", grid, self.get_rel_pos(width, width, self.rel_pos_w))
        query = torch.cat([query * self.scale, rows.reshape(-1, count, height), columns.reshape(-1, count, width)], -1)
        row_code = torch.eye(height, dtype=key.dtype).repeat_interleave(width, 0)
        column_code = torch.eye(width, dtype=key.dtype).repeat(height, 1)
        codes = torch.cat([row_code, column_code], -1).expand(len(key), -1, -1)
        scores = torch.bmm(query, torch.cat([key, codes], -1).transpose(1, 2))
        mixed = torch.bmm(scores.softmax(-1), value).view(batch, heads, height, width, -1)
        return self.proj(mixed.permute(0, 2, 3, 1, 4).reshape(batch, height, width, -1)), None


def use_folded_attention(model: SamModel) -> None:
    """Let the attentions of `model` compute the quick way; weights and results stay the same."""
    for module in model.modules():
        if isinstance(module, SamVisionAttention):
            module.__class__ = FoldedSamAttention
    model.mask_decoder.config._attn_implementation = IMPLEMENTATION
