"""The mask decoders of SAM 1, 2 and 3 on cells: the weights of transformers' classes in fewer passes over the image.

Every mask has its own copy of its image's embedding, so time goes into passes over Q x N x C values, of N = 4096 cells
of width C = 256 as released. Here the image stays a sequence of cells from its embedding to the logits
(`model/heads/doubling.py`), positions are added once per layer instead of twice, and of SAM's mask tokens only those
that are asked for become masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from model.heads.doubling import Doubling, to_image
from model.heads.sam_attention import use_folded_attention


def attend_both_ways(transformer: Any, tokens: Tensor, cells: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two-way transformer of SAM's mask decoder: (Q, T, C) tokens, (Q or 1, N, C) cells and their positions,
    (1, N, C), -> (Q, T, C) tokens and (Q, N, C) cells as attention between them has changed them."""
    tokens, cells, positions = tokens[:, None], cells[:, None], positions[:, None]  # the layers' dimension of points
    states = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            states = layer.self_attn(query=states, key=states, value=states)[0]
        else:
            placed = states + tokens
            states = states + layer.self_attn(query=placed, key=placed, value=states)[0]
        states = layer.layer_norm1(states)
        placed_cells = cells + positions
        seen = layer.cross_attn_token_to_image(query=states + tokens, key=placed_cells, value=cells)[0]
        states = layer.layer_norm2(states + seen)
        states = layer.layer_norm3(states + layer.mlp(states))
        told = layer.cross_attn_image_to_token(query=placed_cells, key=states + tokens, value=states)[0]
        cells = layer.layer_norm4(cells + told)
    seen = transformer.final_attn_token_to_image(query=states + tokens, key=cells + positions, value=cells)[0]
    return transformer.layer_norm_final_attn(states + seen)[:, 0], cells[:, 0]


def of_queries(cells: Tensor, query_image: Tensor) -> Tensor:
    """(B, N, ...) cells -> (Q, N, ...), or of a single image (1, N, ...): up to the first layer that changes them, its
    queries share them."""
    return cells if len(cells) == 1 else cells[query_image]


class CellDecoder(nn.Module):
    """The parts of a mask decoder of transformers under their names, to be given new or random weights."""

    OWN: ClassVar[tuple[str, ...]]  # the embeddings that are the decoder's own tokens, in front of the prompts
    transformer: Any
    upscale_conv1: Any
    upscale_conv2: Any
    upscale_layer_norm: Any
    activation: Any
    output_hypernetworks_mlps: Any
    iou_prediction_head: Any
    pred_obj_score_head: Any  # of SAM 2 and 3

    def __init__(self, released: Any):
        super().__init__()
        self.hidden_size: int = released.hidden_size
        for name, part in released.named_children():
            self.add_module(name, part)
        use_folded_attention(self.transformer)
        for conv in (self.upscale_conv1, self.upscale_conv2):
            conv.__class__ = Doubling
        self.upscale_layer_norm.data_format = "channels_last"

    def decode(
        self,
        cells: Tensor,
        positions: Tensor,
        prompts: Tensor,
        size: tuple[int, int],
        chosen: Sequence[int],
        fine: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Cells with the dense prompt, (Q or 1, h * w, C), their positions, (1, h * w, C), and (Q, T, C) prompts ->
        (Q, M, 4h, 4w) logits of the M chosen mask tokens, and the states of all tokens, (Q, ..., C), the decoder's own
        first.

        fine: what SAM 2 and 3 add after the first doubling, (Q, h * w, 4, C / 4), and after the second,
        (Q, h * w, 4, 4, C / 8).
        """
        own = torch.cat([cast(nn.Embedding, self.get_submodule(name)).weight for name in self.OWN])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)
        states, cells = attend_both_ways(self.transformer, tokens, cells, positions)
        parts = self.upscale_conv1(cells)
        if fine:
            parts = parts + fine[0]
        parts = self.upscale_conv2(self.activation(self.upscale_layer_norm(parts)))  # (Q, h * w, 4, 4, C / 8)
        if fine:
            parts = parts + fine[1]
        first = self.OWN.index("mask_tokens")
        kernels = [self.output_hypernetworks_mlps[token](states[:, first + token]) for token in chosen]
        logits = self.activation(parts).flatten(1, 3) @ torch.stack(kernels, dim=-1)
        return to_image(logits.unflatten(1, parts.shape[1:4]), *size), states


class SamCellDecoder(CellDecoder):
    OWN = ("iou_token", "mask_tokens")

    def forward(self, cells: Tensor, positions: Tensor, prompts: Tensor, size: tuple[int, int]) -> Tensor:
        """(Q, 4h, 4w) logits of the first of SAM's four mask tokens: the single-mask output, as released."""
        return self.decode(cells, positions, prompts, size, [0])[0][:, 0]


class Sam2CellDecoder(CellDecoder):
    """SAM 2's, and that of SAM 3's tracker."""

    OWN = ("obj_score_token", "iou_token", "mask_tokens")

    def forward(
        self,
        cells: Tensor,
        positions: Tensor,
        prompts: Tensor,
        size: tuple[int, int],
        several: bool,
        fine: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, M, 4h, 4w) logits, (Q, M) estimates of their IoU and (Q,) logits of the object's presence. several: of
        the three mask tokens for ambiguous prompts instead of the single-mask one."""
        chosen = range(1, len(self.output_hypernetworks_mlps)) if several else [0]
        logits, states = self.decode(cells, positions, prompts, size, chosen, fine)
        iou = self.iou_prediction_head(states[:, 1])[:, list(chosen)]
        return logits, iou, self.pred_obj_score_head(states[:, :1])[:, 0, 0]
