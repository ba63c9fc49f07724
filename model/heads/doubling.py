"""The transposed convolutions with which SAM's mask decoders double their cells, trained as matrix products.

A kernel of 2 x 2 with stride 2 lets nothing overlap: each cell becomes four by one product, (4 C', C) @ (C, h * w). On
a CPU, torch's backward pass of the convolution takes several times as long as that of the product. Without gradients
it stays the convolution, which is as fast there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class Doubling(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with kernel and stride 2, one group and a bias: the same weights and values."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C', 2h, 2w)."""
        if not torch.is_grad_enabled():
            return super().forward(input, output_size)
        number, _, height, width = input.shape
        product = self.weight.flatten(1).T @ input.flatten(2)  # (B, C' * 2 * 2, h * w)
        four = product.view(number, self.out_channels, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        bias = cast(Tensor, self.bias)[:, None, None, None, None]
        return (four + bias).reshape(number, -1, 2 * height, 2 * width)


def use_doubling(decoder: nn.Module) -> nn.Module:
    """Every transposed convolution of a mask decoder of SAM 1, 2 or 3 is computed so."""
    for module in decoder.modules():
        if type(module) is nn.ConvTranspose2d:
            module.__class__ = Doubling
    return decoder
