"""Masks from tower features of several levels, coarse to fine: SAM's decoder design without SAM (pixellm.md 1.7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamLayerNorm, SamTwoWayTransformer

from model.heads.doubling import Doubling
from model.heads.sam_attention import use_folded_attention

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

    def forward(
        self, level: int, features: Tensor, positions: Tensor, dense: Tensor, prompts: Tensor, previous: Tensor | None
    ) -> Tensor:
        """One level: (Q, C, h, w) features, (1, C, h, w) positions, (1, C, 1, 1) dense prompt, (Q, C) prompts, and
        previous, the (Q, h, w) logits of the level before, if any -> (Q, 2h, 2w) logits."""
        if previous is not None:
            # by 1 to 2: the previous mask directs attention but cannot erase what it missed
            features = features * (torch.sigmoid(previous) + 1)[:, None]
        number, channels, height, width = features.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(number, -1, -1)
        tokens = torch.cat([own, prompts[:, None]], dim=1) + self.level_embed.weight[level]
        states, features = self.transformer[level](
            point_embeddings=tokens[:, None],
            image_embeddings=features + dense,
            image_positional_embeddings=positions.expand(number, -1, -1, -1),
            attention_similarity=None,
        )
        features = self.upscale(features[:, 0].transpose(1, 2).reshape(number, channels, height, width))
        # a hyper-network turns the first mask token (position 0 is the IoU token) into a 1 x 1 kernel: logits are its
        # dot product with every cell
        kernel = self.output_hypernetworks_mlps[0](states[:, 0, 1])  # (Q, C / NARROW)
        return (kernel[:, None] @ features.flatten(2)).view(number, *features.shape[2:])


def _double(width: int, out: int) -> nn.Sequential:
    norm = SamLayerNorm(out, eps=1e-6, data_format="channels_first")
    return nn.Sequential(Doubling(width, out, kernel_size=2, stride=2), norm, nn.GELU())
