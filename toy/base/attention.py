"""Attention that is fast on CPUs with bf16 instructions: plain matrix products and softmax, causal in blocks."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import SamModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.modeling_sam import SamVisionAttention

CAUSAL_BLOCKS = 2  # query blocks; with n of them (n - 1) / 2n of the scores are never computed, for n times the calls
MASKED = -1e4  # added to the scores of hidden positions; finite, so that bf16 holds it and padding rows stay defined
IMPLEMENTATION = "toybase"  # the name under which transformers finds this attention


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, heads, Q, d) over (B, heads, K, d), with a mask (B, Q, K) added to the scores."""
    scores = query * scale @ key.transpose(2, 3)
    if mask is not None:
        scores.add_(mask[:, None])
    return scores.softmax(-1) @ value


def dialogue_mask(group: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, L) additive mask: 0 where a position may attend, MASKED elsewhere.

    A position attends backwards to the opening (group 0) and to its own dialogue. With group [0, 0, 1, 1, 2], the last
    position sees the opening and itself, not the dialogue before it.
    """
    visible = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
    hidden = ~visible.tril()
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
    """The signature that transformers calls; `attention_mask` is None or a `dialogue_mask`."""
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
    """SAM's attention with its relative positions folded into one product.

    The score of positions i and j is q_i.k_j + q_i.Rh[row_i, row_j] + q_i.Rw[column_i, column_j]. Appending
    q_i.Rh[row_i] and q_i.Rw[column_i] to the query, and one-hot codes of row_j and column_j to the key, gives the same
    sum as one matrix product.
    """

    def forward(  # ty: ignore[incompatible-method-override]  # no attention weights, as in the SDPA form
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
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
    """Switch all attention of `model` to the fast forms; weights and results stay the same."""
    for module in model.modules():
        if isinstance(module, SamVisionAttention):
            module.__class__ = FoldedSamAttention
    model.mask_decoder.config._attn_implementation = IMPLEMENTATION
