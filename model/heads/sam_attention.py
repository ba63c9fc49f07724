"""The two expensive attentions of SAM 1 to 3, computed differently with the same weights and results.

`ChunkedGlobalAttention`: the attention of SAM's image encoder over the whole image. Its relative-position bias is as
large as all scores, 4096 x 4096 per head at 1024 pixels. In chunks of query rows it never exists in full and, on a CPU,
stays in the cache.

`FoldedCrossAttention`: the mask decoder's attention between an image of N = 4096 cells and T = 6 prompt tokens, without
projecting the image: less than half of SAM's decoding time. Since (W_q q) . (W_k k) = (W_k^T W_q q) . k, the projection
of the image side is multiplied into the prompt side, H * T vectors for H heads, and the sums are the same up to
rounding.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamAttention, SamVisionEncoder, SamVisionSdpaAttention
from transformers.models.sam2.modeling_sam2 import Sam2Attention
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerAttention

CPU_CHUNK, GPU_CHUNK = 2**21, 2**26  # elements of the bias at once


class ChunkedGlobalAttention(SamVisionSdpaAttention):
    """`SamVisionSdpaAttention` with the same weights."""

    def forward(  # ty: ignore[incompatible-method-override]  (the parent names the attention weights, never returned)
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, None]:
        """(B, h, w, C) -> the same shape; attention weights are never returned."""
        batch, height, width, _ = hidden_states.shape
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.num_attention_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query, key, value = heads.contiguous()  # each (B, heads, h, w, D)
        rows_bias = self.get_rel_pos(height, height, self.rel_pos_h)  # (h, h, D)
        columns_bias = self.get_rel_pos(width, width, self.rel_pos_w)  # (w, w, D)
        limit = CPU_CHUNK if query.device.type == "cpu" else GPU_CHUNK
        rows = max(1, limit * height // (query[..., 0].numel() * height * width))
        chunks = zip(query.split(rows, 2), rows_bias.split(rows), strict=True)
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        outputs = [self._attend(chunk, key, value, bias, columns_bias) for chunk, bias in chunks]
        output = torch.cat(outputs, dim=2).transpose(1, 2)  # (B, h * w, heads, D)
        return self.proj(output.reshape(batch, height, width, -1)), None

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, heads, s, w, D) queries -> (B, heads, s * w, D); relative positions (s, h, D) and (w, w, D)."""
        vertical = torch.einsum("bnhwc,hkc->bnhwk", query, rows)
        horizontal = torch.einsum("bnhwc,wkc->bnhwk", query, columns)
        bias = (vertical[..., :, None] + horizontal[..., None, :]).flatten(2, 3).flatten(3)
        return F.scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=bias)


def use_chunked_attention(encoder: SamVisionEncoder) -> SamVisionEncoder:
    """Replaces the attention of the layers that see the whole image; to be called before weights are loaded."""
    for layer in encoder.layers:
        if layer.window_size == 0 and isinstance(layer.attn, SamVisionSdpaAttention):
            layer.attn = ChunkedGlobalAttention(encoder.config, 0)
    return encoder


class Folded(nn.Module):
    """With the weights and the interface of the class it is mixed into, a `SamAttention` or its like in SAM 2 and 3:
    (Q, 1, T or N, C) query, (Q, 1, N or T, C) key and value. Cells that all Q prompts share may stand there once,
    (1, 1, N, C): a batch of small products becomes one."""

    OUTPUT: ClassVar[str]  # the name of the last projection
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_attention_heads: int
    scaling: float

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_similarity: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if attention_similarity is not None:
            return super().forward(query, key, value, attention_similarity, **kwargs)
        attend = self._prompts_to_image if query.shape[2] < key.shape[2] else self._image_to_prompts
        return attend(query[:, 0], key[:, 0], value[:, 0])[:, None], None

    def _prompts_to_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """T prompts attend to N cells. The bias of the keys adds the same to all scores of a prompt, and softmax does
        not see it; the bias of the values passes through, because attention weights sum to one."""
        heads = self._heads(self.q_proj(query) * self.scaling)  # (Q, H, T, D)
        folded = heads @ self._rows(self.k_proj)  # (Q, H, T, C)
        scores = folded.flatten(1, 2) @ _once(key).mT  # (Q, H * T, N)
        if torch.is_grad_enabled():  # the bias of the keys stays in the graph: every trained weight has a gradient
            scores = scores + (heads @ self.k_proj.bias.view(self.num_attention_heads, -1, 1)).flatten(1, 2)
        weights = scores.float().softmax(-1).to(value.dtype)
        output = (weights @ _once(value)).view(folded.shape) @ self._rows(self.v_proj).mT  # (Q, H, T, D)
        return self.output(output.transpose(1, 2).flatten(2) + self.v_proj.bias)

    def _image_to_prompts(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """N cells attend to T prompts. Here the bias of the queries does count: it differs between keys. That of the
        output is added to the few prompts, by parts, because the weights of a head sum to one."""
        key, value = self._heads(self.k_proj(key) * self.scaling), self._heads(self.v_proj(value))  # (Q, H, T, D)
        folded = key @ self._rows(self.q_proj)  # (Q, H, T, C)
        offset = key @ self.q_proj.bias.view(self.num_attention_heads, -1, 1)  # (Q, H, T, 1)
        scores = folded.flatten(1, 2) @ _once(query).mT + offset.flatten(1, 2)  # (Q, H * T, N)
        weights = scores.float().unflatten(1, folded.shape[1:3]).softmax(2).to(value.dtype).flatten(1, 2)
        projected = value @ self.output.weight.T.unflatten(0, (self.num_attention_heads, -1))  # (Q, H, T, C)
        return weights.mT @ (projected + self.output.bias / self.num_attention_heads).flatten(1, 2)

    @property
    def output(self) -> nn.Linear:
        return cast(nn.Linear, self.get_submodule(self.OUTPUT))

    def _rows(self, linear: nn.Linear) -> Tensor:
        """A projection's (H * D, C) weight as (H, D, C)."""
        return linear.weight.unflatten(0, (self.num_attention_heads, -1))

    def _heads(self, values: Tensor) -> Tensor:
        """(Q, T, H * D) -> (Q, H, T, D)."""
        return values.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)


def _once(cells: Tensor) -> Tensor:
    """(1, N, C) -> (N, C), which all rows of a product share; others as they are."""
    return cells[0] if len(cells) == 1 else cells


class FoldedCrossAttention(Folded, SamAttention):
    OUTPUT = "out_proj"


class FoldedSam2Attention(Folded, Sam2Attention):
    OUTPUT = "o_proj"


class FoldedSam3Attention(Folded, Sam3TrackerAttention):
    OUTPUT = "o_proj"


FOLDED: dict[type, Any] = {
    SamAttention: FoldedCrossAttention,
    Sam2Attention: FoldedSam2Attention,
    Sam3TrackerAttention: FoldedSam3Attention,
}


def use_folded_attention(transformer: Any) -> Any:
    """Replaces the attention between image and prompts in the mask decoder's transformer of SAM 1, 2 or 3; to be called
    before weights are loaded."""
    folded = FOLDED[type(transformer.final_attn_token_to_image)]
    for layer in transformer.layers:
        layer.cross_attn_token_to_image = folded(transformer.config)
        layer.cross_attn_image_to_token = folded(transformer.config)
    transformer.final_attn_token_to_image = folded(transformer.config)
    return transformer
