"""Masks from tower features of several levels, coarse to fine: SAM's decoder design without SAM (pixellm.md 1.7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamTwoWayTransformer

from model.heads.doubling import Doubling, to_cells, to_image
from model.heads.sam_attention import use_folded_attention
from model.heads.sam_decoder import attend_both_ways

MASK_TOKENS = 4  # of which the first decodes; the others, and the score's, take part in attention only
NARROW = 8  # the features that a mask is decoded from have a width of 1 / NARROW


class PixelDecoder(nn.Module):
    """One two-way transformer per level; tokens, up-sampling and hyper-networks are shared by all levels.

    From the second level on, the features are twice as large (`grow`), and weighted by the mask of the level before.
    """

    def __init__(self, config: SamMaskDecoderConfig, levels: int):
        super().__init__()
        width = config.hidden_size
        self.transformer = nn.ModuleList(use_folded_attention(SamTwoWayTransformer(config)) for _ in range(levels))
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, width)
        self.level_embed = nn.Embedding(levels, width)
        self.grow = _double(width, width)
        self.upscale = _double(width, width // NARROW)
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamFeedForward(width, width, width // NARROW, 3) for _ in range(MASK_TOKENS)
        )
        self.iou_prediction_head = SamFeedForward(width, width, MASK_TOKENS, 3)  # in weight files; never used

    def enlarge(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return to_image(self.grow(to_cells(features)), *features.shape[-2:])

    def forward(
        self,
        level: int,
        cells: Tensor,
        positions: Tensor,
        size: tuple[int, int],
        dense: Tensor,
        prompts: Tensor,
        previous: Tensor | None,
    ) -> Tensor:
        """One level: (Q, h * w, C) cells and (1, h * w, C) positions of features of `size` (h, w), (C,) dense prompt,
        (Q, C) prompts, and previous, the (Q, h, w) logits of the level before, if any -> (Q, 2h, 2w) logits."""
        if previous is not None:
            # by 1 to 2: the previous mask directs attention but cannot erase what it missed
            cells = cells * (torch.sigmoid(previous) + 1).flatten(1)[..., None]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(cells), -1, -1)
        tokens = torch.cat([own, prompts[:, None]], dim=1) + self.level_embed.weight[level]
        states, cells = attend_both_ways(self.transformer[level], tokens, cells + dense, positions)
        # a hyper-network turns the first mask token (position 0 is the IoU token) into a 1 x 1 kernel: logits are its
        # dot product with every cell
        kernel = self.output_hypernetworks_mlps[0](states[:, 1])  # (Q, C / NARROW)
        logits = self.upscale(cells) @ kernel[:, None, :, None]  # (Q, h * w, 4, 1)
        return to_image(logits, *size)[:, 0]


def _double(width: int, out: int) -> nn.Sequential:
    norm = nn.LayerNorm(out, eps=1e-6)
    return nn.Sequential(Doubling(width, out, kernel_size=2, stride=2), norm, nn.GELU())
